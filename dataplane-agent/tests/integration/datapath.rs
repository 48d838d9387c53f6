//! Tests of the embedded object on the kernel: load, attach, adopt, replace, clean up.

mod attachments;
mod memory;
mod packets;
mod ports;
mod reuse;

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::maps::MapInfo;
use dataplane_agent::datapath::{
    Capacity, Datapath, DatapathConfig, EbpfLog, LoadError, Pins, TcHooks, XdpUse, cleanup, flows,
    table::{RoutePrefix, Table as _, TableError},
};
use dataplane_common::abi::{
    Addr, BackendSlot, Endpoint, Flow, FlowBlock, FlowKey, FlowRef, MacAddr, NodeConfig, NodeFlags, Port,
    Route, Service, ServiceKey, names,
};

use crate::netns::{in_fresh_netns, ip, run};

/// A bpffs directory and a cgroup for one test, removed at its end.
struct Node {
    directory: tempfile::TempDir,
    cgroup: Option<PathBuf>,
}

impl Node {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), cgroup: None }
    }

    fn bpffs(&self) -> PathBuf {
        self.directory.path().join("bpf")
    }

    fn config(&self) -> DatapathConfig {
        DatapathConfig {
            bpffs: self.bpffs(),
            node: NodeConfig { flags: NodeFlags::CONNECT_TCP, ..NodeConfig::default() },
            // small: creating a hundred thousand slots takes time
            capacity: Capacity {
                flows: 512,
                backends: 512,
                backend_generations: 512,
                services: 64,
                ..Capacity::default()
            },
            log: EbpfLog::Off,
            tc: TcHooks::Auto,
            xdp: XdpUse::Native,
        }
    }

    /// As [`Self::config`], with other programs.
    fn changed_config(&self) -> DatapathConfig {
        let config = self.config();
        let flags = config.node.flags | NodeFlags::CONNECT_UDP;
        DatapathConfig { node: NodeConfig { flags, ..config.node }, ..config }
    }

    /// A cgroup below the root one: sockets of other processes are never touched.
    fn cgroup(&mut self) -> PathBuf {
        let name = format!("dataplane-test-{}", std::process::id());
        let path = dataplane_agent::datapath::default_cgroup().unwrap().join(name);
        fs::create_dir_all(&path).unwrap();
        self.cgroup = Some(path.clone());
        path
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = cleanup(&self.bpffs()) {
            eprintln!("cleanup of {}: {error}", self.bpffs().display());
        }
        if let Some(cgroup) = &self.cgroup {
            // not empty only if the test itself failed inside it
            let _left = fs::remove_dir(cgroup);
        }
    }
}

fn veth(name: &str) {
    ip(&format!("link add {name} type veth peer name {name}-peer"));
    ip(&format!("link set {name} up"));
    ip(&format!("link set {name}-peer up"));
}

fn pinned(directory: &Path) -> BTreeSet<String> {
    let names =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

fn program_id(datapath: &Datapath, name: &str) -> u32 {
    datapath.programs().unwrap().iter().find(|program| program.name == name).unwrap().id
}

#[test]
fn every_program_passes_the_verifier() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let datapath = Datapath::load(&node.config()).unwrap();
        assert_eq!(datapath.problems(), [] as [String; 0]);
        let programs = datapath.programs().unwrap();
        assert_eq!(programs.len(), names::program::DEVICE.len() + names::program::SOCKET.len());
        for program in programs {
            println!("{:>14}: {:?} instructions verified", program.name, program.verified_instructions);
        }
        let maps = pinned(
            &node.bpffs().join("dataplane").join(format!("v{}", dataplane_common::ABI_VERSION)).join("maps"),
        );
        assert_eq!(maps, names::map::PINNED.iter().map(|name| (*name).to_owned()).collect());
    });
}

#[test]
fn pinned_maps_outlive_the_agent() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let pod = "10.244.0.7".parse::<IpAddr>().unwrap().into();
        let endpoint = Endpoint::pod(7, MacAddr::new([2, 0, 0, 0, 0, 7]));
        {
            let datapath = Datapath::load(&node.config()).unwrap();
            datapath.tables().unwrap().endpoints.insert(&pod, &endpoint).unwrap();
        }
        let datapath = Datapath::load(&node.config()).unwrap();
        assert_eq!(datapath.tables().unwrap().endpoints.entries().unwrap(), [(pod, endpoint)]);
    });
}

