//! Tests of the embedded object on the kernel: load, attach, adopt, replace, clean up.

mod netns;

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use dataplane_agent::datapath::{
    Attachment, Capacity, Counters, Datapath, DatapathConfig, EbpfLog, Events, LoadError, Pins, TcHooks,
    XdpState, XdpUse, cleanup, flows,
    table::{RoutePrefix, Table as _, TableError},
};
use dataplane_common::{
    abi::{
        Addr, BackendSlot, Endpoint, Flow, FlowKey, FlowRef, MacAddr, NodeConfig, NodeFlags, Port, Route,
        Scope, Service, ServiceKey, names,
    },
    reason::{Hook, Outcome, Verdict},
};
use netns::{in_fresh_netns, ip, run};
use tokio::time::timeout;

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

/// Whether the kernel has tcx (from 6.6). If not, a test that needs it is skipped.
fn has_tcx() -> bool {
    use aya::programs::{SchedClassifier, TcAttachType};
    let has = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok();
    if !has {
        eprintln!("SKIP: this kernel has no tcx");
    }
    has
}

/// IDs of the programs attached to a device by tcx.
fn running(device: &str, ingress: bool) -> Vec<u32> {
    use aya::programs::{SchedClassifier, TcAttachType};
    let direction = if ingress { TcAttachType::Ingress } else { TcAttachType::Egress };
    let (_, programs) = SchedClassifier::query_tcx(device, direction).unwrap();
    programs.iter().map(aya::programs::ProgramInfo::id).collect()
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

/// IDs of the XDP programs attached to a device.
fn driver(device: &str) -> Vec<String> {
    let shown = ip(&format!("-json link show dev {device}"));
    let devices: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let xdp = &devices[0]["xdp"];
    // 1: native mode
    assert!(xdp.is_null() || xdp["mode"] == 1, "{xdp}");
    xdp["prog"]["id"].as_u64().map(|id| id.to_string()).into_iter().collect()
}

#[test]
fn xdp_program_stays_attached_and_is_replaced_in_place() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("wire0");
        let mut first = Datapath::load(&node.config()).unwrap();
        assert_eq!(first.attach_xdp("wire0").unwrap(), XdpState::Native);
        let before = driver("wire0");
        assert_eq!(before.len(), 1);
        drop(first);
        assert_eq!(driver("wire0"), before, "the program stays attached when the agent ends");

        let mut second = Datapath::load(&node.config()).unwrap();
        assert_eq!(second.attach_xdp("wire0").unwrap(), XdpState::Native);
        let after = driver("wire0");
        assert_ne!(after, before, "the new agent's program");

        // another device with the same name
        ip("link del wire0");
        veth("wire0");
        assert_eq!(second.attach_xdp("wire0").unwrap(), XdpState::Native);
        assert_eq!(driver("wire0"), after);
        second.detach_uplink("wire0").unwrap();
        assert_eq!(driver("wire0"), [] as [String; 0]);

        second.attach_xdp("wire0").unwrap();
        let mut without = Datapath::load(&DatapathConfig { xdp: XdpUse::Off, ..node.config() }).unwrap();
        assert_eq!(without.attach_xdp("wire0").unwrap(), XdpState::Off);
        assert_eq!(driver("wire0"), [] as [String; 0], "detached when XDP is off");
    });
}

