//! The datapath of a node: every program entry point that the kernel calls.
//!
//! Each entry point only says where it is attached. What happens there is in [`hooks`], one file
//! per attach point. Start reading at [`hooks::FromPod`], the path of a packet that leaves a pod;
//! `docs/design/packet-path.md` follows three packets through the source.
//!
//! Layers, from top to bottom: [`hooks`] are lists of [`stages`]; stages work on a [`frame`]
//! through [`helpers`], read [`maps`] and leave what they found in [`scratch`]. Most stages are
//! [global functions](global).
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(clippy::needless_pass_by_value, reason = "aya-ebpf's macros hand an entry its context by value")]

mod config;
mod event;
mod frame;
mod global;
mod helpers;
mod hooks;
mod maps;
mod scratch;
mod stages;
mod verdict;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};

use crate::{
    helpers::socket::Socket,
    hooks::driver::{run_tc, run_xdp},
};

// inlined into what the macro generates: a call takes 32 bytes of the stack on Linux 6.1
#[classifier]
#[inline(always)]
fn from_pod(ctx: TcContext) -> i32 {
    run_tc::<hooks::FromPod>(&ctx)
}

#[classifier]
#[inline(always)]
fn to_pod(ctx: TcContext) -> i32 {
    run_tc::<hooks::ToPod>(&ctx)
}

#[classifier]
#[inline(always)]
fn from_wire(ctx: TcContext) -> i32 {
    run_tc::<hooks::FromWire>(&ctx)
}

#[xdp]
#[inline(always)]
fn xdp_wire(ctx: XdpContext) -> u32 {
    run_xdp::<hooks::XdpWire>(&ctx)
}

#[classifier]
#[inline(always)]
fn to_wire(ctx: TcContext) -> i32 {
    run_tc::<hooks::ToWire>(&ctx)
}

#[classifier]
#[inline(always)]
fn from_overlay(ctx: TcContext) -> i32 {
    run_tc::<hooks::FromOverlay>(&ctx)
}

#[classifier]
#[inline(always)]
fn to_overlay(ctx: TcContext) -> i32 {
    run_tc::<hooks::ToOverlay>(&ctx)
}

#[classifier]
#[inline(always)]
fn from_l3(ctx: TcContext) -> i32 {
    hooks::l3::from_l3(&ctx)
}

#[classifier]
#[inline(always)]
fn to_l3(ctx: TcContext) -> i32 {
    hooks::l3::to_l3(&ctx)
}

#[classifier]
#[inline(always)]
fn leave_l3(ctx: TcContext) -> i32 {
    hooks::l3::leave_l3(&ctx)
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    hooks::socket::connect(&Socket::v4(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    hooks::socket::connect(&Socket::v6(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    hooks::socket::sendmsg(&Socket::v4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    hooks::socket::sendmsg(&Socket::v6(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    hooks::socket::recvmsg(&Socket::v4(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    hooks::socket::recvmsg(&Socket::v6(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    hooks::socket::getpeername(&Socket::v4(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    hooks::socket::getpeername(&Socket::v6(&ctx))
}

#[cgroup_sock(sock_release)]
fn release(ctx: SockContext) -> i32 {
    hooks::socket::release(&ctx)
}

/// The verifier rejects an endless loop: a panic that survives optimisation makes the load fail.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers such as `bpf_redirect_neigh` need a GPL-compatible license; the user space half is MIT
/// OR Apache-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
