//! Writes rows into the tables as the agent does.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use aya::maps::{Array, LpmTrie, MapData, lpm_trie::Key};
use dataplane_common::abi::{
    Addr, AllowedSource, BackendSlot, Device, DeviceFlags, Endpoint, EndpointFlags, MacAddr, PodSource, Port,
    PortSet, Route, RouteKind, Scope, Service, ServiceFlags, ServiceKey, SourceRange, names::map,
};

use super::{super::frame::HOST_MAC, Rig};

impl Rig {
    /// As the agent after a change of a table or of the kernel's network configuration. A rig's
    /// packets come one after the other, so it makes no difference that this comes first.
    pub fn advance_generation(&mut self) -> Result<()> {
        let mut generation = self.array::<u32>(map::FORWARDING_GENERATION)?;
        let next = generation.get(&0, 0)?.wrapping_add(1);
        Ok(generation.set(0, next, 0)?)
    }

    pub fn pod(&mut self, addr: IpAddr, ifindex: u32, mac: [u8; 6]) -> Result<()> {
        self.pod_without_slot(addr, ifindex, mac)?;
        self.set_pod_source(PodSource { addr: addr.into(), ifindex }, ifindex)
    }

    /// A pod whose slot in `POD_SOURCES` is another's.
    pub fn pod_without_slot(&mut self, addr: IpAddr, ifindex: u32, mac: [u8; 6]) -> Result<()> {
        self.advance_generation()?;
        let endpoint = Endpoint::pod(ifindex, MacAddr::new(mac));
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    fn set_pod_source(&mut self, source: PodSource, ifindex: u32) -> Result<()> {
        self.advance_generation()?;
        let slot = PodSource::slot(ifindex, source.addr.is_v4());
        let mut sources: Array<&mut MapData, PodSource> =
            Array::try_from(self.ebpf.map_mut(map::POD_SOURCES).context("POD_SOURCES")?)?;
        Ok(sources.set(slot, source, 0)?)
    }

    /// A pod whose host-side device is down.
    pub fn pod_down(&mut self, addr: IpAddr, ifindex: u32) -> Result<()> {
        self.advance_generation()?;
        let mut endpoint = Endpoint::pod(ifindex, MacAddr::new([0; 6]));
        endpoint.flags |= EndpointFlags::DOWN;
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    /// The device with this index has these addresses.
    pub fn device(&mut self, ifindex: u32, ipv4: IpAddr, ipv6: IpAddr) -> Result<()> {
        self.set_device(ifindex, [ipv4.into(), ipv6.into()])
    }

    /// The device of the rig has programs and no address: packets that leave by it get the node's.
    pub fn device_without_address(&mut self) -> Result<()> {
        self.set_device(self.ifindex, [Addr::UNSPECIFIED; 2])
    }

    fn set_device(&mut self, ifindex: u32, [ipv4, ipv6]: [Addr; 2]) -> Result<()> {
        self.advance_generation()?;
        let device = Device { ipv4, ipv6, flags: DeviceFlags::ETHERNET, mac: MacAddr::new(HOST_MAC) };
        Ok(self.hash(map::DEVICES)?.insert(ifindex, device, 0)?)
    }

    pub fn host(&mut self, addr: IpAddr) -> Result<()> {
        self.advance_generation()?;
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), Endpoint::host(), 0)?)
    }

    /// A host address with frontends.
    pub fn host_with_frontends(&mut self, addr: IpAddr) -> Result<()> {
        self.advance_generation()?;
        let endpoint = Endpoint::host().with_frontends().with_all_flow_hints();
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    pub fn remove_endpoint(&mut self, addr: IpAddr) -> Result<()> {
        self.advance_generation()?;
        let ifindex = self.hash::<Addr, Endpoint>(map::ENDPOINTS)?.get(&addr.into(), 0)?.ifindex;
        self.set_pod_source(PodSource { addr: addr.into(), ifindex: 0 }, ifindex)?;
        Ok(self.hash::<Addr, Endpoint>(map::ENDPOINTS)?.remove(&Addr::from(addr))?)
    }

    /// Whether the flow hints of `addr` have `protocol`.
    pub fn may_have_flow(&mut self, addr: IpAddr, protocol: u8) -> Result<bool> {
        Ok(self
            .hash::<Addr, Endpoint>(map::ENDPOINTS)?
            .get(&addr.into(), 0)?
            .flow_hints
            .may_have_flow(protocol))
    }

    /// The length of `prefix` is that of its own family.
    pub fn route(
        &mut self,
        prefix: (IpAddr, u32),
        kind: RouteKind,
        next_hop: Option<IpAddr>,
        mtu: u32,
    ) -> Result<()> {
        self.advance_generation()?;
        let bits = if prefix.0.is_ipv4() { prefix.1 + Addr::V4_PREFIX_BITS } else { prefix.1 };
        let ifindex = if kind == RouteKind::Overlay { 5 } else { self.ifindex };
        let route = Route {
            next_hop: next_hop.map_or(Addr::UNSPECIFIED, Addr::from),
            ifindex,
            kind: kind as u32,
            mtu,
            ..Route::default()
        };
        let mut routes: LpmTrie<&mut MapData, Addr, Route> =
            LpmTrie::try_from(self.ebpf.map_mut(map::ROUTES).context("ROUTES")?)?;
        Ok(routes.insert(&Key::new(bits, prefix.0.into()), route, 0)?)
    }

    /// A host address with node ports.
    pub fn host_with_node_ports(&mut self, addr: IpAddr) -> Result<()> {
        self.advance_generation()?;
        let endpoint = Endpoint::host().with_node_ports().with_all_flow_hints();
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    /// Adds a source range to the service with this ID.
    pub fn allow_source_range(&mut self, service_id: u32, range: (IpAddr, u32)) -> Result<()> {
        let bits = if range.0.is_ipv4() { range.1 + Addr::V4_PREFIX_BITS } else { range.1 };
        let key = Key::new(32 + bits, SourceRange { service_id, addr: range.0.into() });
        let mut ranges: LpmTrie<&mut MapData, SourceRange, u32> =
            LpmTrie::try_from(self.ebpf.map_mut(map::SOURCE_RANGES).context("SOURCE_RANGES")?)?;
        Ok(ranges.insert(&key, 1, 0)?)
    }

    /// Allows packets from the pod's device to have a source in the range.
    pub fn allow_source(&mut self, ifindex: u32, range: (IpAddr, u32)) -> Result<()> {
        self.advance_generation()?;
        let bits = if range.0.is_ipv4() { range.1 + Addr::V4_PREFIX_BITS } else { range.1 };
        let key = Key::new(32 + bits, AllowedSource { ifindex, addr: range.0.into() });
        let mut sources: LpmTrie<&mut MapData, AllowedSource, u32> =
            LpmTrie::try_from(self.ebpf.map_mut(map::ALLOWED_SOURCES).context("ALLOWED_SOURCES")?)?;
        Ok(sources.insert(&key, 1, 0)?)
    }

    /// A service whose backends have the slots from `first_slot` on, with the slot as ID.
    pub fn service(
        &mut self,
        frontend: SocketAddr,
        protocol: u8,
        first_slot: u32,
        backends: &[SocketAddr],
        flags: u32,
    ) -> Result<()> {
        self.service_with(frontend, protocol, first_slot, backends, |_, service| service.flags = flags)
    }

    /// As [`Self::service`], with changes to its row.
    pub fn service_with(
        &mut self,
        frontend: SocketAddr,
        protocol: u8,
        first_slot: u32,
        backends: &[SocketAddr],
        change: impl FnOnce(&mut ServiceKey, &mut Service),
    ) -> Result<()> {
        for (slot, backend) in (first_slot..).zip(backends) {
            let generation = self.array::<u32>(map::BACKEND_GENERATIONS)?.get(&slot, 0)?;
            let entry = BackendSlot {
                addr: backend.ip().into(),
                id: slot,
                generation,
                port: Port::new(backend.port()),
                reserved: 0,
            };
            self.array(map::BACKENDS)?.set(slot, entry, 0)?;
        }
        let mut key = frontend_key(frontend, protocol);
        let mut service = Service {
            id: first_slot + 1,
            first_slot,
            count: backends.len() as u32,
            affinity_timeout: 0,
            generation: 1,
            flags: 0,
            checksum: 0,
        };
        change(&mut key, &mut service);
        self.set_port(key.protocol, key.port)?;
        Ok(self.hash(map::SERVICES)?.insert(key, service.with_checksum(&key), 0)?)
    }

    /// Says that a frontend has this port, as the agent does before it writes the row.
    fn set_port(&mut self, protocol: u8, port: Port) -> Result<()> {
        let Some(place) = PortSet::place(protocol, port) else { return Ok(()) };
        let mut ports = self.array::<[u8; PortSet::CHUNK]>(map::SERVICE_PORTS)?;
        let mut chunk = ports.get(&place.chunk, 0)?;
        chunk[place.byte] = 1;
        Ok(ports.set(place.chunk, chunk, 0)?)
    }

    /// As if no frontend had a port.
    pub fn forget_ports(&mut self) -> Result<()> {
        let mut ports = self.array::<[u8; PortSet::CHUNK]>(map::SERVICE_PORTS)?;
        for chunk in 0..PortSet::PREPARED {
            ports.set(chunk, [0; PortSet::CHUNK], 0)?;
        }
        Ok(())
    }

    /// Reads the row of a frontend.
    pub fn service_row(&mut self, frontend: SocketAddr, protocol: u8) -> Result<Service> {
        Ok(self.hash(map::SERVICES)?.get(&frontend_key(frontend, protocol), 0)?)
    }

    /// Writes the row of a frontend with its checksum unchanged.
    pub fn put_service_row(&mut self, frontend: SocketAddr, protocol: u8, row: Service) -> Result<()> {
        Ok(self.hash(map::SERVICES)?.insert(frontend_key(frontend, protocol), row, 0)?)
    }

    /// Marks the address as a cluster IP.
    pub fn cluster_ip(&mut self, addr: IpAddr) -> Result<()> {
        let key = ServiceKey::of_address(addr.into());
        Ok(self.hash(map::SERVICES)?.insert(key, Service::default().with_checksum(&key), 0)?)
    }

    /// Marks the address as a cluster IP with a ready backend.
    pub fn ready_cluster_ip(&mut self, addr: IpAddr) -> Result<()> {
        self.ready_row(ServiceKey::of_address(addr.into()))
    }

    /// Marks the address as an external IP or load balancer address with a ready backend.
    pub fn ready_external_ip(&mut self, addr: IpAddr) -> Result<()> {
        self.ready_row(ServiceKey::of_ping(addr.into()))
    }

    fn ready_row(&mut self, key: ServiceKey) -> Result<()> {
        let row = Service { flags: ServiceFlags::READY, ..Service::default() };
        Ok(self.hash(map::SERVICES)?.insert(key, row.with_checksum(&key), 0)?)
    }

    /// Makes flows to the backend stale, as the agent does when it deletes the backend.
    pub fn raise_generation(&mut self, backend: u32) -> Result<()> {
        let mut generations = self.array::<u32>(map::BACKEND_GENERATIONS)?;
        let generation = generations.get(&backend, 0)?;
        Ok(generations.set(backend, generation + 1, 0)?)
    }
}

fn frontend_key(frontend: SocketAddr, protocol: u8) -> ServiceKey {
    ServiceKey {
        addr: frontend.ip().into(),
        port: Port::new(frontend.port()),
        protocol,
        scope: Scope::Any as u8,
    }
}
