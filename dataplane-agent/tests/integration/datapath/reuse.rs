//! Tests of programs that a later agent uses again, without the verifier.

use std::{collections::BTreeMap, fs, path::PathBuf};

use aya::{
    maps::{Array, Map, MapData},
    programs::{
        ProgramInfo,
        links::{FdLink, PinnedLink},
    },
};
use dataplane_agent::datapath::{
    Attachment, Capacity, Datapath, DatapathConfig, EbpfLog, Pins, TcHooks, XdpState, XdpUse,
    table::Table as _,
};
use dataplane_common::abi::{Addr, NodeConfig, NodeVariables, Service, ServiceKey, names};

use super::{
    Node,
    attachments::{has_tcx, tcx_programs, xdp_program},
    program_id, veth,
};
use crate::netns::{in_fresh_netns, ip, run};

/// IDs of the programs by name.
fn ids(datapath: &Datapath) -> BTreeMap<&'static str, u32> {
    datapath.programs().unwrap().iter().map(|program| (program.name, program.id)).collect()
}

/// Directories of sets of programs.
fn sets(node: &Node) -> Vec<PathBuf> {
    let programs = Pins::new(&node.bpffs()).program_set(0).parent().unwrap().to_owned();
    fs::read_dir(programs).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The directory of the only set of programs.
pub(super) fn set(node: &Node) -> PathBuf {
    let [set] = sets(node).try_into().unwrap();
    set
}

#[test]
fn unchanged_programs_are_not_loaded_again() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let first = Datapath::load(&node.config()).unwrap();
        assert!(!first.reuses_programs());
        let before = ids(&first);
        drop(first);
        let second = Datapath::load(&node.config()).unwrap();
        assert!(second.reuses_programs());
        assert_eq!(ids(&second), before);
        // tables that keep their capacity do not change the programs
        let capacity = Capacity { services: 128, ..node.config().capacity };
        let third = Datapath::load(&DatapathConfig { capacity, ..node.config() }).unwrap();
        assert_eq!((third.problems().len(), ids(&third)), (1, before));
    });
}

#[test]
fn changed_programs_are_loaded_and_replace_the_pinned_ones() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let config = node.config();
        let changes = [
            config.clone(),
            node.changed_config(),
            DatapathConfig { node: NodeConfig { mark: 64, ..config.node }, ..config.clone() },
            DatapathConfig { log: EbpfLog::Error, ..config.clone() },
            DatapathConfig { xdp: XdpUse::Off, ..config.clone() },
            config,
        ];
        let mut seen = Vec::new();
        for config in changes {
            let datapath = Datapath::load(&config).unwrap();
            assert!(!datapath.reuses_programs(), "{config:?}");
            seen.push(program_id(&datapath, "from_pod"));
            // of the only set
            assert_eq!(
                ProgramInfo::from_pin(set(&node).join("from_pod")).unwrap().id(),
                seen[seen.len() - 1]
            );
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 6);
    });
}

#[test]
fn programs_of_another_table_are_loaded_again() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let pins = Pins::new(&node.bpffs());
        let before = ids(&Datapath::load(&node.config()).unwrap());
        // a table that is not the one of the pinned programs
        Pins::remove(&pins.map(names::map::SERVICES)).unwrap();
        let datapath = Datapath::load(&node.config()).unwrap();
        assert!(!datapath.reuses_programs());
        assert!(ids(&datapath).iter().all(|(name, id)| before[name] != *id));
        let service = Service::default();
        datapath.tables().unwrap().services.insert(&ServiceKey::default(), &service).unwrap();
    });
}

#[test]
fn incomplete_or_foreign_set_of_programs_is_not_used() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let load = |reused| {
            let datapath = Datapath::load(&node.config()).unwrap();
            assert_eq!(datapath.reuses_programs(), reused);
            ids(&datapath)
        };
        let mut before = load(false);
        let mut loads_again = |damage: &dyn Fn(PathBuf)| {
            damage(set(&node));
            let after = load(false);
            assert!(after.iter().all(|(name, id)| before[name] != *id));
            before = after;
            assert_eq!(load(true), before);
        };
        // an agent was stopped before it had pinned all programs, and before it had renamed the set
        loads_again(&|set| {
            fs::remove_file(set.join("to_wire")).unwrap();
            fs::rename(&set, set.with_file_name("next")).unwrap();
        });
        loads_again(&|set| fs::rename(&set, set.with_file_name("next")).unwrap());
        loads_again(&|set| fs::remove_file(set.join("release")).unwrap());
        loads_again(&|set| fs::remove_file(set.join("variables")).unwrap());
        // of the same type, of another type, and a map
        let replace = |name: &'static str, other: &'static str| {
            move |set: PathBuf| fs::rename(set.join(other), set.join(name)).unwrap()
        };
        loads_again(&replace("from_pod", "to_pod"));
        loads_again(&replace("from_pod", "connect4"));
        loads_again(&replace("xdp_wire", "from_wire"));
        loads_again(&replace("from_pod", "variables"));
        loads_again(&replace("variables", "from_pod"));

        // an agent was stopped before it had removed the set of an earlier one
        let set = set(&node);
        fs::create_dir(set.with_file_name("0123456789abcdef")).unwrap();
        fs::create_dir(set.with_file_name("next")).unwrap();
        assert_eq!(load(true), before);
        assert_eq!(sets(&node), [set]);
    });
}