#[test]
fn maps_implement_the_table_trait() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let mut config = node.config();
        config.capacity.services = 2;
        config.capacity.routes = 2;
        let mut tables = Datapath::load(&config).unwrap().tables().unwrap();

        let key = |port| ServiceKey { port: Port::new(port), protocol: 6, ..ServiceKey::default() };
        let service = Service { id: 3, ..Service::default() };
        tables.services.insert(&key(1), &Service::default()).unwrap();
        tables.services.insert(&key(1), &service).unwrap();
        tables.services.insert(&key(2), &service).unwrap();
        assert_eq!(tables.services.get(&key(1)).unwrap(), Some(service));
        assert!(matches!(
            tables.services.insert(&key(3), &service),
            Err(TableError::Full { capacity: 2, .. })
        ));
        tables.services.insert(&key(2), &service).expect("a row of a full table can be replaced");
        tables.services.remove(&key(2)).unwrap();
        tables.services.remove(&key(2)).unwrap();
        assert_eq!(tables.services.entries().unwrap(), [(key(1), service)]);

        let prefix =
            |bits: u32| RoutePrefix { addr: "10.1.0.0".parse::<IpAddr>().unwrap().into(), bits: 96 + bits };
        let route = Route { kind: 4, ..Route::default() };
        tables.routes.insert(&prefix(16), &route).unwrap();
        assert_eq!(tables.routes.get(&prefix(24)).unwrap(), None);
        assert_eq!(tables.routes.get(&prefix(16)).unwrap(), Some(route));
        assert_eq!(tables.routes.lookup("10.1.9.9".parse::<IpAddr>().unwrap().into()).unwrap(), Some(route));
        assert_eq!(tables.routes.lookup("10.2.9.9".parse::<IpAddr>().unwrap().into()).unwrap(), None);
        tables.routes.insert(&prefix(24), &route).unwrap();
        assert!(matches!(
            tables.routes.insert(&prefix(25), &route),
            Err(TableError::Full { capacity: 2, .. })
        ));
        tables.routes.remove(&prefix(24)).unwrap();
        tables.routes.remove(&prefix(24)).unwrap();
        assert_eq!(tables.routes.entries().unwrap(), [(prefix(16), route)]);

        let slot = BackendSlot { id: 9, ..BackendSlot::default() };
        tables.backends.insert(&511, &slot).unwrap();
        assert_eq!(tables.backends.get(&511).unwrap(), Some(slot));
        assert_eq!(tables.backends.get(&512).unwrap(), None);
        assert!(matches!(tables.backends.insert(&512, &slot), Err(TableError::Full { capacity: 512, .. })));
        tables.backends.remove(&511).unwrap();
        assert_eq!(tables.backends.get(&511).unwrap(), Some(BackendSlot::default()));
        assert_eq!(tables.backends.entries().unwrap().len(), 512);
        assert_eq!(flows(&tables).unwrap(), []);
    });
}

/// The IDs of the pinned maps.
fn map_ids(node: &Node, names: impl Iterator<Item = &'static str>) -> Vec<(&'static str, u32)> {
    let id = |name| MapInfo::from_pin(Pins::new(&node.bpffs()).map(name)).unwrap().id();
    names.map(|name| (name, id(name))).collect()
}

#[test]
fn tables_of_an_earlier_version_are_taken_over() {
    in_fresh_netns(|| async {
        let (version, new) = names::map::TAKEN_OVER[0];
        let unchanged = || names::map::PINNED.into_iter().filter(|name| !new.contains(name));
        let node = Node::new();
        drop(Datapath::load(&node.config()).unwrap());
        let before = map_ids(&node, unchanged());
        // what an agent of that version leaves
        for name in new {
            Pins::remove(&Pins::new(&node.bpffs()).map(name)).unwrap();
        }
        let directory = node.bpffs().join("dataplane");
        let own = directory.join(format!("v{}", dataplane_common::ABI_VERSION));
        fs::rename(own, directory.join(format!("v{version}"))).unwrap();

        let mut config = node.config();
        config.capacity.flows = 2_048;
        let datapath = Datapath::load(&config).unwrap();
        assert_eq!(map_ids(&node, unchanged()), before);
        let blocks = MapInfo::from_pin(datapath.pins().map(names::map::FLOW_BLOCKS)).unwrap();
        assert_eq!(blocks.max_entries(), FlowBlock::count(512), "for the flows that there are");
        assert!(datapath.problems()[0].contains("FLOWS"), "{:?}", datapath.problems());
    });
}

