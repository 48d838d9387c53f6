//! [`DatapathReader`] of the pinned eBPF maps: counters, flows and events.

use std::{fmt, net::IpAddr, sync::Arc};

use dataplane_common::{flow::State, net::Protocol, reason::Outcome};
use futures::stream;
use tokio::sync::broadcast::error::RecvError;

use super::{
    datapath::{DatapathReader, Observation, Observations},
    views::{CountView, EventView, FlowView, PeerView},
};
use crate::datapath::{
    Count, Counters, Events, FlowRow, OpenError, PacketEvent, Pins, Tables,
    events::EventsError,
    flows::{self, flows},
};

/// The pinned maps of this node.
pub struct PinnedDatapath {
    tables: Tables,
    counters: Counters,
    events: Arc<Events>,
}

/// Error while the maps are opened.
#[derive(Debug, thiserror::Error)]
pub enum PinnedDatapathError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Events(#[from] EventsError),
}

impl PinnedDatapath {
    /// Opens the pinned maps and starts reading events.
    pub fn open(pins: &Pins) -> Result<Self, PinnedDatapathError> {
        let events = Arc::new(Events::start(pins)?);
        Ok(Self { tables: Tables::open(pins)?, counters: Counters::open(pins)?, events })
    }
}

impl fmt::Debug for PinnedDatapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedDatapath").finish_non_exhaustive()
    }
}

impl DatapathReader for PinnedDatapath {
    fn counts(&self) -> Result<Vec<CountView>, String> {
        let counts = self.counters.read().map_err(|error| format!("cannot read packet counters: {error}"))?;
        Ok(counts.into_iter().map(count).collect())
    }

    fn flows(&self) -> Result<Vec<FlowView>, String> {
        let rows = flows(&self.tables).map_err(|error| format!("cannot list flows: {error}"))?;
        Ok(rows.into_iter().map(flow).collect())
    }

    fn events(&self) -> Observations {
        let receiver = self.events.subscribe();
        Box::pin(stream::unfold(receiver, |mut receiver| async move {
            let observation = match receiver.recv().await {
                Ok(packet) => Observation::Event(event(packet)),
                Err(RecvError::Lagged(lost)) => Observation::Lost(lost),
                Err(RecvError::Closed) => return None,
            };
            Some((observation, receiver))
        }))
    }
}

const fn text(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed(verdict) => verdict.text(),
        Outcome::Dropped(reason) => reason.text(),
    }
}

fn count(count: Count) -> CountView {
    CountView {
        hook: count.hook.name().to_owned(),
        outcome: count.outcome.name().to_owned(),
        dropped: matches!(count.outcome, Outcome::Dropped(_)),
        text: text(count.outcome).to_owned(),
        packets: count.packets,
    }
}

fn flow(row: FlowRow) -> FlowView {
    let peer = |peer: flows::Peer| PeerView { address: peer.address, port: peer.port };
    FlowView {
        protocol: Protocol::name(row.protocol).to_owned(),
        source: peer(row.source),
        destination: peer(row.destination),
        translated_source: peer(row.translated_source),
        translated_destination: peer(row.translated_destination),
        state: match row.state {
            State::HalfOpen => "halfOpen",
            State::Established => "established",
            State::Closing => "closing",
            State::Answered => "answered",
            State::EndedForward => "endedByClient",
            State::EndedReply => "endedByServer",
            State::Reset | State::ResetForward | State::ResetReply => "reset",
            State::Refused => "refused",
        }
        .to_owned(),
        age_seconds: row.age,
        idle_seconds: row.idle,
        service_id: row.service_id,
        service: None,
    }
}

fn event(packet: PacketEvent) -> EventView {
    // `::`: the address was not parsed
    let end = |address: IpAddr, port| {
        let parsed = !(address.is_ipv6() && address.is_unspecified());
        parsed.then_some(PeerView { address, port })
    };
    EventView {
        timestamp_ns: packet.timestamp,
        hook: packet.hook.name().to_owned(),
        outcome: packet.outcome.name().to_owned(),
        dropped: matches!(packet.outcome, Outcome::Dropped(_)),
        text: text(packet.outcome).to_owned(),
        protocol: Protocol::name(packet.protocol).to_owned(),
        source: end(packet.source, packet.source_port),
        destination: end(packet.destination, packet.destination_port),
        source_name: None,
        destination_name: None,
        ifindex: packet.ifindex,
        device: None,
        device_pod: None,
        length: packet.length,
    }
}

#[cfg(test)]
mod tests {
    use dataplane_common::reason::{DropReason, HookId};

    use super::*;

    #[test]
    fn event_has_names_and_no_address_that_was_not_parsed() {
        let packet = PacketEvent {
            timestamp: 5,
            hook: HookId::FromPod,
            outcome: Outcome::Dropped(DropReason::Truncated),
            source: "10.1.0.5".parse().unwrap(),
            source_port: 1,
            destination: "::".parse().unwrap(),
            destination_port: 0,
            protocol: 6,
            ifindex: 3,
            length: 20,
        };
        let event = event(packet);
        assert!(event.dropped);
        assert_eq!((event.hook.as_str(), event.outcome.as_str()), ("from_pod", "truncated"));
        assert_eq!(event.protocol, "TCP");
        assert_eq!(event.destination, None);
        assert_eq!(event.source.unwrap().port, 1);
    }
}