#[test]
fn reused_programs_stay_in_their_links_and_are_attached_to_new_devices() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let mut node = Node::new();
        let cgroup = node.cgroup();
        for device in ["dp1", "dp2", "wire0", "wire1"] {
            veth(device);
        }
        let mut first = Datapath::load(&node.config()).unwrap();
        first.attach_pod("dp1").unwrap();
        first.attach_uplink("wire0").unwrap();
        first.attach_xdp("wire0").unwrap();
        first.attach_cgroup(&cgroup).unwrap();
        let before = ids(&first);
        drop(first);

        let mut second = Datapath::load(&node.config()).unwrap();
        assert!(second.reuses_programs());
        assert_eq!(second.attach_pod("dp1").unwrap(), Attachment::TcxAdopted);
        assert_eq!(second.attach_uplink("wire0").unwrap(), Attachment::TcxAdopted);
        assert_eq!(second.attach_pod("dp2").unwrap(), Attachment::Tcx);
        assert_eq!(second.attach_uplink("wire1").unwrap(), Attachment::Tcx);
        for device in ["wire0", "wire1"] {
            assert_eq!(second.attach_xdp(device).unwrap(), XdpState::Native);
            assert_eq!(xdp_program(device), [before["xdp_wire"].to_string()]);
        }
        for (device, ingress, egress) in
            [("dp1", "from_pod", "to_pod"), ("dp2", "from_pod", "to_pod"), ("wire1", "from_wire", "to_wire")]
        {
            assert_eq!(tcx_programs(device, true), [before[ingress]]);
            assert_eq!(tcx_programs(device, false), [before[egress]]);
        }
        second.attach_cgroup(&cgroup).unwrap();
        for name in names::program::SOCKET {
            let link = FdLink::from(PinnedLink::from_pin(second.pins().socket_link(name)).unwrap());
            assert_eq!(link.info().unwrap().program_id(), before[name], "{name}");
        }
        second.detach_cgroup().unwrap();
        second.detach_uplink("wire0").unwrap();
        assert_eq!(xdp_program("wire0"), [] as [String; 0]);
    });
}

/// A link whose program is another one gets the program of the set, whoever changed it.
#[test]
fn links_of_other_programs_get_the_reused_ones() {
    in_fresh_netns(|| async {
        if !has_tcx() {
            return;
        }
        let node = Node::new();
        veth("dp1");
        veth("dp2");
        let mut first = Datapath::load(&node.config()).unwrap();
        first.attach_pod("dp1").unwrap();
        first.attach_pod("dp2").unwrap();
        // the next agent attaches its programs to one device, and is stopped
        let mut next = Datapath::load(&node.changed_config()).unwrap();
        next.attach_pod("dp1").unwrap();
        let programs = ids(&next);
        drop((first, next));
        assert_ne!(tcx_programs("dp1", true), tcx_programs("dp2", true));

        let mut datapath = Datapath::load(&node.changed_config()).unwrap();
        assert!(datapath.reuses_programs());
        for device in ["dp1", "dp2"] {
            assert_eq!(datapath.attach_pod(device).unwrap(), Attachment::TcxAdopted);
            assert_eq!(tcx_programs(device, true), [programs["from_pod"]]);
            assert_eq!(tcx_programs(device, false), [programs["to_pod"]]);
        }
    });
}

#[test]
fn reused_programs_are_attached_as_clsact_filters() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        veth("dp2");
        let config = DatapathConfig { tc: TcHooks::Clsact, ..node.config() };
        Datapath::load(&config).unwrap().attach_pod("dp1").unwrap();
        let mut datapath = Datapath::load(&config).unwrap();
        assert!(datapath.reuses_programs());
        assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::ClsactAdopted);
        assert_eq!(datapath.attach_pod("dp2").unwrap(), Attachment::Clsact);
        for device in ["dp1", "dp2"] {
            let filters = run("tc", &format!("filter show dev {device} ingress"));
            assert!(filters.contains(&format!(" id {} ", program_id(&datapath, "from_pod"))), "{filters}");
        }
        datapath.detach_pod("dp1").unwrap();
        ip("link del dp2");
    });
}

#[test]
fn variables_of_reused_programs_can_be_changed() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let variables =
            |last| NodeVariables { ipv4: Addr::v4([192, 0, 2, last]), ..NodeVariables::default() };
        let mut first = Datapath::load(&node.config()).unwrap();
        first.set_variables(variables(1)).unwrap();
        drop(first);
        let mut second = Datapath::load(&node.config()).unwrap();
        assert!(second.reuses_programs());
        let data = MapData::from_pin(set(&node).join("variables")).unwrap();
        let id = data.info().unwrap().id();
        let pinned: Array<_, NodeVariables> = Array::try_from(Map::Array(data)).unwrap();
        assert_eq!(pinned.get(&0, 0).unwrap(), variables(1), "packets are masqueraded as before");
        second.set_variables(variables(2)).unwrap();
        assert_eq!(pinned.get(&0, 0).unwrap(), variables(2));
        for name in ["from_pod", "to_wire"] {
            let program = ProgramInfo::from_pin(set(&node).join(name)).unwrap();
            assert!(program.map_ids().unwrap().unwrap().contains(&id), "{name}");
        }
    });
}
