//! The seam to the datapath, whose own records are read at the time of asking.
//!
//! Rows come without the names of pods, services and devices where the datapath has only
//! numbers: [`super::names`] fills them in.

use std::{fmt, pin::Pin};

use futures::Stream;

use super::views::{CountView, EventView, FlowView};

/// The datapath, read only. Listing takes up to milliseconds: it is done on a blocking thread.
pub trait DatapathReader: fmt::Debug + Send + Sync {
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
