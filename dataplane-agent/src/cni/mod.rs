//! The agent's side of CNI: adds and removes pods.
//!
//! [`server`] answers the plugin and owns the order of steps; [`ipam`] allocates addresses;
//! [`pods`] keeps records on disk; `recovery` restores the state at start. [`crate::netlink`]
//! creates devices; [`PodDatapath`] is the datapath.
//!
//! Invariants: an address has one owner. An address is free only when nothing answers to it. A
//! pod's record is on disk before anything is created for the pod.

mod add;
pub mod annotations;
mod datapath;
mod del;
mod error;
pub mod ipam;
mod keyed_mutex;
mod name;
pub mod pods;
mod recovery;
pub mod server;

pub use annotations::PodAnnotations;
pub use datapath::{PodDatapath, PodDatapathError, PodDevice};
pub use error::CniError;
pub use recovery::Recovery;
pub use server::{PodNetwork, Server};
