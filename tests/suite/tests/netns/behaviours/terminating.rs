//! Nobody is ready, and somebody who ends still serves: for each policy by itself.

use anyhow::Result;
use dataplane_testkit::{lab::Family, only_in_full};
use serde_json::{Value, json};

use super::{
    bed::{Bed, answers, is_silent, on_both},
    told::{Told, ending},
};

/// A server on the first node that ends.
fn terminating(bed: &Bed, number: u16, change: impl FnOnce(&mut Value)) -> Told {
    let mut told = Told::of("svc-proxy-terminating", number, &[&bed.webs[0]]).on_nodes();
    told.each(ending);
    change(&mut told.service["spec"]);
    told
}

#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_cluster()
-> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = terminating(bed, 20, |_| {});
        bed.tell(&told)?;
        for family in Family::BOTH {
            for node in [0, 1] {
                let [web, _] = told.cluster(family);
                answers(bed.clients[node].place(), web, &bed.names(&[0]))?;
                answers(bed.host(node), web, &bed.names(&[0]))?;
            }
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_local()
-> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = terminating(bed, 21, |spec| spec["internalTrafficPolicy"] = json!("Local"));
        bed.tell(&told)?;
        for family in Family::BOTH {
            let [web, _] = told.cluster(family);
            answers(bed.clients[0].place(), web, &bed.names(&[0]))?;
            answers(bed.host(0), web, &bed.names(&[0]))?;
            is_silent(bed.clients[1].place(), told.cluster(family))?;
            is_silent(bed.host(1), told.cluster(family))?;
        }
        bed.withdraw(&told)
    })
}

#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_cluster()
-> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = terminating(bed, 22, |_| {});
        bed.tell(&told)?;
        for family in Family::BOTH {
            for node in [0, 1] {
                let web = bed.at_node(node, family, told.node_port(0));
                for place in [bed.clients[0].place(), bed.clients[1].place(), &bed.outside, bed.host(1)] {
                    answers(place, web, &bed.names(&[0]))?;
                }
            }
        }
        bed.withdraw(&told)
    })
}

/// The client's node has nothing to say about another node's ports: the first node's server is no answer to who asks the
/// second, wherever he is.
#[test]
fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_local()
-> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = terminating(bed, 23, |spec| spec["externalTrafficPolicy"] = json!("Local"));
        bed.tell(&told)?;
        for family in Family::BOTH {
            let nodes = bed.cluster.nodes();
            let ports = |node: usize| told.on_node(nodes[node].address(family));
            for place in
                [bed.clients[0].place(), bed.clients[1].place(), &bed.outside, bed.host(0), bed.host(1)]
            {
                answers(place, ports(0)[0], &bed.names(&[0]))?;
            }
            for place in [bed.clients[0].place(), &bed.outside, bed.host(0)] {
                is_silent(place, ports(1))?;
            }
            // on that node it is the service that is asked, not the node
            answers(bed.clients[1].place(), ports(1)[0], &bed.names(&[0]))?;
        }
        bed.withdraw(&told)
    })
}
