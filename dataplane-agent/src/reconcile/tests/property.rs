//! Property: after any sequence of events, faults and restarts, the tables are as a new agent would
//! fill them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;

use super::{
    Capacities, Fixture,
    check::{content, expected, serving_udp},
    name, network, node, pod, removed, service, service_removed, slice, upsert,
};
use crate::{
    datapath::table::Table,
    state::{LoadBalancing, ObjectKey, SourceEvent, TrafficPolicy},
};

/// Cluster IPs; several Services may have one.
const IPS: [&str; 5] = ["10.96.0.1", "10.96.0.2", "fd96::1", "10.96.0.3", "fd96::2"];

#[derive(Clone, Debug)]
enum Step {
    Service {
        which: usize,
        ips: Vec<usize>,
        maglev: bool,
        affinity: Option<u32>,
        /// `externalTrafficPolicy`, if the Service has an external IP.
        external: Option<TrafficPolicy>,
    },
    ServiceRemoved(usize),
    Slice {
        which: usize,
        backends: BTreeSet<u8>,
    },
    Node {
        which: usize,
        near: bool,
        cidr: usize,
    },
    NodeRemoved(usize),
    Pod {
        which: usize,
        ifindex: u32,
    },
    PodRemoved(usize),
    Host(BTreeSet<u8>),
    /// Indexes of the writes that fail, from here.
    Faults(BTreeSet<u64>),
    Advance(u64),
    Work,
    /// The agent crashes after this many writes.
    Crash(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let external =
        prop_oneof![Just(None), Just(Some(TrafficPolicy::Cluster)), Just(Some(TrafficPolicy::Local))];
    let service = (0..4_usize, proptest::collection::vec(0..IPS.len(), 1..3), 0..12_u8, 0..3_u32, external);
    prop_oneof![
        3 => service.prop_map(|(which, ips, maglev, affinity, external)| Step::Service {
            which,
            ips,
            maglev: maglev == 0,
            affinity: (affinity > 0).then_some(affinity),
            external,
        }),
        2 => (0..4_usize).prop_map(Step::ServiceRemoved),
        6 => (0..4_usize, proptest::collection::btree_set(2..9_u8, 0..6))
            .prop_map(|(which, backends)| Step::Slice { which, backends }),
        1 => (0..3_usize, any::<bool>(), 0..4_usize).prop_map(|(which, near, cidr)| Step::Node { which, near, cidr }),
        1 => (0..3_usize).prop_map(Step::NodeRemoved),
        1 => (0..3_usize, 10..13_u32).prop_map(|(which, ifindex)| Step::Pod { which, ifindex }),
        1 => (0..3_usize).prop_map(Step::PodRemoved),
        1 => proptest::collection::btree_set(1..4_u8, 0..3).prop_map(Step::Host),
        1 => proptest::collection::btree_set(0..20_u64, 1..6).prop_map(Step::Faults),
        3 => (0..1_500_u64).prop_map(Step::Advance),
        6 => Just(Step::Work),
        1 => (0..30_u64).prop_map(Step::Crash),
    ]
}

/// Inputs of the reconciler other than the state.
#[derive(Clone, Debug, Default)]
struct Inputs {
    pods: BTreeMap<usize, u32>,
    host: BTreeSet<u8>,
}

impl Inputs {
    fn apply(&self, fixture: &mut Fixture) {
        fixture.reconciler.set_network(network(), &fixture.store);
        set_host(fixture, &self.host);
        for (which, ifindex) in &self.pods {
            // an error is repaired later
            let _repaired =
                fixture.reconciler.upsert_pod(&which.to_string(), &pod_of(*which, *ifindex), fixture.now);
        }
        fixture.reconciler.pods_loaded();
        fixture.replay();
    }
}

fn set_host(fixture: &mut Fixture, addresses: &BTreeSet<u8>) {
    let addresses = addresses.iter().map(|last| [192, 168, 1, *last].into());
    fixture.reconciler.set_host_addresses(addresses, &fixture.store, fixture.now);
}

fn pod_of(which: usize, ifindex: u32) -> crate::reconcile::LocalPod {
    pod(&format!("pod-{which}"), &format!("10.1.0.{}", which + 2), ifindex)
}

fn service_name(which: usize) -> String {
    format!("service-{which}")
}

fn backends(backends: &BTreeSet<u8>) -> impl Iterator<Item = String> {
    let both = |last: &u8| [format!("10.1.0.{last}"), format!("fd01::{last}")];
    backends.iter().flat_map(both).collect::<Vec<_>>().into_iter()
}

fn run_step(fixture: &mut Fixture, inputs: &mut Inputs, step: &Step) {
    match step {
        Step::Service { which, ips, maglev, affinity, external } => {
            let ips: Vec<_> = ips.iter().map(|ip| IPS[*ip]).collect();
            let mut desired = service(&service_name(*which), &ips);
            desired.affinity_timeout = *affinity;
            if let Some(policy) = external {
                desired.external_ips = vec![[192, 0, 2, *which as u8].into()];
                desired.external_policy = *policy;
            }
            if *maglev {
                desired.load_balancing = Some(LoadBalancing::Maglev);
            }
            fixture.apply([upsert(desired)]);
        }
        Step::ServiceRemoved(which) => fixture.apply([service_removed(&service_name(*which))]),
        Step::Slice { which, backends: ready } => {
            let mut slice = slice(&service_name(*which), backends(ready));
            for (index, endpoint) in slice.endpoints.iter_mut().enumerate() {
                endpoint.node_name = (index % 3 == 0).then(|| "a".into());
            }
            fixture.apply([upsert(slice)]);
        }
        Step::Node { which, near, cidr } => {
            let ip = format!("192.168.{}.{}", if *near { 1 } else { 2 }, which + 10);
            let cidr = format!("10.1.{}.0/24", cidr + 1);
            fixture.apply([upsert(node(&format!("node-{which}"), &[&ip], &[&cidr]))]);
        }
        Step::NodeRemoved(which) => fixture.apply([removed(ObjectKey::Node(format!("node-{which}")))]),
        Step::Pod { which, ifindex } => {
            inputs.pods.insert(*which, *ifindex);
            let _repaired =
                fixture.reconciler.upsert_pod(&which.to_string(), &pod_of(*which, *ifindex), fixture.now);
        }
        Step::PodRemoved(which) => {
            inputs.pods.remove(which);
            let _repaired = fixture.reconciler.remove_pod(&which.to_string(), fixture.now);
        }
        Step::Host(addresses) => {
            inputs.host.clone_from(addresses);
            set_host(fixture, addresses);
        }
        Step::Faults(calls) => fixture.faults.fail(calls.iter().copied()),
        Step::Advance(millis) => fixture.advance(Duration::from_millis(*millis)),
        Step::Work => {
            fixture.work();
        }
        Step::Crash(writes) => {
            fixture.faults.fail_after(*writes);
            fixture.work();
            fixture.restart();
            inputs.apply(fixture);
        }
    }
}

fn start(capacities: Capacities) -> (Fixture, Inputs) {
    let mut fixture = Fixture::new(capacities);
    let inputs = Inputs::default();
    fixture.apply([upsert(node("a", &["192.168.1.1"], &["10.1.0.0/24"])), SourceEvent::Synced]);
    inputs.apply(&mut fixture);
    (fixture, inputs)
}

/// The rows match the state, and every allocated backend ID is used by a frontend or belongs to a
/// serving UDP backend. Returns the number of the latter.
fn assert_services(fixture: &Fixture) -> u64 {
    let expected = expected(&fixture.store);
    let rows = fixture.services.entries().unwrap();
    let keys: BTreeSet<_> = rows.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, expected.keys().copied().collect());
    let mut used = BTreeSet::new();
    let mut ids = BTreeMap::new();
    for (key, row) in rows {
        let slots: Vec<_> = (row.first_slot..row.first_slot + row.count)
            .map(|index| fixture.backends.get(&index).unwrap().unwrap())
            .collect();
        assert!(expected[&key].contains(&content(&row, &slots)), "{key:?}");
        used.extend(slots.iter().map(|slot| slot.id));
        for slot in slots {
            let backend = (row.id, slot.addr, slot.port);
            assert_eq!(*ids.entry(slot.id).or_insert(backend), backend, "one ID for two backends");
        }
    }
    let allocated =
        fixture.generations.entries().unwrap().into_iter().filter(|(_, generation)| generation % 2 == 1);
    let allocated: BTreeSet<_> = allocated.map(|(id, _)| id).collect();
    assert!(used.is_subset(&allocated), "{used:?} of {allocated:?}");
    let with_frontend: BTreeSet<_> = used.iter().map(|id| ids[id]).collect();
    let serving = serving_udp(&fixture.store).into_iter();
    let serving = serving.map(|(port, addr, number)| (fixture.reconciler.services.id(&port), addr, number));
    let serving_only = serving
        .filter(|(id, addr, port)| id.is_none_or(|id| !with_frontend.contains(&(id, *addr, *port))))
        .count();
    let kept = allocated.len() - used.len();
    assert!(kept <= serving_only, "{used:?} of {allocated:?}, at most {serving_only} more");
    kept as u64
}

