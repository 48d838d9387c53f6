//! `externalTrafficPolicy: Local` and the health checks that go with it.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Spec, outside, wait};
use serde_json::json;

use super::{Bed, End, answered, fails};

const HEALTH: u16 = 32_080;
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn health_check_node_port_and_policy() -> Result<()> {
    let spec = Spec::new(2);
    let mut bed = Bed::create(&spec, &[0])?;
    let mut checks = Checks::of("health checks");
    let local = |service: &mut serde_json::Value| {
        service["spec"]["type"] = json!("LoadBalancer");
        service["spec"]["externalTrafficPolicy"] = json!("Local");
        service["spec"]["healthCheckNodePort"] = json!(HEALTH);
    };
    bed.tell(local)?;
    checks.that("should only target nodes with endpoints: the node that has one", || {
        let said = becomes(&bed, 0, Some(200))?;
        ensure!(said.contains("x-load-balancing-endpoint-weight: 1\r\n"), "{said}");
        ensure!(said.contains("\"localEndpoints\": 1"), "{said}");
        ensure!(said.contains("\"namespace\": \"default\",\n\t\t\"name\": \"web\""), "{said}");
        Ok(())
    });
    checks.that("should only target nodes with endpoints: the other", || {
        let said = becomes(&bed, 1, Some(503))?;
        ensure!(said.contains("x-load-balancing-endpoint-weight: 0\r\n"), "{said}");
        Ok(())
    });
    local_only(&mut checks, &bed);

    bed.tell_endpoints(|endpoint| {
        endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    })?;
    checks.that("should fail health check node port if there are only terminating endpoints", || {
        becomes(&bed, 0, Some(503)).map(drop)
    });
    for family in Family::BOTH {
        let what = "should fallback to local terminating endpoints when there are no ready endpoints with \
                    externalTrafficPolicy=Local";
        checks.that(format!("{what} ({family})"), || {
            answered(&bed.outside, bed.node_port(0, family), 5).map(drop)
        });
    }
    bed.tell_endpoints(|_| {})?;
    checks.that("endpoints that are ready again", || becomes(&bed, 0, Some(200)).map(drop));

    // the API server takes the port back with the policy
    bed.tell(|service| service["spec"]["type"] = json!("LoadBalancer"))?;
    let changes =
        "should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes";
    for node in [0, 1] {
        checks.that(format!("{changes}: no health check at {node}"), || becomes(&bed, node, None).map(drop));
        for family in Family::BOTH {
            checks.that(format!("{changes}: a node port at {node} ({family})"), || {
                answered(&bed.outside, bed.node_port(node, family), 5).map(drop)
            });
        }
    }
    bed.tell(local)?;
    checks.that(format!("{changes}: and back"), || becomes(&bed, 0, Some(200)).map(drop));
    local_only(&mut checks, &bed);
    checks.finish(&bed.cluster)
}

/// The node with the endpoint answers and shows it the client; the other is silent, but not to its own.
fn local_only(checks: &mut Checks, bed: &Bed) {
    for family in Family::BOTH {
        let what = "should support externalTrafficPolicy=Local for type=NodePort";
        checks.that(format!("{what}: the client's address ({family})"), || {
            bed.outside.get_as(bed.node_port(0, family), 5, Some("web-0"), outside(family))
        });
        checks.that(format!("{what}: a node without endpoints ({family})"), || {
            fails(&bed.outside, bed.node_port(1, family), End::Silent)
        });
        checks.that(format!("{what}: a process of that node ({family})"), || {
            answered(bed.cluster.nodes()[1].place(), bed.node_port(1, family), 5).map(drop)
        });
        checks.that(format!("{what}: a pod asks the node without endpoints ({family})"), || {
            fails(bed.client.place(), bed.node_port(1, family), End::Silent)
        });
    }
}

/// Waits until a node's port answers with this code, or with nothing; the answer.
fn becomes(bed: &Bed, node: usize, code: Option<u16>) -> Result<String> {
    let at = SocketAddr::new(bed.cluster.nodes()[node].address(Family::V4), HEALTH);
    wait::until("health check", PATIENCE, || {
        let said = bed.cluster.fabric().outside().enter(|| ask(at))??;
        let is_it = match code {
            Some(code) => said.starts_with(&format!("HTTP/1.0 {code} ")),
            None => said.is_empty(),
        };
        ensure!(is_it, "{at}: {code:?} is wanted: {said:?}");
        Ok(Some(said))
    })
}

/// What is said at a port, which is nothing where nobody listens.
fn ask(at: SocketAddr) -> Result<String> {
    let mut stream = match TcpStream::connect_timeout(&at, PATIENCE) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(String::new()),
        connected => connected.with_context(|| at.to_string())?,
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}
