//! Ports of the host that may be translated: set before a frontend is, and all of them next to
//! flows that are older than the map.

use aya::maps::{Array, Map, MapData};
use dataplane_agent::datapath::{Datapath, Pins, table::Table as _};
use dataplane_common::{
    abi::{FlowKey, FlowRef, Port, PortSet, Service, ServiceKey, names::map},
    net::Protocol,
};

use super::Node;
use crate::netns::in_fresh_netns;

fn is_set(node: &Node, name: &str, protocol: u8, port: u16) -> bool {
    let data = MapData::from_pin(Pins::new(&node.bpffs()).map(name)).unwrap();
    let ports: Array<_, [u8; PortSet::CHUNK]> = Array::try_from(Map::from_map_data(data).unwrap()).unwrap();
    let place = PortSet::place(protocol, Port::new(port)).unwrap();
    ports.get(&place.chunk, 0).unwrap()[place.byte] != 0
}

#[test]
fn port_of_a_frontend_is_set_when_its_row_is_inserted() {
    in_fresh_netns(|| async {
        let node = Node::new();
        let datapath = Datapath::load(&node.config()).unwrap();
        let mut services = datapath.tables().unwrap().services;
        let key = ServiceKey { protocol: Protocol::TCP, port: Port::new(30_080), ..ServiceKey::default() };
        assert!(!is_set(&node, map::SERVICE_PORTS, Protocol::TCP, 30_080));
        services.insert(&key, &Service::default()).unwrap();
        services.insert(&ServiceKey { port: Port::new(30_081), ..key }, &Service::default()).unwrap();
        for (protocol, port, expected) in [
            (Protocol::TCP, 30_080, true),
            (Protocol::TCP, 30_081, true),
            (Protocol::UDP, 30_080, false),
            (Protocol::TCP, 30_079, false),
        ] {
            assert_eq!(is_set(&node, map::SERVICE_PORTS, protocol, port), expected, "{protocol} {port}");
        }
        // connections to a removed frontend go on
        services.remove(&key).unwrap();
        assert!(is_set(&node, map::SERVICE_PORTS, Protocol::TCP, 30_080));
    });
}

#[test]
fn every_port_is_set_beside_flows_of_an_agent_without_the_maps() {
    in_fresh_netns(|| async {
        for has_flow in [false, true] {
            let node = Node::new();
            let datapath = Datapath::load(&node.config()).unwrap();
            if has_flow {
                let mut index = datapath.tables().unwrap().flow_index;
                index.insert(&FlowKey::default(), &FlowRef::default()).unwrap();
            }
            drop(datapath);
            for name in [map::SERVICE_PORTS, map::FLOW_PORTS] {
                Pins::remove(&Pins::new(&node.bpffs()).map(name)).unwrap();
            }
            Datapath::load(&node.config()).unwrap();
            for name in [map::SERVICE_PORTS, map::FLOW_PORTS] {
                for (protocol, port) in
                    [(Protocol::TCP, 1), (Protocol::UDP, 50_000), (Protocol::SCTP, 65_535)]
                {
                    assert_eq!(is_set(&node, name, protocol, port), has_flow, "{name} {protocol} {port}");
                }
            }
        }
    });
}
