//! `trafficDistribution`: hints of endpoints for zones and nodes, which apply only if every
//! endpoint has them.

use anyhow::Result;
use dataplane_testkit::{
    lab::{Family, Node},
    only_in_full,
};
use serde_json::{Value, json};

use super::{
    service_fixture::{ServiceFixture, unready},
    testbed::{Testbed, expect_answers, on_both},
};

/// The zone of each node.
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
    in_zones(|testbed| {
        let mut fixture =
            ServiceFixture::of("same-zone", number, &[&testbed.webs[0], &testbed.webs[1], &testbed.webs[2]]);
        fixture.service["spec"]["trafficDistribution"] = json!(distribution);
        hint(testbed, &mut fixture, |zone, _| json!({"forZones": [{"name": zone}]}));
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[0, 1], &[0, 1], &[2]])?;
        // a zone without endpoints uses all of them
        fixture.replace_endpoints(&[&testbed.webs[0], &testbed.webs[1]]);
        hint(testbed, &mut fixture, |zone, _| json!({"forZones": [{"name": zone}]}));
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[0, 1], &[0, 1], &[0, 1]])?;
        // one endpoint without a hint: hints are ignored
        fixture.replace_endpoints(&[&testbed.webs[0], &testbed.webs[1], &testbed.webs[2]]);
        hint(testbed, &mut fixture, |zone, node| match node {
            "node2" => Value::Null,
            _ => json!({"forZones": [{"name": zone}]}),
        });
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[0, 1, 2]; 3])?;
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_route_traffic_to_an_endpoint_on_the_same_node_or_fall_back_to_same_zone_when_using_prefer_same_node()
-> Result<()> {
    only_in_full!();
    in_zones(|testbed| {
        // the second node has no endpoint
        let mut fixture = ServiceFixture::of("same-node", 72, &[&testbed.webs[0], &testbed.webs[2]]);
        fixture.service["spec"]["trafficDistribution"] = json!("PreferSameNode");
        hint(testbed, &mut fixture, same_node);
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[0], &[0], &[2]])?;
        testbed.withdraw(&fixture)
    })
}

#[test]
fn should_route_traffic_to_an_endpoint_on_the_same_node_when_using_prefer_same_node_and_fall_back_when_the_endpoint_becomes_unavailable()
-> Result<()> {
    only_in_full!();
    in_zones(|testbed| {
        let mut fixture = ServiceFixture::of(
            "same-node-falls-back",
            73,
            &[&testbed.webs[0], &testbed.webs[1], &testbed.webs[2]],
        );
        fixture.service["spec"]["trafficDistribution"] = json!("PreferSameNode");
        hint(testbed, &mut fixture, same_node);
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[0], &[1], &[2]])?;
        fixture.for_each_endpoint_on(testbed.webs[0].node(), unready);
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[1], &[1], &[2]])?;
        fixture.for_each_endpoint_on(testbed.webs[2].node(), unready);
        testbed.apply_service(&fixture)?;
        expect_answers_by_node(testbed, &fixture, [&[1], &[1], &[1]])?;
        testbed.withdraw(&fixture)
    })
}

/// "Local policies ignore topology": endpoints of the node are used, whatever their hints.
#[test]
fn local_policy_ignores_topology_hints() -> Result<()> {
    only_in_full!();
    in_zones(|testbed| {
        let mut fixture = ServiceFixture::of("local-hints", 74, &[&testbed.webs[0], &testbed.webs[1]]);
        fixture.service["spec"]["internalTrafficPolicy"] = json!("Local");
        hint(
            testbed,
            &mut fixture,
            |_, _| json!({"forZones": [{"name": "east"}], "forNodes": [{"name": "node3"}]}),
        );
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for node in [0, 1] {
                expect_answers(
                    testbed.clients[node].place(),
                    fixture.cluster_ip_ports(family)[0],
                    &testbed.names(&[node]),
                )?;
            }
        }
        testbed.withdraw(&fixture)
    })
}

fn same_node(zone: &str, node: &str) -> Value {
    json!({"forZones": [{"name": zone}], "forNodes": [{"name": node}]})
}

/// Runs a test with nodes that have zone labels.
fn in_zones(test: impl Fn(&mut Testbed) -> Result<()>) -> Result<()> {
    on_both(|testbed| {
        apply_zones(testbed, true)?;
        test(testbed)?;
        apply_zones(testbed, false)
    })
}

fn apply_zones(testbed: &mut Testbed, have_zones: bool) -> Result<()> {
    let objects: Vec<_> = testbed
        .cluster
        .nodes()
        .iter()
        .zip(ZONES)
        .map(|(node, zone)| object(node, have_zones.then_some(zone)))
        .collect();
    for object in objects {
        let name = format!("node-{}", object["metadata"]["name"].as_str().unwrap_or_default());
        testbed.apply(&name, &[object])?;
    }
    Ok(())
}

/// The Node object, as the testbed applies it, with a zone.
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
fn hint(testbed: &Testbed, fixture: &mut ServiceFixture, hint: impl Fn(&str, &str) -> Value) {
    for (node, zone) in testbed.cluster.nodes().iter().zip(ZONES) {
        fixture.for_each_endpoint_on(node.name(), |endpoint| match hint(zone, node.name()) {
            Value::Null => {}
            hints => endpoint["hints"] = hints,
        });
    }
}

/// Checks which endpoints answer the pod and the host of each node.
fn expect_answers_by_node(
    testbed: &Testbed,
    fixture: &ServiceFixture,
    expected: [&[usize]; 3],
) -> Result<()> {
    for family in Family::BOTH {
        for (node, nodes) in expected.into_iter().enumerate() {
            let [web, _] = fixture.cluster_ip_ports(family);
            expect_answers(testbed.clients[node].place(), web, &testbed.names(nodes))?;
            expect_answers(testbed.host(node), web, &testbed.names(nodes))?;
        }
    }
    Ok(())
}
