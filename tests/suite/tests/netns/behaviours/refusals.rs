//! Who asks where nobody can answer is told so at once; who asks where others could hears nothing.

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, failures},
    only_in_full,
};
use serde_json::json;

use super::{
    bed::{is_silent, on_both, refuses},
    told::{self, Told},
};

/// Kubernetes gives it three seconds.
const SOON_US: u64 = 3_000_000;

#[test]
fn should_be_rejected_when_no_endpoints_exist() -> Result<()> {
    rejected("no-pods", 31, |_| {})
}

/// As an eviction leaves it: the pod is there, has failed, and is neither ready nor serving; the service takes pods that are
/// not ready, but not such.
#[test]
fn should_be_rejected_for_evicted_pods_no_endpoints_exist() -> Result<()> {
    rejected("evicted-pods", 32, |told| {
        told.service["spec"]["publishNotReadyAddresses"] = json!(true);
        told.slices.iter_mut().for_each(|slice| slice["endpoints"] = json!([]));
    })
}

fn rejected(name: &str, number: u16, change: impl Fn(&mut Told)) -> Result<()> {
    on_both(|bed| {
        let mut told = Told::of(name, number, &[&bed.webs[0]]).on_nodes();
        told.each(told::unready);
        change(&mut told);
        bed.tell(&told)?;
        for family in Family::BOTH {
            for place in [bed.clients[0].place(), bed.host(0)] {
                refuses(place, told.cluster(family))?;
                let requests = place.get(told.cluster(family)[0], 1)?;
                ensure!(failures(&requests).keys().eq(["refused"]), "{requests:?}");
                ensure!(requests[0].ended_us - requests[0].began_us < SOON_US, "{requests:?}");
            }
            for place in [bed.clients[0].place(), &bed.outside, bed.host(1)] {
                refuses(place, told.on_node(bed.cluster.nodes()[0].address(family)))?;
            }
        }
        bed.withdraw(&told)
    })
}

/// The rule that goes with it: a node without endpoints of its own drops what is for them, and refuses where there are none
/// anywhere.
#[test]
fn a_policy_of_local_drops_where_others_could_answer_and_refuses_where_nobody_can() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("elsewhere", 33, &[&bed.webs[2]]).on_nodes();
        told.service["spec"]["internalTrafficPolicy"] = json!("Local");
        told.service["spec"]["externalTrafficPolicy"] = json!("Local");
        bed.tell(&told)?;
        for family in Family::BOTH {
            is_silent(bed.clients[0].place(), told.cluster(family))?;
            is_silent(bed.host(0), told.cluster(family))?;
            is_silent(&bed.outside, told.on_node(bed.cluster.nodes()[0].address(family)))?;
        }
        told.each(told::unready);
        bed.tell(&told)?;
        for family in Family::BOTH {
            refuses(bed.clients[0].place(), told.cluster(family))?;
            refuses(bed.host(0), told.cluster(family))?;
            refuses(&bed.outside, told.on_node(bed.cluster.nodes()[0].address(family)))?;
        }
        bed.withdraw(&told)
    })
}
