//! What one change costs, in writes: as much in a large cluster as in a small one. Over plain tables of the capacities an
//! agent has by default; what must hold after each single write is looked at elsewhere.

use std::net::Ipv4Addr;

use dataplane_common::abi::names::capacity;

use super::*;

/// Of each service.
const ENDPOINTS: u32 = 10;

struct Cluster {
    store: Store,
    agent: Reconciler,
    now: Instant,
}

impl Cluster {
    /// All of it is in the tables.
    fn of(services: u32) -> Self {
        let (kernel, _) = mpsc::unbounded_channel();
        let tables = ReconcileTables {
            endpoints: Box::new(MemoryTable::<Addr, Endpoint>::hash("ENDPOINTS", capacity::ENDPOINTS)),
            routes: Box::new(MemoryTable::<RoutePrefix, Route>::hash("ROUTES", capacity::ROUTES)),
            services: Box::new(MemoryTable::<ServiceKey, Service>::hash("SERVICES", capacity::SERVICES)),
            backends: Box::new(MemoryTable::<u32, BackendSlot>::array("BACKENDS", capacity::BACKENDS)),
            backend_generations: Box::new(MemoryTable::<u32, u32>::array(
                "BACKEND_GENERATIONS",
                capacity::BACKEND_GENERATIONS,
            )),
            source_ranges: Box::new(MemoryTable::<SourcePrefix, u32>::hash("SOURCE_RANGES", 1)),
        };
        let agent = Reconciler::new(tables, kernel);
        let mut cluster = Self { store: Store::default(), agent, now: Instant::now() };
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
            self.agent.changed(&self.store, &changes);
        }
        while let Some(due) = self.agent.work(self.now) {
            self.now = self.now.max(due);
        }
        assert!(self.agent.is_settled(), "{:#?}", self.agent.problems());
    }

    /// What a change of the slice in the middle of the cluster costs: writes and removals by table, those without any left
    /// out.
    fn cost_of(&mut self, change: impl FnOnce(&mut EndpointSlice)) -> Vec<(String, u64)> {
        let written =
            |agent: &Reconciler| agent.tables().into_iter().map(|it| (it.name, it.writes + it.removals));
        let before: Vec<_> = written(&self.agent).collect();
        let middle = name(&name_of(self.store.services().count() as u32 / 2));
        let mut slice = self.store.slices_of(&middle).next().expect("its slice").clone();
        change(&mut slice);
        self.apply([upsert(slice)]);
        let costs = written(&self.agent).zip(before).map(|((table, now), (_, before))| (table, now - before));
        costs.filter(|(_, cost)| *cost > 0).collect()
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

/// A number for who is new, a range of the service's endpoints, its row, and the number of who is gone: whatever else is in
/// the cluster.
#[test]
fn a_change_of_one_endpoint_costs_as_much_among_a_hundred_as_among_a_hundred_thousand() {
    for services in [10, 10_000] {
        let mut cluster = Cluster::of(services);
        let costs = |costs: &[(&str, u64)]| -> Vec<_> {
            costs.iter().map(|(table, cost)| ((*table).to_owned(), *cost)).collect()
        };
        let another = cluster.cost_of(|slice| slice.endpoints[3].address = address([12, 0], 1).into());
        assert_eq!(
            another,
            costs(&[("SERVICES", 1), ("BACKENDS", 10), ("BACKEND_GENERATIONS", 2)]),
            "{services}"
        );
        let gone = cluster.cost_of(|slice| drop(slice.endpoints.remove(3)));
        assert_eq!(
            gone,
            costs(&[("SERVICES", 1), ("BACKENDS", 9), ("BACKEND_GENERATIONS", 1)]),
            "{services}"
        );
        let back = cluster.cost_of(|slice| {
            let address = address([12, 0], 1).into();
            slice.endpoints.push(StateEndpoint { address, ..slice.endpoints[0].clone() });
        });
        assert_eq!(
            back,
            costs(&[("SERVICES", 1), ("BACKENDS", 10), ("BACKEND_GENERATIONS", 1)]),
            "{services}"
        );
        let unready = cluster.cost_of(|slice| slice.endpoints[0].ready = false);
        assert_eq!(
            unready,
            costs(&[("SERVICES", 1), ("BACKENDS", 9), ("BACKEND_GENERATIONS", 1)]),
            "{services}"
        );
        let moved = cluster.cost_of(|slice| slice.endpoints[1].node_name = Some("elsewhere".into()));
        assert_eq!(moved, costs(&[]), "{services}");
    }
}
