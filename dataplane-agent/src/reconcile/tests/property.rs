//! Whatever happens, in whatever order, and whenever the agent dies: the tables end as a fresh agent would fill them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;

use super::{
    Room, World,
    check::{expected, meaning, serving},
    gone, name, network, node, pod, service, service_gone, slice, upsert,
};
use crate::{
    datapath::table::Table,
    state::{LoadBalancing, ObjectKey, SourceEvent, TrafficPolicy},
};

/// Cluster IPs; several services may want one.
const IPS: [&str; 5] = ["10.96.0.1", "10.96.0.2", "fd96::1", "10.96.0.3", "fd96::2"];

#[derive(Clone, Debug)]
enum Step {
    Service {
        which: usize,
        ips: Vec<usize>,
        maglev: bool,
        affinity: Option<u32>,
        /// What clients from outside get, if they may ask.
        external: Option<TrafficPolicy>,
    },
    ServiceGone(usize),
    Slice {
        which: usize,
        backends: BTreeSet<u8>,
    },
    Node {
        which: usize,
        near: bool,
        cidr: usize,
    },
    NodeGone(usize),
    Pod {
        which: usize,
        ifindex: u32,
    },
    PodGone(usize),
    Host(BTreeSet<u8>),
    /// The writes that fail, counted from here.
    Faults(BTreeSet<u64>),
    Pass(u64),
    Work,
    /// The agent dies after so many writes.
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
        2 => (0..4_usize).prop_map(Step::ServiceGone),
        6 => (0..4_usize, proptest::collection::btree_set(2..9_u8, 0..6))
            .prop_map(|(which, backends)| Step::Slice { which, backends }),
        1 => (0..3_usize, any::<bool>(), 0..4_usize).prop_map(|(which, near, cidr)| Step::Node { which, near, cidr }),
        1 => (0..3_usize).prop_map(Step::NodeGone),
        1 => (0..3_usize, 10..13_u32).prop_map(|(which, ifindex)| Step::Pod { which, ifindex }),
        1 => (0..3_usize).prop_map(Step::PodGone),
        1 => proptest::collection::btree_set(1..4_u8, 0..3).prop_map(Step::Host),
        1 => proptest::collection::btree_set(0..20_u64, 1..6).prop_map(Step::Faults),
        3 => (0..1_500_u64).prop_map(Step::Pass),
        6 => Just(Step::Work),
        1 => (0..30_u64).prop_map(Step::Crash),
    ]
}

/// What is told to an agent besides the state.
#[derive(Clone, Debug, Default)]
struct Told {
    pods: BTreeMap<usize, u32>,
    host: BTreeSet<u8>,
}

impl Told {
    fn tell(&self, world: &mut World) {
        world.agent.set_network(network(), &world.store);
        tell_host(world, &self.host);
        for (which, ifindex) in &self.pods {
            // an error is repaired later
            let _repaired = world.agent.upsert_pod(&which.to_string(), &the_pod(*which, *ifindex), world.now);
        }
        world.agent.pods_loaded();
        world.replay();
    }
}

fn tell_host(world: &mut World, addresses: &BTreeSet<u8>) {
    let addresses = addresses.iter().map(|last| [192, 168, 1, *last].into());
    world.agent.set_host_addresses(addresses, &world.store, world.now);
}

fn the_pod(which: usize, ifindex: u32) -> crate::reconcile::LocalPod {
    pod(&format!("pod-{which}"), &format!("10.1.0.{}", which + 2), ifindex)
}

fn the_service(which: usize) -> String {
    format!("service-{which}")
}

fn backends(backends: &BTreeSet<u8>) -> impl Iterator<Item = String> {
    let both = |last: &u8| [format!("10.1.0.{last}"), format!("fd01::{last}")];
    backends.iter().flat_map(both).collect::<Vec<_>>().into_iter()
}

fn play(world: &mut World, told: &mut Told, step: &Step) {
    match step {
        Step::Service { which, ips, maglev, affinity, external } => {
            let ips: Vec<_> = ips.iter().map(|ip| IPS[*ip]).collect();
            let mut wanted = service(&the_service(*which), &ips);
            wanted.affinity_timeout = *affinity;
            if let Some(policy) = external {
                wanted.external_ips = vec![[192, 0, 2, *which as u8].into()];
                wanted.external_policy = *policy;
            }
            if *maglev {
                wanted.load_balancing = Some(LoadBalancing::Maglev);
            }
            world.apply([upsert(wanted)]);
        }
        Step::ServiceGone(which) => world.apply([service_gone(&the_service(*which))]),
        Step::Slice { which, backends: ready } => {
            let mut slice = slice(&the_service(*which), backends(ready));
            for (index, endpoint) in slice.endpoints.iter_mut().enumerate() {
                endpoint.node_name = (index % 3 == 0).then(|| "a".into());
            }
            world.apply([upsert(slice)]);
        }
        Step::Node { which, near, cidr } => {
            let ip = format!("192.168.{}.{}", if *near { 1 } else { 2 }, which + 10);
            let cidr = format!("10.1.{}.0/24", cidr + 1);
            world.apply([upsert(node(&format!("node-{which}"), &[&ip], &[&cidr]))]);
        }
        Step::NodeGone(which) => world.apply([gone(ObjectKey::Node(format!("node-{which}")))]),
        Step::Pod { which, ifindex } => {
            told.pods.insert(*which, *ifindex);
            let _repaired = world.agent.upsert_pod(&which.to_string(), &the_pod(*which, *ifindex), world.now);
        }
        Step::PodGone(which) => {
            told.pods.remove(which);
            let _repaired = world.agent.remove_pod(&which.to_string(), world.now);
        }
        Step::Host(addresses) => {
            told.host.clone_from(addresses);
            tell_host(world, addresses);
        }
        Step::Faults(calls) => world.faults.fail(calls.iter().copied()),
        Step::Pass(millis) => world.pass(Duration::from_millis(*millis)),
        Step::Work => {
            world.work();
        }
        Step::Crash(writes) => {
            world.faults.fail_after(*writes);
            world.work();
            world.restart();
            told.tell(world);
        }
    }
}

