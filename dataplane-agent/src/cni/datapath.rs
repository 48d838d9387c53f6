//! The seam to the datapath: what the CNI server asks of the task that owns tables and programs.

use std::{fmt, net::IpAddr, path::PathBuf};

use dataplane_cni::protocol::{Pod, PortMapping};
use dataplane_common::abi::MacAddr;
use futures::future::BoxFuture;

use super::PodAnnotations;

/// A pod's device, as the datapath must know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDevice {
    /// Name of the host's side.
    pub name: String,
    pub ifindex: u32,
    /// Link address inside the pod.
    pub mac: MacAddr,
    /// File of the pod's network namespace; absent if the record is lost.
    pub netns: Option<PathBuf>,
    /// At most one per family.
    pub addresses: Vec<IpAddr>,
    /// Absent if the runtime did not say, or the record is lost.
    pub pod: Option<Pod>,
    /// Ports of the node that lead to it.
    pub port_mappings: Vec<PortMapping>,
    /// What goes to the pod is limited by the queue of the device.
    pub shaped: bool,
}

/// Why the datapath did not do as asked: a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PodDatapathError(pub String);

/// The datapath, and what is known of pods. Every call may be repeated, and says that all is well if there is nothing to do.
pub trait PodDatapath: fmt::Debug + Send + Sync {
    /// Attaches the programs to the device and publishes its addresses. Once it returns, packets flow.
    fn attach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>>;
    /// What a pod asks for; nothing if nobody has heard of the pod. An error names the annotation.
    fn wishes<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<PodAnnotations, PodDatapathError>>;
    /// Withdraws the addresses and the programs. The device may be gone already, or never have been attached.
    fn detach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>>;
    /// Whether programs and addresses are as [`Self::attach`] left them.
    fn check<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>>;
}
