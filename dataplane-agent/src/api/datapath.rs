//! Interface to the eBPF maps, which are read at the time of a request.
//!
//! The maps have no names of pods, services and devices: [`super::names`] adds them.

use std::{fmt, pin::Pin};

use futures::Stream;

use super::views::{CountView, EventView, FlowView};

/// Read access to the datapath. Calls take up to milliseconds: make them on a blocking thread.
pub trait DatapathReader: fmt::Debug + Send + Sync {
    /// Every counter that is not zero.
    fn counts(&self) -> Result<Vec<CountView>, String>;
    /// Every flow.
    fn flows(&self) -> Result<Vec<FlowView>, String>;
    /// Packet events from now on.
    fn events(&self) -> Observations;
}

/// Stream of packet events.
pub type Observations = Pin<Box<dyn Stream<Item = Observation> + Send>>;

/// An item of the event stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    Event(EventView),
    /// Number of events lost because the reader was too slow.
    Lost(u64),
}
