//! The lookups of the datapath in a node's tables, written a second time: `find_frontend` and
//! `select_backend` of `stages/service.rs` and `SelectBackend` of `stages/on_miss.rs` in
//! `dataplane-ebpf`.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::abi::{Addr, BackendSlot, Port, Scope, Service, ServiceFlags, ServiceKey, SourceRange};
use dataplane_oracle::{Destination, Verdict};

use super::{cluster::number, tables::Tables};

/// The origin of a packet, relative to the node with these tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryOrigin {
    pub(crate) client: IpAddr,
    /// The client is neither a pod nor a process of the node.
    pub(crate) is_external: bool,
    /// A process of the node itself.
    pub(crate) is_host: bool,
    /// The node's address as a masquerade source.
    pub(crate) node: IpAddr,
}

impl Tables {
    /// The verdict for a packet to `query`.
    pub(crate) fn verdict(&self, query: &Destination, origin: QueryOrigin) -> Verdict {
        let address = Addr::from(query.address);
        let endpoint = self.endpoints.row(&address);
        // a pod's own address, or a host address whose flow hint excludes frontends
        if endpoint.is_some_and(|it| !it.is_host() || !it.flow_hints.may_have_flow(number(query.protocol))) {
            return Verdict::NoFrontend;
        }
        // `node_ports.loopback` is on
        let node_ports = endpoint.map_or_else(
            || origin.is_host && query.address.is_loopback(),
            |endpoint| endpoint.has_node_ports(),
        );
        let Some(service) = self.frontend(query, node_ports, origin.is_external) else {
            let is_cluster_ip = self.services.row(&ServiceKey::of_address(address)).is_some();
            return if is_cluster_ip { Verdict::Rejected } else { Verdict::NoFrontend };
        };
        if service.flags & ServiceFlags::SOURCE_RANGES != 0 && !self.is_allowed(service.id, origin.client) {
            return Verdict::Dropped;
        }
        if service.count == 0 {
            let is_local = service.flags & ServiceFlags::LOCAL != 0;
            return if is_local { Verdict::Dropped } else { Verdict::Rejected };
        }
        let slots = self.range(&service);
        Verdict::Delivered(slots.iter().map(|slot| self.backend_and_source(&service, slot, origin)).collect())
    }

    fn frontend(&self, query: &Destination, node_ports: bool, is_external: bool) -> Option<Service> {
        let mut key = ServiceKey {
            addr: query.address.into(),
            port: Port::new(query.port),
            protocol: number(query.protocol),
            scope: Scope::Any as u8,
        };
        let mut service = self.intact_row(&key);
        if service.is_none() && node_ports {
            key = key.at_node();
            service = self.intact_row(&key);
        }
        let service = service?;
        if !is_external || service.flags & ServiceFlags::OUTSIDE == 0 {
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

    fn backend_and_source(
        &self,
        service: &Service,
        slot: &BackendSlot,
        origin: QueryOrigin,
    ) -> (SocketAddr, IpAddr) {
        let is_itself = slot.addr == Addr::from(origin.client);
        let is_elsewhere = self.endpoints.row(&slot.addr).is_none();
        let as_node =
            is_itself || (origin.is_external && service.flags & ServiceFlags::LOCAL == 0 && is_elsewhere);
        let source = if as_node { origin.node } else { origin.client };
        (SocketAddr::new(slot.addr.to_ip(), slot.port.get()), source)
    }

    /// The longest-prefix lookup of the source ranges.
    fn is_allowed(&self, service_id: u32, client: IpAddr) -> bool {
        let key = SourceRange { service_id, addr: client.into() };
        self.source_ranges.rows().iter().any(|(prefix, _)| is_in(&key, &prefix.range, prefix.bits))
    }

    /// The ids of all backends in use.
    pub(crate) fn ids_in_use(&self) -> BTreeSet<u32> {
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