#[test]
fn device_without_native_xdp_reports_the_reason() {
    in_fresh_netns(|| async {
        let node = Node::new();
        ip("link add bridge0 type bridge");
        let mut datapath = Datapath::load(&node.config()).unwrap();
        let state = datapath.attach_xdp("bridge0").unwrap();
        let XdpState::Refused(reason) = &state else { panic!("{state:?}") };
        assert!(reason.contains("not supported"), "{reason}");
        assert_eq!(state.name(), "tc");
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

#[test]
fn free_slots_are_queued_once() {
    in_fresh_netns(|| async {
        let node = Node::new();
        for _ in 0..2 {
            Datapath::load(&node.config()).unwrap();
        }
        let slots =
            aya::maps::MapData::from_pin(Pins::new(&node.bpffs()).map(names::map::FLOW_SLOTS)).unwrap();
        let mut queue: aya::maps::Queue<_, u32> =
            aya::maps::Map::from_map_data(slots).unwrap().try_into().unwrap();
        let mut popped = Vec::new();
        while let Ok(slot) = queue.pop(0) {
            popped.push(slot);
        }
        assert_eq!(popped, (0..512).collect::<Vec<_>>());
    });
}

#[test]
fn tcx_links_outlive_the_agent_and_their_program_is_replaced() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let node = Node::new();
        veth("dp1");
        let first = {
            let mut datapath = Datapath::load(&node.config()).unwrap();
            assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::Tcx);
            assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::TcxAdopted);
            (program_id(&datapath, "from_pod"), program_id(&datapath, "to_pod"))
        };
        assert_eq!((running("dp1", true), running("dp1", false)), (vec![first.0], vec![first.1]));
        let mut datapath = Datapath::load(&node.config()).unwrap();
        assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::TcxAdopted);
        let second = (program_id(&datapath, "from_pod"), program_id(&datapath, "to_pod"));
        assert_ne!(first, second);
        assert_eq!((running("dp1", true), running("dp1", false)), (vec![second.0], vec![second.1]));
        datapath.detach_pod("dp1").unwrap();
        assert_eq!(running("dp1", true), [] as [u32; 0]);
    });
}

#[test]
fn new_device_with_an_old_name_gets_its_own_link() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let node = Node::new();
        veth("dp1");
        let mut datapath = Datapath::load(&node.config()).unwrap();
        datapath.attach_pod("dp1").unwrap();
        ip("link del dp1");
        veth("dp1");
        assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::Tcx);
        assert_eq!(running("dp1", true), [program_id(&datapath, "from_pod")]);
    });
}

#[test]
fn link_of_a_renamed_device_is_not_adopted() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let node = Node::new();
        veth("eth0.7");
        let mut datapath = Datapath::load(&node.config()).unwrap();
        assert_eq!(datapath.attach_uplink("eth0.7").unwrap(), Attachment::Tcx);
        ip("link set eth0.7 down");
        ip("link set eth0.7 name moved");
        ip("link add eth0.7 type veth peer name other");
        assert_eq!(datapath.attach_uplink("eth0.7").unwrap(), Attachment::Tcx);
        assert_eq!(running("eth0.7", true), [program_id(&datapath, "from_wire")]);
    });
}

#[test]
fn pins_of_deleted_devices_are_removed() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let node = Node::new();
        veth("dp1");
        veth("dp2");
        let mut datapath = Datapath::load(&node.config()).unwrap();
        datapath.attach_pod("dp1").unwrap();
        datapath.attach_pod("dp2").unwrap();
        ip("link del dp1");
        assert_eq!(datapath.remove_stale_links().unwrap(), ["dp1"]);
        assert_eq!(datapath.pins().all_devices().unwrap(), BTreeSet::from(["dp2".to_owned()]));
        assert_eq!(running("dp2", true).len(), 1);
        datapath.detach_pod("dp1").unwrap();
    });
}

#[test]
fn clsact_filters_outlive_the_agent_and_are_replaced_in_place() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        let config = DatapathConfig { tc: TcHooks::Clsact, ..node.config() };
        {
            let mut datapath = Datapath::load(&config).unwrap();
            assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::Clsact);
        }
        let first = run("tc", "filter show dev dp1 ingress");
        assert!(first.contains("from_pod") && first.contains("direct-action"), "{first}");
        let mut datapath = Datapath::load(&config).unwrap();
        assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::ClsactAdopted);
        let second = run("tc", "filter show dev dp1 ingress");
        assert_eq!(second.matches("handle 0xda7a").count(), 1, "{second}");
        assert!(second.contains(&format!(" id {} ", program_id(&datapath, "from_pod"))), "{second}");
        assert!(run("tc", "filter show dev dp1 egress").contains("to_pod"));
        datapath.detach_pod("dp1").unwrap();
        assert_eq!(run("tc", "filter show dev dp1 ingress").trim(), "");
    });
}

