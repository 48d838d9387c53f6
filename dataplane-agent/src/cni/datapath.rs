//! What the CNI server needs of the datapath, as a trait. The task that owns programs and tables
//! implements it.

use std::{fmt, net::IpAddr, path::PathBuf};

use dataplane_cni::protocol::{Pod, PortMapping};
use dataplane_common::abi::MacAddr;
use futures::future::BoxFuture;
use ipnet::IpNet;

use super::PodAnnotations;

/// A pod's device, with all that the datapath needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDevice {
    /// Name of the host side.
    pub name: String,
    pub ifindex: u32,
    /// MAC address inside the pod.
    pub mac: MacAddr,
    /// Path of the pod's network namespace; `None` if the record is lost.
    pub netns: Option<PathBuf>,
    /// At most one per family.
    pub addresses: Vec<IpAddr>,
    /// Sources that the pod may use besides its addresses.
    pub allowed_sources: Vec<IpNet>,
    /// `None` if the runtime did not name the pod, or the record is lost.
    pub pod: Option<Pod>,
    /// Host ports of the pod.
    pub port_mappings: Vec<PortMapping>,
    /// The device has a qdisc that limits the traffic to the pod.
    pub shaped: bool,
}

/// Why a datapath operation failed, as a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PodDatapathError(pub String);

/// The datapath's operations on pods. Every call is idempotent.
pub trait PodDatapath: fmt::Debug + Send + Sync {
    /// Attaches the programs to the device and adds its addresses to the tables. Once it returns,
    /// packets flow.
    fn attach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>>;
    /// The annotations of a pod; the default if the pod is not in the API cache. An error names the
    /// annotation.
    fn annotations<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<PodAnnotations, PodDatapathError>>;
    /// Removes the addresses and detaches the programs. The device need not exist or be attached.
    fn detach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>>;
    /// Verifies that programs and addresses are as [`Self::attach`] left them.
    fn check<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>>;
}
