//! Lists the flow table.
//!
//! Read only: only the datapath allocates slots (`dataplane_common::abi`, `FLOW_BLOCKS`), and flows
//! expire there by the rules of [`dataplane_common::flow`], without the agent. A record read here
//! may be a mix of two flows in the same slot; the epoch shows whether it is.

use std::{io, net::IpAddr};

use dataplane_common::{
    abi::{Flow, FlowFlags, FlowKey},
    flow::{State, is_expired},
};
use nix::time::{ClockId, clock_gettime};

use super::{
    maps::{ArrayTable, HashTable, Tables},
    table::{Table, TableError},
};

/// Why the flow table could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("read the monotonic clock: {0}")]
    Clock(#[source] io::Error),
}

/// A connection that is translated per packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRow {
    /// Source of a forward packet before translation.
    pub source: Peer,
    pub destination: Peer,
    /// Source of a forward packet after translation.
    pub translated_source: Peer,
    pub translated_destination: Peer,
    /// IP protocol number.
    pub protocol: u8,
    pub state: State,
    /// Seconds since the first packet.
    pub age: u32,
    /// Seconds since the last packet.
    pub idle: u32,
    /// ID of the service port, if the flow has a backend.
    pub service_id: Option<u32>,
    /// Slot in the flow table.
    pub slot: u32,
}

/// Address and port; for ICMP echo, the port is the identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub address: IpAddr,
    pub port: u16,
}

/// Lists the flows that have not expired, by the index: the cost depends on the number of flows,
/// not on the capacity.
pub fn flows(tables: &Tables) -> Result<Vec<FlowRow>, FlowsError> {
    Ok(listed(&tables.flow_index, &tables.flows, monotonic_seconds()?)?)
}

fn listed(
    index: &HashTable<FlowKey, dataplane_common::abi::FlowRef>,
    records: &ArrayTable<Flow>,
    now: u32,
) -> Result<Vec<FlowRow>, TableError> {
    let mut rows = Vec::new();
    for (key, reference) in index.entries()? {
        let Some(record) = records.get(&reference.slot)? else { continue };
        // the index has an entry per direction for a record; an entry with another epoch is stale
        let current = record.epoch == reference.epoch && record.epoch % 2 == 0;
        if current && record.forward == key && !is_expired(&record, now) {
            rows.push(row(&record, reference.slot, now));
        }
    }
    rows.sort_unstable_by_key(|row| row.slot);
    rows.dedup_by_key(|row| row.slot);
    Ok(rows)
}

fn row(flow: &Flow, slot: u32, now: u32) -> FlowRow {
    let translated = flow.reply.reversed();
    FlowRow {
        source: Peer { address: flow.forward.src.to_ip(), port: flow.forward.src_port.get() },
        destination: Peer { address: flow.forward.dst.to_ip(), port: flow.forward.dst_port.get() },
        translated_source: Peer { address: translated.src.to_ip(), port: translated.src_port.get() },
        translated_destination: Peer { address: translated.dst.to_ip(), port: translated.dst_port.get() },
        protocol: flow.forward.protocol,
        state: State::from_number(flow.state),
        age: now.saturating_sub(flow.created),
        idle: now.saturating_sub(flow.last_seen),
        service_id: (flow.flags & FlowFlags::SERVICE != 0).then_some(flow.service_id),
        slot,
    }
}

/// Seconds of `CLOCK_MONOTONIC`, the datapath's clock.
fn monotonic_seconds() -> Result<u32, FlowsError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|errno| FlowsError::Clock(errno.into()))?;
    Ok(u32::try_from(now.tv_sec()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use dataplane_common::abi::Port;

    use super::*;

    fn key(source: &str, source_port: u16, destination: &str, destination_port: u16) -> FlowKey {
        let address = |text: &str| text.parse::<IpAddr>().unwrap().into();
        FlowKey::new(
            6,
            address(source),
            Port::new(source_port),
            address(destination),
            Port::new(destination_port),
        )
    }

    #[test]
    fn row_shows_the_packet_before_and_after_translation() {
        let flow = Flow {
            forward: key("10.0.0.1", 4_000, "10.96.0.1", 80),
            reply: key("10.0.1.7", 8_080, "10.0.0.1", 4_000),
            flags: FlowFlags::SERVICE,
            service_id: 3,
            created: 100,
            last_seen: 130,
            ..Flow::default()
        };
        let row = row(&flow, 5, 140);
        assert_eq!(row.destination.address, "10.96.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(row.translated_destination.address, "10.0.1.7".parse::<IpAddr>().unwrap());
        assert_eq!(row.translated_destination.port, 8_080);
        assert_eq!(row.translated_source, row.source);
        assert_eq!((row.age, row.idle, row.service_id), (40, 10, Some(3)));
    }
}