#[test]
fn change_of_tc_mechanism_leaves_one_program_on_the_device() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let node = Node::new();
        veth("dp1");
        let clsact = DatapathConfig { tc: TcHooks::Clsact, ..node.config() };
        Datapath::load(&clsact).unwrap().attach_pod("dp1").unwrap();
        assert_eq!(Datapath::load(&node.config()).unwrap().attach_pod("dp1").unwrap(), Attachment::Tcx);
        assert_eq!(run("tc", "filter show dev dp1 ingress").trim(), "");
        assert_eq!(running("dp1", true).len(), 1);
        assert_eq!(Datapath::load(&clsact).unwrap().attach_pod("dp1").unwrap(), Attachment::Clsact);
        assert_eq!(running("dp1", true), [] as [u32; 0]);
    });
}

#[test]
fn missing_device_is_named() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let mut datapath = Datapath::load(&node.config()).unwrap();
        let error = datapath.attach_pod("dp9").unwrap_err().to_string();
        assert!(error.contains("to_pod") && error.contains("dp9"), "{error}");
        assert_eq!(datapath.pins().all_devices().unwrap(), BTreeSet::new());
    });
}

#[test]
fn cleanup_removes_everything() {
    in_fresh_netns(|| async {
        let mut node = Node::new();
        let cgroup = node.cgroup();
        veth("dp1");
        veth("dp2");
        let mut datapath = Datapath::load(&node.config()).unwrap();
        datapath.attach_pod("dp1").unwrap();
        datapath.attach_cgroup(&cgroup).unwrap();
        drop(datapath);
        let clsact = DatapathConfig { tc: TcHooks::Clsact, ..node.config() };
        Datapath::load(&clsact).unwrap().attach_uplink("dp2").unwrap();
        let removed = cleanup(&node.bpffs()).unwrap();
        assert!(removed.iter().any(|what| what == "Ingress filter of dp2"), "{removed:?}");
        assert_eq!(run("tc", "filter show dev dp1 ingress").trim(), "");
        if has_tcx() {
            assert_eq!(running("dp1", true), [] as [u32; 0]);
        }
        assert_eq!(run("tc", "filter show dev dp2 ingress").trim(), "");
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(
            !mounts.contains(node.bpffs().to_str().unwrap()),
            "cleanup unmounts the file system that the agent mounted"
        );
        assert_eq!(cleanup(&node.bpffs()).unwrap(), [] as [String; 0]);
    });
}

#[test]
fn socket_translation_and_counters_survive_a_restart() {
    in_fresh_netns(|| async {
        let mut node = Node::new();
        let cgroup = node.cgroup();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let backend = listener.local_addr().unwrap();
        let service: SocketAddr = "10.96.0.1:80".parse().unwrap();

        let mut datapath = Datapath::load(&node.config()).unwrap();
        let mut tables = datapath.tables().unwrap();
        let slot = BackendSlot {
            addr: backend.ip().into(),
            port: Port::new(backend.port()),
            ..BackendSlot::default()
        };
        tables.backends.insert(&0, &slot).unwrap();
        let key = ServiceKey {
            addr: Addr::from(service.ip()),
            port: Port::new(service.port()),
            protocol: 6,
            scope: Scope::Any as u8,
        };
        let row = Service { id: 1, count: 1, ..Service::default() };
        tables.services.insert(&key, &row.with_checksum(&key)).unwrap();
        datapath.attach_cgroup(&cgroup).unwrap();
        let counters = Counters::open(datapath.pins()).unwrap();
        let translated = || counters.get(Hook::Connect, Outcome::Passed(Verdict::SocketTranslated)).unwrap();
        assert_eq!(translated(), 0);

        connect_from_cgroup(&cgroup, service);
        assert_eq!(translated(), 1);
        drop(datapath);
        connect_from_cgroup(&cgroup, service);
        assert_eq!(translated(), 2);
        // the programs of another agent replace those of the first
        let mut datapath = Datapath::load(&node.config()).unwrap();
        datapath.attach_cgroup(&cgroup).unwrap();
        connect_from_cgroup(&cgroup, service);
        assert_eq!(translated(), 3);
        assert!(counters.read().unwrap().iter().any(|count| count.packets == 3));
        datapath.detach_cgroup().unwrap();
        assert_eq!(translated(), 3);
    });
}

