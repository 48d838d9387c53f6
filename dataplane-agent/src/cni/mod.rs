//! Pods come and go here: the agent's side of the CNI.
//!
//! [`server`] answers the plugin and owns the order of steps; [`ipam`] decides addresses, [`pods`] keeps records on disk,
//! `recovery` finds out at start what is left. Devices are made by [`crate::netlink`]; the datapath is behind
//! [`Wiring`]. Invariants: an address has one owner; it is free only once nothing answers to it any more; whatever is
//! made for a pod has a record on disk before it is made.

mod add;
mod del;
mod error;
pub mod ipam;
mod name;
pub mod pods;
mod recovery;
pub mod server;
mod turns;
mod wiring;
pub mod wishes;

pub use error::CniError;
pub use recovery::Recovery;
pub use server::{PodNetwork, Server};
pub use wiring::{PodDevice, Wiring, WiringError};
pub use wishes::Wishes;
