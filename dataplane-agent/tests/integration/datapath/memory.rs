//! Memory of the tables with the default capacities of nodes of several sizes.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{maps::MapData, programs::ProgramInfo};
use dataplane_agent::datapath::{Capacity, Datapath, DatapathConfig, Tables, table::Table as _};
use dataplane_common::abi::{
    Port, Service, ServiceKey,
    names::{self, map},
};

use super::{Node, reuse::set};
use crate::netns::in_fresh_netns;

const GIB: u64 = 1 << 30;
const MIB: f64 = (1 << 20) as f64;

/// MiB of each map of the programs, as the kernel counts.
fn maps(node: &Node) -> BTreeMap<String, f64> {
    let mut maps = BTreeMap::new();
    for name in names::program::CLASSIFIERS.into_iter().chain(names::program::SOCKET) {
        let program = ProgramInfo::from_pin(set(node).join(name)).unwrap();
        for id in program.map_ids().unwrap().unwrap() {
            let data = MapData::from_id(id).unwrap();
            let name = data.info().unwrap().name_as_str().unwrap().to_owned();
            let fd = data.fd().as_fd().as_raw_fd();
            let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{fd}")).unwrap();
            let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
            maps.insert(name, f64::from(bytes.trim().parse::<u32>().unwrap()) / MIB);
        }
    }
    maps
}

fn total(node: &Node) -> f64 {
    maps(node).values().sum()
}

fn load(node: &Node, memory: u64) -> Tables {
    let config = DatapathConfig { capacity: Capacity::for_memory(memory), ..node.config() };
    Datapath::load(&config).unwrap().tables().unwrap()
}

/// Before Linux 6.4, the kernel shows what a map may use.
fn shows_usage(node: &Node) -> bool {
    // an empty trie
    let shows = maps(node)[map::ROUTES] < 0.1;
    if !shows {
        eprintln!("SKIP: this kernel does not show how much memory a map uses");
    }
    shows
}

#[test]
fn tables_of_a_small_node_are_small() {
    in_fresh_netns(|| async {
        let node = Node::new();
        load(&node, 2 * GIB);
        if !shows_usage(&node) {
            return;
        }
        println!("{:.1} MiB: {:.2?}", total(&node), maps(&node));
        assert!(total(&node) <= 16.0, "{:.1} MiB: {:?}", total(&node), maps(&node));
    });
}

#[test]
fn tables_of_any_usual_node_hold_30000_services_in_48_mib() {
    in_fresh_netns(|| async {
        for memory in [2, 4, 8, 24] {
            let node = Node::new();
            let mut tables = load(&node, memory * GIB);
            if !shows_usage(&node) {
                return;
            }
            let empty = total(&node);
            // a frontend and a row of its address for each; the tables of backends are arrays
            for number in 0..60_000_u32 {
                let key = ServiceKey {
                    addr: IpAddr::V4(number.into()).into(),
                    port: Port::new(80),
                    ..ServiceKey::default()
                };
                tables.services.insert(&key, &Service::default()).unwrap();
            }
            println!("{memory} GiB: {empty:.1} MiB empty, {:.1} MiB with 30,000 Services", total(&node));
            assert!(total(&node) <= 48.0, "{memory} GiB: {:.1} MiB: {:?}", total(&node), maps(&node));
            // rows that are gone take no memory
            for (key, _) in tables.services.entries().unwrap() {
                tables.services.remove(&key).unwrap();
            }
            assert!(total(&node) < empty + 1.0, "{memory} GiB: {:.1} MiB", total(&node));
        }
    });
}
