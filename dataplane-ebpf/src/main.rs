//! The datapath of a node: every entry the kernel calls.
//!
//! An entry is a shell: it says where it is attached, and [`hooks`] says what happens there. Start reading at
//! [`hooks::FromPod`], the path of a packet that leaves a pod.
#![no_std]
#![no_main]
#![expect(clippy::needless_pass_by_value, reason = "aya-ebpf's macros hand an entry its context by value")]

mod config;
mod event;
mod family;
mod hooks;
mod maps;
mod packet;
mod skb;
mod stages;
mod verdict;
mod xdp;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};

#[classifier]
fn from_pod(ctx: TcContext) -> i32 {
    verdict::classify::<hooks::FromPod>(&ctx)
}

#[classifier]
fn to_pod(ctx: TcContext) -> i32 {
    verdict::classify::<hooks::ToPod>(&ctx)
}

#[classifier]
fn from_wire(ctx: TcContext) -> i32 {
    verdict::classify::<hooks::FromWire>(&ctx)
}

#[xdp]
fn xdp_wire(ctx: XdpContext) -> u32 {
    verdict::drive::<hooks::XdpWire>(&ctx)
}

#[classifier]
fn to_wire(ctx: TcContext) -> i32 {
    verdict::classify::<hooks::ToWire>(&ctx)
}

#[classifier]
fn from_overlay(ctx: TcContext) -> i32 {
    verdict::classify::<hooks::FromOverlay>(&ctx)
}

#[classifier]
fn to_overlay(ctx: TcContext) -> i32 {
    verdict::classify::<hooks::ToOverlay>(&ctx)
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    hooks::socket::connect(&skb::Socket::v4(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    hooks::socket::connect(&skb::Socket::v6(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    hooks::socket::sendmsg(&skb::Socket::v4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    hooks::socket::sendmsg(&skb::Socket::v6(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    hooks::socket::recvmsg(&skb::Socket::v4(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    hooks::socket::recvmsg(&skb::Socket::v6(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    hooks::socket::getpeername(&skb::Socket::v4(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    hooks::socket::getpeername(&skb::Socket::v6(&ctx))
}

#[cgroup_sock(sock_release)]
fn release(ctx: SockContext) -> i32 {
    hooks::socket::release(&ctx)
}

/// The verifier refuses an endless loop: a panic that survives optimisation is a load failure, never a surprise.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers such as `bpf_redirect_neigh` are for GPL-compatible programs only; the user space half is MIT OR Apache-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