fn start(room: Room) -> (World, Told) {
    let mut world = World::new(room);
    let told = Told::default();
    world.apply([upsert(node("a", &["192.168.1.1"], &["10.1.0.0/24"])), SourceEvent::Synced]);
    told.tell(&mut world);
    (world, told)
}

/// The services say what the state says, and no backend has a number that is nobody's: it is behind a frontend, or serves
/// UDP and somebody may be talking to it. How many of the latter there are.
fn assert_services(world: &World) -> u64 {
    let expected = expected(&world.store);
    let rows = world.services.entries().unwrap();
    let keys: BTreeSet<_> = rows.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, expected.keys().copied().collect());
    let mut used = BTreeSet::new();
    let mut ids = BTreeMap::new();
    for (key, row) in rows {
        let slots: Vec<_> = (row.first_slot..row.first_slot + row.count)
            .map(|index| world.backends.get(&index).unwrap().unwrap())
            .collect();
        assert!(expected[&key].contains(&meaning(&row, &slots)), "{key:?}");
        used.extend(slots.iter().map(|slot| slot.id));
        for slot in slots {
            let backend = (slot.addr, slot.port, key.protocol);
            assert_eq!(*ids.entry(slot.id).or_insert(backend), backend, "two backends with one number");
        }
    }
    let numbered =
        world.generations.entries().unwrap().into_iter().filter(|(_, generation)| generation % 2 == 1);
    let numbered: BTreeSet<_> = numbered.map(|(id, _)| id).collect();
    assert!(used.is_subset(&numbered), "{used:?} of {numbered:?}");
    let behind: BTreeSet<_> = used.iter().map(|id| ids[id]).collect();
    let talking = serving(&world.store).difference(&behind).count();
    let kept = numbered.len() - used.len();
    assert!(kept <= talking, "{used:?} of {numbered:?}, {talking} may have more");
    kept as u64
}

/// Everything is as an agent that has seen nothing but the end would make it.
fn assert_as_fresh(world: &World, told: &Told) {
    let mut fresh = World::new(super::PLENTY);
    fresh.store = world.store.clone();
    told.tell(&mut fresh);
    fresh.settle();
    let routes = |world: &World| -> Vec<_> {
        let entries = world.routes.entries().unwrap().into_iter();
        entries.map(|(prefix, route)| (prefix, route.without_flow_hints())).collect()
    };
    assert_eq!(routes(world), routes(&fresh));
    assert_eq!(world.kernel_routes, fresh.kernel_routes);
    let endpoints = |world: &World| -> Vec<_> {
        let entries = world.endpoints.entries().unwrap().into_iter();
        entries.map(|(addr, endpoint)| (addr, endpoint.without_flow_hints())).collect()
    };
    assert_eq!(endpoints(world), endpoints(&fresh));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn it_always_converges_and_never_shows_a_reader_anything_wrong(steps in proptest::collection::vec(step(), 1..60)) {
        let (mut world, mut told) = start(Room { frontends: 64, slots: 32_768, backends: 128, ..super::PLENTY });
        for step in &steps {
            play(&mut world, &mut told, step);
        }
        world.faults.clear();
        world.settle();
        let kept = assert_services(&world);
        assert_as_fresh(&world, &told);

        // the next agent finds everything as it should be, but cannot know who had a contested frontend first, nor whose
        // the numbers are that stand behind no frontend
        let writes = world.writes();
        world.restart();
        told.tell(&mut world);
        world.settle();
        let conflict = expected(&world.store).values().any(|meanings| meanings.len() > 1);
        prop_assert!(conflict || world.writes() == writes + kept, "{} writes", world.writes() - writes);
    }

    /// With too little room not everything fits, but what is there is right, and once it fits it is made.
    #[test]
    fn full_tables_never_show_a_reader_anything_wrong(steps in proptest::collection::vec(step(), 1..60)) {
        let (mut world, mut told) = start(Room { frontends: 6, slots: 24, backends: 12, ..super::PLENTY });
        for step in &steps {
            play(&mut world, &mut told, step);
        }
        world.faults.clear();
        let services = (0..4).map(|which| service_gone(&the_service(which)));
        let slices = (0..4).map(|which| gone(ObjectKey::EndpointSlice(name(&the_service(which)))));
        world.apply(services.chain(slices).collect::<Vec<_>>());
        world.settle();
        world.apply([
            upsert(service("last", &["10.96.0.1"])),
            upsert(slice("last", backends(&BTreeSet::from([2, 3])))),
        ]);
        world.settle();
        let _kept = assert_services(&world);
    }
}
