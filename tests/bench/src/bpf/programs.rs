//! Programs without maps that do the same with every packet.

use super::assembly::{Assembly, Helper, Instruction, Op, Reg};

/// A program that returns `action` at once.
pub(crate) fn empty(action: u32) -> Vec<Instruction> {
    let mut assembly = Assembly::default();
    assembly.constant(Op::Move, Reg::R0, action as i32).exit();
    assembly.finish()
}

/// A program that redirects to the egress of a device.
pub(crate) fn redirect(ifindex: u32) -> Vec<Instruction> {
    redirect_by(Helper::Redirect, ifindex)
}

/// A program that redirects to the ingress of a device's peer in another namespace (Linux 5.10).
pub(crate) fn redirect_to_peer(ifindex: u32) -> Vec<Instruction> {
    redirect_by(Helper::RedirectPeer, ifindex)
}

fn redirect_by(helper: Helper, ifindex: u32) -> Vec<Instruction> {
    let mut assembly = Assembly::default();
    assembly.constant(Op::Move, Reg::R1, ifindex as i32).constant(Op::Move, Reg::R2, 0).call(helper).exit();
    assembly.finish()
}
