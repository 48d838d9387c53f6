//! The number of writes per change is independent of the cluster size. Uses plain tables with
//! default capacities; invariants of single writes are tested elsewhere.

use std::net::Ipv4Addr;

use super::*;

/// Endpoints per Service.
const ENDPOINTS: u32 = 10;

struct Cluster {
    store: Store,
    reconciler: Reconciler,
    now: Instant,
}

impl Cluster {
    /// A cluster of this size, written to the tables.
    fn of(services: u32) -> Self {
        let (kernel, _) = mpsc::unbounded_channel();
        let tables = ReconcileTables {
            endpoints: Box::new(MemoryTable::<Addr, Endpoint>::hash("ENDPOINTS", capacity::ENDPOINTS)),
            pod_sources: Box::new(MemoryTable::<u32, PodSource>::array("POD_SOURCES", capacity::POD_SOURCES)),
            routes: Box::new(MemoryTable::<RoutePrefix, Route>::hash("ROUTES", capacity::ROUTES)),
            services: Box::new(MemoryTable::<ServiceKey, Service>::hash("SERVICES", capacity::SERVICES)),
            backends: Box::new(MemoryTable::<u32, BackendSlot>::array("BACKENDS", capacity::BACKENDS)),
            backend_generations: Box::new(MemoryTable::<u32, u32>::array(
                "BACKEND_GENERATIONS",
                capacity::BACKEND_GENERATIONS,
            )),
            source_ranges: Box::new(MemoryTable::<SourcePrefix, u32>::hash("SOURCE_RANGES", 1)),
        };
        let reconciler = Reconciler::new(tables, kernel);
        let mut cluster = Self { store: Store::default(), reconciler, now: Instant::now() };
        let objects = (0..services).flat_map(|number| {
            let mut service = service(&name_of(number), &[]);
            service.cluster_ips = vec![address([10, 96], 1 + number).into()];
            service.ports.truncate(1);
            [upsert(service), upsert(slice_of(number))]
        });
        cluster.apply(objects.chain([SourceEvent::Synced]));
        cluster
    }

    fn apply(&mut self, events: impl IntoIterator<Item = SourceEvent>) {
        for event in events {
            let changes = self.store.apply(event);
            self.reconciler.apply_changes(&self.store, &changes);
        }
        while let Some(due) = self.reconciler.work(self.now) {
            self.now = self.now.max(due);
        }
        assert!(self.reconciler.is_settled(), "{:#?}", self.reconciler.problems());
    }

    /// Writes and removals per table for a change of the slice in the middle of the cluster; tables
    /// without any are omitted.
    fn writes_of(&mut self, change: impl FnOnce(&mut EndpointSlice)) -> Vec<(String, u64)> {
        let written = |reconciler: &Reconciler| {
            reconciler.tables().into_iter().map(|it| (it.name, it.writes + it.removals))
        };
        let before: Vec<_> = written(&self.reconciler).collect();
        let middle = name(&name_of(self.store.services().count() as u32 / 2));
        let mut slice = self.store.slices_of(&middle).next().expect("its slice").clone();
        change(&mut slice);
        self.apply([upsert(slice)]);
        let writes =
            written(&self.reconciler).zip(before).map(|((table, now), (_, before))| (table, now - before));
        writes.filter(|(_, cost)| *cost > 0).collect()
    }
}

fn name_of(number: u32) -> String {
    format!("service-{number}")
}

fn slice_of(number: u32) -> EndpointSlice {
    let hosts = number * ENDPOINTS..(number + 1) * ENDPOINTS;
    let mut slice = slice(&name_of(number), hosts.map(|host| address([11, 0], host).to_string()));
    slice.ports.truncate(1);
    slice
}

fn address(network: [u8; 2], host: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::new(network[0], network[1], 0, 0)) + host).into()
}

/// An ID for the new backend, a range of the Service's endpoints, its row, and the ID of the
/// removed backend.
#[test]
fn endpoint_change_costs_same_writes_in_small_and_large_cluster() {
    for services in [10, 10_000] {
        let mut cluster = Cluster::of(services);
        let writes = |writes: &[(&str, u64)]| -> Vec<_> {
            writes.iter().map(|(table, cost)| ((*table).to_owned(), *cost)).collect()
        };
        let another = cluster.writes_of(|slice| slice.endpoints[3].address = address([12, 0], 1).into());
        assert_eq!(
            another,
            writes(&[("SERVICES", 1), ("BACKENDS", 10), ("BACKEND_GENERATIONS", 2)]),
            "{services}"
        );
        let removed = cluster.writes_of(|slice| drop(slice.endpoints.remove(3)));
        assert_eq!(
            removed,
            writes(&[("SERVICES", 1), ("BACKENDS", 9), ("BACKEND_GENERATIONS", 1)]),
            "{services}"
        );
        let back = cluster.writes_of(|slice| {
            let address = address([12, 0], 1).into();
            slice.endpoints.push(StateEndpoint { address, ..slice.endpoints[0].clone() });
        });
        assert_eq!(
            back,
            writes(&[("SERVICES", 1), ("BACKENDS", 10), ("BACKEND_GENERATIONS", 1)]),
            "{services}"
        );
        let unready = cluster.writes_of(|slice| slice.endpoints[0].ready = false);
        assert_eq!(
            unready,
            writes(&[("SERVICES", 1), ("BACKENDS", 9), ("BACKEND_GENERATIONS", 1)]),
            "{services}"
        );
        let moved = cluster.writes_of(|slice| slice.endpoints[1].node_name = Some("elsewhere".into()));
        assert_eq!(moved, writes(&[]), "{services}");
    }
}
