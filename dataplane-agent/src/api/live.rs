//! What the API reads at the time of asking: the datapath's own records, and the ranges of the IPAM.
//!
//! The seams to those who know. Rows come without the names of pods, services and devices where the datapath has only
//! numbers: [`super::names`] fills them in.

use std::{fmt, pin::Pin};

use futures::Stream;

use super::views::{CountView, EventView, FlowView, IpamView};

/// The datapath, read only. Listing takes up to milliseconds: it is done on a blocking thread.
pub trait Live: fmt::Debug + Send + Sync {
    /// Every counter that is not zero.
    fn counts(&self) -> Result<Vec<CountView>, String>;
    /// Every connection that is translated per packet now.
    fn flows(&self) -> Result<Vec<FlowView>, String>;
    /// What happens to packets from now on.
    fn events(&self) -> Observations;
}

/// Packets as they are reported.
pub type Observations = Pin<Box<dyn Stream<Item = Observation> + Send>>;

/// An item of the event stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    Event(EventView),
    /// The listener was too slow: this many were dropped.
    Lost(u64),
}

/// The ranges pods get their addresses from.
pub trait Ipam: fmt::Debug + Send + Sync {
    fn ranges(&self) -> Vec<IpamView>;
}
