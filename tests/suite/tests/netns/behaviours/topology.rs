//! `trafficDistribution`: endpoints say for which zones and nodes they are meant, and count only if all of them do.

use anyhow::Result;
use dataplane_testkit::{
    lab::{Family, Node},
    only_in_full,
};
use serde_json::{Value, json};

use super::{
    bed::{Bed, answers, on_both},
    told::{Told, unready},
};

/// Of each node: the third is alone in its own.
const ZONES: [&str; 3] = ["west", "west", "east"];

#[test]
fn should_route_traffic_to_an_endpoint_in_the_same_zone_when_using_prefer_close() -> Result<()> {
    only_in_full!();
    same_zone(70, "PreferClose")
}

#[test]
fn should_route_traffic_to_an_endpoint_in_the_same_zone_when_using_prefer_same_zone() -> Result<()> {
    only_in_full!();
    same_zone(71, "PreferSameZone")
}

fn same_zone(number: u16, distribution: &str) -> Result<()> {
    in_zones(|bed| {
        let mut told = Told::of("same-zone", number, &[&bed.webs[0], &bed.webs[1], &bed.webs[2]]);
        told.service["spec"]["trafficDistribution"] = json!(distribution);
        hint(bed, &mut told, |zone, _| json!({"forZones": [{"name": zone}]}));
        bed.tell(&told)?;
        near(bed, &told, [&[0, 1], &[0, 1], &[2]])?;
        // a zone that has nobody goes to all
        told.replace(&[&bed.webs[0], &bed.webs[1]]);
        hint(bed, &mut told, |zone, _| json!({"forZones": [{"name": zone}]}));
        bed.tell(&told)?;
        near(bed, &told, [&[0, 1], &[0, 1], &[0, 1]])?;
        // a single one without a hint, and hints are none
        told.replace(&[&bed.webs[0], &bed.webs[1], &bed.webs[2]]);
        hint(bed, &mut told, |zone, node| match node {
            "node2" => Value::Null,
            _ => json!({"forZones": [{"name": zone}]}),
        });
        bed.tell(&told)?;
        near(bed, &told, [&[0, 1, 2]; 3])?;
        bed.withdraw(&told)
    })
}

#[test]
fn should_route_traffic_to_an_endpoint_on_the_same_node_or_fall_back_to_same_zone_when_using_prefer_same_node()
-> Result<()> {
    only_in_full!();
    in_zones(|bed| {
        // the second node has none of its own
        let mut told = Told::of("same-node", 72, &[&bed.webs[0], &bed.webs[2]]);
        told.service["spec"]["trafficDistribution"] = json!("PreferSameNode");
        hint(bed, &mut told, same_node);
        bed.tell(&told)?;
        near(bed, &told, [&[0], &[0], &[2]])?;
        bed.withdraw(&told)
    })
}

#[test]
fn should_route_traffic_to_an_endpoint_on_the_same_node_when_using_prefer_same_node_and_fall_back_when_the_endpoint_becomes_unavailable()
-> Result<()> {
    only_in_full!();
    in_zones(|bed| {
        let mut told = Told::of("same-node-falls-back", 73, &[&bed.webs[0], &bed.webs[1], &bed.webs[2]]);
        told.service["spec"]["trafficDistribution"] = json!("PreferSameNode");
        hint(bed, &mut told, same_node);
        bed.tell(&told)?;
        near(bed, &told, [&[0], &[1], &[2]])?;
        told.each_on(bed.webs[0].node(), unready);
        bed.tell(&told)?;
        near(bed, &told, [&[1], &[1], &[2]])?;
        told.each_on(bed.webs[2].node(), unready);
        bed.tell(&told)?;
        near(bed, &told, [&[1], &[1], &[1]])?;
        bed.withdraw(&told)
    })
}

/// "Local policies ignore topology": an endpoint of the node is near enough, whatever it is meant for.
#[test]
fn a_policy_of_local_knows_no_hints() -> Result<()> {
    only_in_full!();
    in_zones(|bed| {
        let mut told = Told::of("local-hints", 74, &[&bed.webs[0], &bed.webs[1]]);
        told.service["spec"]["internalTrafficPolicy"] = json!("Local");
        hint(bed, &mut told, |_, _| json!({"forZones": [{"name": "east"}], "forNodes": [{"name": "node3"}]}));
        bed.tell(&told)?;
        for family in Family::BOTH {
            for node in [0, 1] {
                answers(bed.clients[node].place(), told.cluster(family)[0], &bed.names(&[node]))?;
            }
        }
        bed.withdraw(&told)
    })
}

fn same_node(zone: &str, node: &str) -> Value {
    json!({"forZones": [{"name": zone}], "forNodes": [{"name": node}]})
}

/// On nodes that are in zones.
fn in_zones(test: impl Fn(&mut Bed) -> Result<()>) -> Result<()> {
    on_both(|bed| {
        zones(bed, true)?;
        test(bed)?;
        zones(bed, false)
    })
}

fn zones(bed: &mut Bed, are_known: bool) -> Result<()> {
    let objects: Vec<_> = bed
        .cluster
        .nodes()
        .iter()
        .zip(ZONES)
        .map(|(node, zone)| object(node, are_known.then_some(zone)))
        .collect();
    for object in objects {
        let name = format!("node-{}", object["metadata"]["name"].as_str().unwrap_or_default());
        bed.apply(&name, &[object])?;
    }
    Ok(())
}

/// As its Node is told at first, in a zone.
fn object(node: &Node, zone: Option<&str>) -> Value {
    let mut labels = json!({"kubernetes.io/hostname": node.name(), "kubernetes.io/os": "linux"});
    if let Some(zone) = zone {
        labels["topology.kubernetes.io/zone"] = json!(zone);
    }
    let addresses = node.addresses().map(|address| json!({"type": "InternalIP", "address": address}));
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name(), "labels": labels},
        "spec": {"podCIDR": node.pod_cidrs()[0], "podCIDRs": node.pod_cidrs()},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// Gives each endpoint the hint for its zone and node.
fn hint(bed: &Bed, told: &mut Told, hint: impl Fn(&str, &str) -> Value) {
    for (node, zone) in bed.cluster.nodes().iter().zip(ZONES) {
        told.each_on(node.name(), |endpoint| match hint(zone, node.name()) {
            Value::Null => {}
            hints => endpoint["hints"] = hints,
        });
    }
}

/// Who answers the pod and the host of each node.
fn near(bed: &Bed, told: &Told, expected: [&[usize]; 3]) -> Result<()> {
    for family in Family::BOTH {
        for (node, nodes) in expected.into_iter().enumerate() {
            let [web, _] = told.cluster(family);
            answers(bed.clients[node].place(), web, &bed.names(nodes))?;
            answers(bed.host(node), web, &bed.names(nodes))?;
        }
    }
    Ok(())
}
