//! Tests of programs on devices: adopted, replaced, removed with stale pins.

use std::{collections::BTreeSet, fs};

use dataplane_agent::datapath::{Attachment, Datapath, DatapathConfig, TcHooks, XdpState, XdpUse, cleanup};

use super::{Node, program_id, veth};
use crate::netns::{in_fresh_netns, ip, run};

/// Whether the kernel has tcx (from 6.6). If not, a test that needs it is skipped.
pub(super) fn has_tcx() -> bool {
    use aya::programs::{SchedClassifier, TcAttachType};
    let has = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok();
    if !has {
        eprintln!("SKIP: this kernel has no tcx");
    }
    has
}

/// IDs of the programs attached to a device by tcx.
pub(super) fn tcx_programs(device: &str, ingress: bool) -> Vec<u32> {
    use aya::programs::{SchedClassifier, TcAttachType};
    let direction = if ingress { TcAttachType::Ingress } else { TcAttachType::Egress };
    let (_, programs) = SchedClassifier::query_tcx(device, direction).unwrap();
    programs.iter().map(aya::programs::ProgramInfo::id).collect()
}

/// IDs of the XDP programs attached to a device.
pub(super) fn xdp_program(device: &str) -> Vec<String> {
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
        let before = xdp_program("wire0");
        assert_eq!(before.len(), 1);
        drop(first);
        assert_eq!(xdp_program("wire0"), before, "the program stays attached when the agent ends");

        let mut second = Datapath::load(&node.changed_config()).unwrap();
        assert_eq!(second.attach_xdp("wire0").unwrap(), XdpState::Native);
        let after = xdp_program("wire0");
        assert_ne!(after, before, "the new agent's program");

        // another device with the same name
        ip("link del wire0");
        veth("wire0");
        assert_eq!(second.attach_xdp("wire0").unwrap(), XdpState::Native);
        assert_eq!(xdp_program("wire0"), after);
        second.detach_uplink("wire0").unwrap();
        assert_eq!(xdp_program("wire0"), [] as [String; 0]);

        second.attach_xdp("wire0").unwrap();
        let mut without = Datapath::load(&DatapathConfig { xdp: XdpUse::Off, ..node.config() }).unwrap();
        assert_eq!(without.attach_xdp("wire0").unwrap(), XdpState::Off);
        assert_eq!(xdp_program("wire0"), [] as [String; 0], "detached when XDP is off");
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
        assert_eq!((tcx_programs("dp1", true), tcx_programs("dp1", false)), (vec![first.0], vec![first.1]));
        let mut datapath = Datapath::load(&node.changed_config()).unwrap();
        assert_eq!(datapath.attach_pod("dp1").unwrap(), Attachment::TcxAdopted);
        let second = (program_id(&datapath, "from_pod"), program_id(&datapath, "to_pod"));
        assert_ne!(first, second);
        assert_eq!((tcx_programs("dp1", true), tcx_programs("dp1", false)), (vec![second.0], vec![second.1]));
        datapath.detach_pod("dp1").unwrap();
        assert_eq!(tcx_programs("dp1", true), [] as [u32; 0]);
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
        assert_eq!(tcx_programs("dp1", true), [program_id(&datapath, "from_pod")]);
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
        assert_eq!(tcx_programs("eth0.7", true), [program_id(&datapath, "from_wire")]);
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
        assert_eq!(tcx_programs("dp2", true).len(), 1);
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
        let config = DatapathConfig { tc: TcHooks::Clsact, ..node.changed_config() };
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
        assert_eq!(tcx_programs("dp1", true).len(), 1);
        assert_eq!(Datapath::load(&clsact).unwrap().attach_pod("dp1").unwrap(), Attachment::Clsact);
        assert_eq!(tcx_programs("dp1", true), [] as [u32; 0]);
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
            assert_eq!(tcx_programs("dp1", true), [] as [u32; 0]);
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
