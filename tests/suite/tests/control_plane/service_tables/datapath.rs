//! What the datapath makes of a node's tables: `find_frontend` and `select_backend` of `stages/service.rs` and
//! `SelectBackend` of `stages/on_miss.rs` in `dataplane-ebpf`, written a second time.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::abi::{Addr, BackendSlot, Port, Scope, Service, ServiceFlags, ServiceKey, SourceRange};
use dataplane_oracle::{Destination, Verdict};

use super::{cluster::number, tables::Tables};

/// How a question comes to the node whose tables these are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asks {
    pub(crate) client: IpAddr,
    /// The client is neither a pod nor a process of the node.
    pub(crate) from_outside: bool,
    /// A process of the node itself.
    pub(crate) of_host: bool,
    /// What backends see of the node.
    pub(crate) node: IpAddr,
}

impl Tables {
    /// What becomes of a question that arrives here.
    pub(crate) fn answer(&self, question: &Destination, asks: Asks) -> Verdict {
        let address = Addr::from(question.address);
        let endpoint = self.endpoints.row(&address);
        // a pod's own address; and a host's that no frontend is at, as far as its gate tells
        if endpoint.is_some_and(|it| !it.is_host() || !it.flow_hints.may_have_flow(number(question.protocol)))
        {
            return Verdict::NoFrontend;
        }
        // the switch `node_ports.loopback` is on
        let node_ports = endpoint.map_or_else(
            || asks.of_host && question.address.is_loopback(),
            |endpoint| endpoint.has_node_ports(),
        );
        let Some(service) = self.frontend(question, node_ports, asks.from_outside) else {
            let is_cluster_ip = self.services.row(&ServiceKey::of_address(address)).is_some();
            return if is_cluster_ip { Verdict::Rejected } else { Verdict::NoFrontend };
        };
        if service.flags & ServiceFlags::SOURCE_RANGES != 0 && !self.lets_in(service.id, asks.client) {
            return Verdict::Dropped;
        }
        if service.count == 0 {
            let is_local = service.flags & ServiceFlags::LOCAL != 0;
            return if is_local { Verdict::Dropped } else { Verdict::Rejected };
        }
        let slots = self.range(&service);
        Verdict::Delivered(slots.iter().map(|slot| self.seen(&service, slot, asks)).collect())
    }

    fn frontend(&self, question: &Destination, node_ports: bool, from_outside: bool) -> Option<Service> {
        let mut key = ServiceKey {
            addr: question.address.into(),
            port: Port::new(question.port),
            protocol: number(question.protocol),
            scope: Scope::Any as u8,
        };
        let mut service = self.intact_row(&key);
        if service.is_none() && node_ports {
            key = key.at_node();
            service = self.intact_row(&key);
        }
        let service = service?;
        if !from_outside || service.flags & ServiceFlags::OUTSIDE == 0 {
            return Some(service);
        }
        key.scope = Scope::Outside as u8;
        Some(self.intact_row(&key).unwrap_or(service))
    }

    fn intact_row(&self, key: &ServiceKey) -> Option<Service> {
        let row = self.services.row(key)?;
        assert!(row.is_intact(key), "{row:?} at {key:?}");
        Some(row)
    }

    /// The slots of a row.
    pub(crate) fn range(&self, service: &Service) -> Vec<BackendSlot> {
        let slots = service.first_slot..service.first_slot + service.count;
        slots.map(|slot| self.backends.row(&slot).unwrap_or_default()).collect()
    }

    fn seen(&self, service: &Service, slot: &BackendSlot, asks: Asks) -> (SocketAddr, IpAddr) {
        let is_itself = slot.addr == Addr::from(asks.client);
        let is_elsewhere = self.endpoints.row(&slot.addr).is_none();
        let as_node =
            is_itself || (asks.from_outside && service.flags & ServiceFlags::LOCAL == 0 && is_elsewhere);
        let source = if as_node { asks.node } else { asks.client };
        (SocketAddr::new(slot.addr.to_ip(), slot.port.get()), source)
    }

    /// The lookup of a trie.
    fn lets_in(&self, service_id: u32, client: IpAddr) -> bool {
        let key = SourceRange { service_id, addr: client.into() };
        self.source_ranges.rows().iter().any(|(prefix, _)| is_in(&key, &prefix.range, prefix.bits))
    }

    /// Numbers of backends that are somebody's.
    pub(crate) fn numbers_in_use(&self) -> BTreeSet<u32> {
        let in_use = self.generations.rows().into_iter().filter(|(_, generation)| generation % 2 == 1);
        in_use.map(|(id, _)| id).collect()
    }
}

fn is_in(key: &SourceRange, range: &SourceRange, bits: u32) -> bool {
    let of_address = bits.saturating_sub(u32::BITS);
    let whole = |range: &SourceRange| match range.addr.to_ip() {
        IpAddr::V4(v4) => u128::from(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => u128::from(v6),
    };
    let differ = (whole(key) ^ whole(range)).leading_zeros();
    key.service_id == range.service_id && differ >= of_address
}
