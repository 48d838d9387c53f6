//! Pods come and go here: the agent's side of the CNI.
//!
//! [`server`] answers the plugin and owns the order of steps; [`ipam`] decides addresses, [`pods`] keeps records on disk,
//! `recovery` finds out at start what is left. Devices are made by [`crate::netlink`]; the datapath is behind
//! [`PodDatapath`]. Invariants: an address has one owner; it is free only once nothing answers to it any more; whatever is
//! made for a pod has a record on disk before it is made.

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