/// Sends one UDP datagram from `dp1-peer` into `dp1`.
fn send_datagram(port: u16) {
    ip("addr replace 10.1.1.2/24 dev dp1-peer");
    ip("neigh replace 10.1.1.9 dev dp1-peer lladdr 0e:da:7a:00:00:01 nud permanent");
    let socket = UdpSocket::bind("10.1.1.2:4000").unwrap();
    socket.send_to(b"knock", ("10.1.1.9", port)).unwrap();
}

#[test]
fn packet_events_are_reported() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        let mut config = node.config();
        config.node.flags = NodeFlags::TRACE;
        // the second agent adopts the ring and continues where the first stopped
        for port in [5_001, 5_002] {
            let mut datapath = Datapath::load(&config).unwrap();
            let events = Events::start(datapath.pins()).unwrap();
            let listeners = [events.subscribe(), events.subscribe()];
            datapath.attach_pod("dp1").unwrap();
            send_datagram(port);
            for mut listener in listeners {
                let ours = async {
                    loop {
                        let event = listener.recv().await.unwrap();
                        if event.source_port == 4_000 {
                            return event;
                        }
                    }
                };
                let event = timeout(Duration::from_secs(10), ours).await.expect("the event comes");
                assert_eq!((event.hook, event.destination_port), (Hook::FromPod, port));
                assert_eq!(event.source, "10.1.1.2".parse::<IpAddr>().unwrap());
                assert_eq!(event.destination, "10.1.1.9".parse::<IpAddr>().unwrap());
                assert_eq!(event.protocol, 17);
                assert!(event.length >= 14 + 20 + 8 + 5);
            }
        }
    });
}

#[test]
fn log_of_the_programs_reaches_tracing() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        let config = DatapathConfig { log: EbpfLog::Trace, ..node.config() };
        let (lines, mut logged) = tokio::sync::mpsc::unbounded_channel();
        let writer = move || Lines(lines.clone());
        let subscriber =
            tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(writer).finish();
        let _here = tracing::subscriber::set_default(subscriber);
        let mut datapath = Datapath::load(&config).unwrap();
        let forwarding = datapath.forward_log().unwrap();
        datapath.attach_pod("dp1").unwrap();
        send_datagram(5_000);
        let found = async {
            while let Some(line) = logged.recv().await {
                if line.contains("dataplane") && line.contains("hook 0 ") {
                    return;
                }
            }
        };
        timeout(Duration::from_secs(10), found).await.expect("the line comes");
        forwarding.abort();
    });
}

struct Lines(tokio::sync::mpsc::UnboundedSender<String>);

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.send(String::from_utf8_lossy(line).into_owned()).map_err(io::Error::other)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Connects to the service from a process in the cgroup.
#[track_caller]
fn connect_from_cgroup(cgroup: &Path, service: SocketAddr) {
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec 3<>/dev/tcp/{}/{}",
        cgroup.display(),
        service.ip(),
        service.port()
    );
    let status = std::process::Command::new("bash").args(["-c", &script]).status().unwrap();
    assert!(status.success(), "connect to {service}");
}
