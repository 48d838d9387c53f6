//! What can be asked of the agent besides the verbs of the CNI, and the filters of the long lists.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::views::{EventView, FlowView, PeerView};

/// A question of the CLI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "view", rename_all = "snake_case")]
pub enum View {
    /// Answered by a [`super::views::StatusView`].
    Status,
    /// A list of [`super::views::ServiceView`].
    Services,
    /// A list of [`super::views::EndpointView`].
    Endpoints,
    /// A list of [`super::views::RouteView`].
    Routes,
    /// A [`FlowList`].
    Flows(FlowFilter),
    /// [`EventLine`]s: those of the last minutes, and with `follow` all that come, until the client leaves.
    Events(EventFilter),
}

/// Which flows. What is absent does not restrict.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowFilter {
    /// Either end, before or after the translation.
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    /// `tcp`, `udp`, ...
    pub protocol: Option<String>,
    /// `namespace/name`.
    pub service: Option<String>,
    /// No more than this many.
    pub limit: Option<usize>,
}

/// Which events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventFilter {
    /// Go on with what happens from now on.
    pub follow: bool,
    /// Only packets that ended.
    pub dropped: bool,
    /// Either end.
    pub address: Option<IpAddr>,
    /// Name of a verdict or drop reason.
    pub outcome: Option<String>,
}

/// The flows that were asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowList {
    /// How many match: more than are listed if there was a limit.
    pub matching: usize,
    /// How many there are.
    pub total: usize,
    pub flows: Vec<FlowView>,
}

/// A line of the answer to [`View::Events`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventLine {
    Event(EventView),
    /// The client or the network of this many events was too slow.
    Lost(u64),
    /// No more lines come.
    End,
}

impl View {
    /// Its name in metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Services => "services",
            Self::Endpoints => "endpoints",
            Self::Routes => "routes",
            Self::Flows(_) => "flows",
            Self::Events(_) => "events",
        }
    }
}

impl FlowFilter {
    pub fn matches(&self, flow: &FlowView) -> bool {
        let ends = [flow.source, flow.destination, flow.translated_source, flow.translated_destination];
        self.address.is_none_or(|address| ends.iter().any(|end| end.address == address))
            && self.port.is_none_or(|port| ends.iter().any(|end| end.port == port))
            && self.protocol.as_ref().is_none_or(|protocol| protocol.eq_ignore_ascii_case(&flow.protocol))
            && self.service.as_ref().is_none_or(|service| flow.service.as_ref() == Some(service))
    }
}

impl EventFilter {
    pub fn matches(&self, event: &EventView) -> bool {
        let at = |end: Option<PeerView>, address| end.is_some_and(|end| end.address == address);
        (!self.dropped || event.dropped)
            && self.address.is_none_or(|address| at(event.source, address) || at(event.destination, address))
            && self.outcome.as_ref().is_none_or(|outcome| *outcome == event.outcome)
    }
}
