//! "should have session affinity timeout work": each connection restarts the timeout.
//! `frontends/affinity` tests that the timeout ends.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Family, names},
    only_in_full,
};
use serde_json::json;

use super::{
    service_fixture::ServiceFixture,
    testbed::{Mode, on},
};

const TIMEOUT: Duration = Duration::from_secs(60);
/// Clients connect again before the timeout, for several times its length.
const AFFINITY_SECONDS: u32 = 3;
const INTERVAL: Duration = Duration::from_secs(1);
const TIMES: usize = 10;

#[test]
fn should_have_session_affinity_timeout_begin_anew_with_each_connection() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |testbed| {
        let mut fixture = ServiceFixture::of(
            "affinity-timeout",
            81,
            &[&testbed.webs[0], &testbed.webs[1], &testbed.webs[2]],
        )
        .with_node_ports();
        fixture.service["spec"]["sessionAffinity"] = json!("ClientIP");
        fixture.service["spec"]["sessionAffinityConfig"] =
            json!({"clientIP": {"timeoutSeconds": AFFINITY_SECONDS}});
        testbed.apply_service(&fixture)?;
        let mut clients = Vec::new();
        for family in Family::BOTH {
            let [cluster, _] = fixture.cluster_ip_ports(family);
            let node = testbed.at_node(0, family, fixture.node_port(0));
            for (place, at) in [
                (testbed.clients[0].place(), cluster),
                (testbed.host(1), cluster),
                (testbed.clients[2].place(), node),
                (&testbed.external, node),
            ] {
                clients.push(place.keep_getting(at, INTERVAL)?);
            }
        }
        clients.iter().try_for_each(|client| client.wait_answers(TIMES, 0, TIMEOUT)).context("answers")?;
        for client in clients {
            let requests = client.stop()?;
            ensure!(names(&requests).len() == 1, "{:?}", names(&requests));
        }
        testbed.withdraw(&fixture)
    })
}
