//! "should have session affinity timeout work": what is left of it once `frontends/affinity` has shown that it ends: each
//! connection begins it anew.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Family, names},
    only_in_full,
};
use serde_json::json;

use super::{
    bed::{Mode, on},
    told::Told,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// A client asks again well before it is over, for longer than it lasts several times over.
const TIMEOUT: u32 = 3;
const INTERVAL: Duration = Duration::from_secs(1);
const TIMES: usize = 10;

#[test]
fn should_have_session_affinity_timeout_begin_anew_with_each_connection() -> Result<()> {
    only_in_full!();
    on(Mode::AtConnect, |bed| {
        let mut told =
            Told::of("affinity-timeout", 81, &[&bed.webs[0], &bed.webs[1], &bed.webs[2]]).on_nodes();
        told.service["spec"]["sessionAffinity"] = json!("ClientIP");
        told.service["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": TIMEOUT}});
        bed.tell(&told)?;
        let mut asking = Vec::new();
        for family in Family::BOTH {
            let [cluster, _] = told.cluster(family);
            let node = bed.at_node(0, family, told.node_port(0));
            for (place, at) in [
                (bed.clients[0].place(), cluster),
                (bed.host(1), cluster),
                (bed.clients[2].place(), node),
                (&bed.outside, node),
            ] {
                asking.push(place.keep_getting(at, INTERVAL)?);
            }
        }
        asking.iter().try_for_each(|client| client.wait_answers(TIMES, 0, PATIENCE)).context("answers")?;
        for client in asking {
            let requests = client.stop()?;
            ensure!(names(&requests).len() == 1, "{:?}", names(&requests));
        }
        bed.withdraw(&told)
    })
}
