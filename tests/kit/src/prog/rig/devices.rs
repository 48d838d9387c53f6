//! The devices that packets of a rig arrive on: the kernel runs a program only on a packet of a
//! device that exists.

use std::{cell::Cell, process::Command};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::prog::frame::HOST_MAC;

/// Index of the loopback device of every namespace.
pub const LOOPBACK: u32 = 1;
/// Index of the uplink, which has the link address of test frames. A new namespace may have devices
/// with the lowest ones.
pub const WIRE: u32 = 100;
/// Indexes of the host-side devices of both pods.
pub const PODS: [u32; 2] = [11, 12];

/// Runs `ip` in the namespace of the calling thread.
pub fn ip(arguments: &str) -> Result<String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("run ip")?;
    let problem = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {problem}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

thread_local! {
    /// The thread is in a new namespace, without these devices yet.
    static ENTERED: Cell<bool> = const { Cell::new(false) };
}

/// Moves the calling thread into a new namespace, in which its next rig is created. The namespace
/// ends with the thread.
pub fn enter_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
    ENTERED.set(true);
    Ok(())
}

/// Creates these devices in the namespace of [`enter_namespace`], or in a new one.
pub(super) fn create() -> Result<()> {
    if !ENTERED.take() {
        enter_namespace()?;
        ENTERED.set(false);
    }
    let mac = HOST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!("link add wire0 index {WIRE} address {mac} type veth peer name wire1"))?;
    // only their indexes matter
    let [pod, other] = PODS;
    ip(&format!("link add pod0 index {pod} type veth peer name pod1 index {other}"))?;
    for device in ["lo", "wire1", "wire0", "pod0", "pod1"] {
        ip(&format!("link set {device} up"))?;
    }
    Ok(())
}