#[test]
fn pinned_map_with_another_capacity_is_kept_and_reported() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let mut config = node.config();
        let key = ServiceKey { protocol: 6, ..ServiceKey::default() };
        Datapath::load(&config)
            .unwrap()
            .tables()
            .unwrap()
            .services
            .insert(&key, &Service::default())
            .unwrap();
        config.capacity.services = 128;
        config.capacity.flows = 1_024;
        let datapath = Datapath::load(&config).unwrap();
        let problems = datapath.problems().join("\n");
        assert!(problems.contains("SERVICES keeps its capacity of 64"), "{problems}");
        assert!(problems.contains("FLOWS keeps its capacity of 512"), "{problems}");
        assert_eq!(datapath.problems().len(), 2, "{problems}");
        let tables = datapath.tables().unwrap();
        assert_eq!(tables.services.capacity(), 64);
        assert_eq!(tables.services.entries().unwrap().len(), 1);
    });
}

#[test]
fn pinned_map_with_another_layout_is_refused() {
    in_fresh_netns(|| async {
        let node = Node::new();
        Datapath::load(&node.config()).unwrap();
        let pins = Pins::new(&node.bpffs());
        Pins::remove(&pins.map(names::map::SERVICES)).unwrap();
        fs::rename(pins.map(names::map::ENDPOINTS), pins.map(names::map::SERVICES)).unwrap();
        let error = Datapath::load(&node.config()).unwrap_err();
        assert!(matches!(&error, LoadError::Open(open) if open.map == "SERVICES"), "{error}");
    });
}

#[test]
fn rejected_program_is_named_and_old_programs_stay_attached() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        let clsact = DatapathConfig { tc: TcHooks::Clsact, ..node.config() };
        let mut datapath = Datapath::load(&clsact).unwrap();
        datapath.attach_pod("dp1").unwrap();
        let before = run("tc", "filter show dev dp1 ingress");
        // a value of four bytes where the programs add to eight
        let pins = datapath.pins().clone();
        Pins::remove(&pins.map(names::map::COUNTERS)).unwrap();
        let narrow = aya::maps::MapData::from_pin(pins.map(names::map::BACKEND_GENERATIONS)).unwrap();
        narrow.pin(pins.map(names::map::COUNTERS)).unwrap();
        drop(datapath);
        let error = Datapath::load(&clsact).unwrap_err();
        let LoadError::Program { program, reason } = &error else { panic!("{error}") };
        assert_eq!(*program, names::program::CLASSIFIERS[0]);
        // the second is the message of Linux 7.3
        let why = ["invalid access to map value", "access_size is 8; object_size is 4"];
        assert!(why.iter().any(|why| reason.contains(why)), "{reason}");
        assert!(reason.len() < 2_000, "{reason}");
        assert_eq!(run("tc", "filter show dev dp1 ingress"), before);
    });
}

#[test]
fn expired_flows_are_not_listed() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let mut tables = Datapath::load(&node.config()).unwrap().tables().unwrap();
        let address = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let key =
            |port| FlowKey::new(6, address("10.0.0.1"), Port::new(port), address("10.96.0.1"), Port::new(80));
        let answer =
            |port| FlowKey::new(6, address("10.0.1.7"), Port::new(80), address("10.0.0.1"), Port::new(port));
        let mut flow = |slot: u32, port, epoch, index_epoch, last_seen| {
            let flow = Flow {
                forward: key(port),
                reply: answer(port),
                epoch,
                last_seen,
                state: 2,
                ..Flow::default()
            };
            tables.flows.insert(&slot, &flow).unwrap();
            for key in [flow.forward, flow.reply] {
                tables.flow_index.insert(&key, &FlowRef { slot, epoch: index_epoch }).unwrap();
            }
        };
        // current; reused for another flow; being written
        flow(1, 1_001, 2, 2, u32::MAX);
        flow(2, 1_002, 4, 2, u32::MAX);
        flow(3, 1_003, 3, 3, u32::MAX);
        let rows = flows(&tables).unwrap();
        assert_eq!(rows.iter().map(|row| (row.slot, row.source.port)).collect::<Vec<_>>(), [(1, 1_001)]);
    });
}
