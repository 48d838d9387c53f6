//! Requests of the CLI, and their filters.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::views::{EventView, FlowView, PeerView};

/// A request for a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "view", rename_all = "camelCase")]
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
    /// A stream of [`EventLine`]: recorded events, and with `follow` new ones until the client
    /// disconnects.
    Events(EventFilter),
}

/// Filter of flows; an absent field matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct FlowFilter {
    /// Address of either end, before or after translation.
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    /// `tcp`, `udp`, ...
    pub protocol: Option<String>,
    /// `namespace/name`.
    pub service: Option<String>,
    /// Largest number of flows to return.
    pub limit: Option<usize>,
}

/// Filter of packet events; an absent field matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EventFilter {
    /// Continue with new events.
    pub follow: bool,
    /// Only dropped packets.
    pub dropped: bool,
    /// Address of either end.
    pub address: Option<IpAddr>,
    /// Name of a verdict or drop reason.
    pub outcome: Option<String>,
}

/// The answer to [`View::Flows`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowList {
    /// Number of flows that match; more than are listed if there was a limit.
    pub matching: usize,
    /// Number of all flows.
    pub total: usize,
    pub flows: Vec<FlowView>,
}

/// A line of the answer to [`View::Events`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EventLine {
    Event(EventView),
    /// Number of events lost because the client was too slow.
    Lost(u64),
    /// End of the stream.
    End,
}

impl View {
    /// Name in requests and metrics.
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