/// The tables match those of a new agent that only saw the final state.
fn assert_as_fresh(fixture: &Fixture, inputs: &Inputs) {
    let mut fresh = Fixture::new(super::LARGE);
    fresh.store = fixture.store.clone();
    inputs.apply(&mut fresh);
    fresh.settle();
    let routes = |fixture: &Fixture| -> Vec<_> {
        let entries = fixture.routes.entries().unwrap().into_iter();
        entries.map(|(prefix, route)| (prefix, route.without_flow_hints())).collect()
    };
    assert_eq!(routes(fixture), routes(&fresh));
    assert_eq!(fixture.kernel_routes, fresh.kernel_routes);
    let endpoints = |fixture: &Fixture| -> Vec<_> {
        let entries = fixture.endpoints.entries().unwrap().into_iter();
        entries.map(|(addr, endpoint)| (addr, endpoint.without_flow_hints())).collect()
    };
    assert_eq!(endpoints(fixture), endpoints(&fresh));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn tables_converge_and_readers_never_see_invalid_state(steps in proptest::collection::vec(step(), 1..60)) {
        let (mut fixture, mut inputs) = start(Capacities { frontends: 64, slots: 32_768, backends: 128, ..super::LARGE });
        for step in &steps {
            run_step(&mut fixture, &mut inputs, step);
        }
        fixture.faults.clear();
        fixture.settle();
        let kept = assert_services(&fixture);
        assert_as_fresh(&fixture, &inputs);

        // a new agent writes nothing, except that it cannot know the first owner of a contested
        // frontend, or the backends of IDs without frontend
        let writes = fixture.writes();
        fixture.restart();
        inputs.apply(&mut fixture);
        fixture.settle();
        let conflict = expected(&fixture.store).values().any(|contents| contents.len() > 1);
        prop_assert!(conflict || fixture.writes() == writes + kept, "{} writes", fixture.writes() - writes);
    }

    /// With full tables, existing rows stay correct, and missing ones are written once there is
    /// space.
    #[test]
    fn readers_never_see_invalid_state_in_full_tables(steps in proptest::collection::vec(step(), 1..60)) {
        let (mut fixture, mut inputs) = start(Capacities { frontends: 6, slots: 24, backends: 12, ..super::LARGE });
        for step in &steps {
            run_step(&mut fixture, &mut inputs, step);
        }
        fixture.faults.clear();
        let services = (0..4).map(|which| service_removed(&service_name(which)));
        let slices = (0..4).map(|which| removed(ObjectKey::EndpointSlice(name(&service_name(which)))));
        fixture.apply(services.chain(slices).collect::<Vec<_>>());
        fixture.settle();
        fixture.apply([
            upsert(service("last", &["10.96.0.1"])),
            upsert(slice("last", backends(&BTreeSet::from([2, 3])))),
        ]);
        fixture.settle();
        let _kept = assert_services(&fixture);
    }
}
