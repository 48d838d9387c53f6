//! `externalTrafficPolicy: Local` and its health check node port.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Spec, outside, wait};
use serde_json::json;

use super::{End, Testbed, expect_answers, expect_no_answer};

const HEALTH: u16 = 32_080;
const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn health_check_node_port_and_policy() -> Result<()> {
    let spec = Spec::new(2);
    let mut testbed = Testbed::create(&spec, &[0])?;
    let mut checks = Checks::of("health checks");
    let local = |service: &mut serde_json::Value| {
        service["spec"]["type"] = json!("LoadBalancer");
        service["spec"]["externalTrafficPolicy"] = json!("Local");
        service["spec"]["healthCheckNodePort"] = json!(HEALTH);
    };
    testbed.apply_service(local)?;
    checks.that("should only target nodes with endpoints: a node with one", || {
        let response = wait_health_check(&testbed, 0, Some(200))?;
        ensure!(response.contains("x-load-balancing-endpoint-weight: 1\r\n"), "{response}");
        ensure!(response.contains("\"localEndpoints\": 1"), "{response}");
        ensure!(response.contains("\"namespace\": \"default\",\n\t\t\"name\": \"web\""), "{response}");
        Ok(())
    });
    checks.that("should only target nodes with endpoints: a node without", || {
        let response = wait_health_check(&testbed, 1, Some(503))?;
        ensure!(response.contains("x-load-balancing-endpoint-weight: 0\r\n"), "{response}");
        Ok(())
    });
    expect_local_only(&mut checks, &testbed);

    testbed.apply_endpoints(|endpoint| {
        endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
    })?;
    checks.that("should fail health check node port if there are only terminating endpoints", || {
        wait_health_check(&testbed, 0, Some(503)).map(drop)
    });
    for family in Family::BOTH {
        let what = "should fallback to local terminating endpoints when there are no ready endpoints with \
                    externalTrafficPolicy=Local";
        checks.that(format!("{what} ({family})"), || {
            expect_answers(&testbed.external, testbed.node_port(0, family), 5).map(drop)
        });
    }
    testbed.apply_endpoints(|_| {})?;
    checks.that("the endpoints are ready again", || wait_health_check(&testbed, 0, Some(200)).map(drop));

    // the API server releases the health check port with the policy
    testbed.apply_service(|service| service["spec"]["type"] = json!("LoadBalancer"))?;
    let changes =
        "should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes";
    for node in [0, 1] {
        checks.that(format!("{changes}: no health check at {node}"), || {
            wait_health_check(&testbed, node, None).map(drop)
        });
        for family in Family::BOTH {
            checks.that(format!("{changes}: a node port at {node} ({family})"), || {
                expect_answers(&testbed.external, testbed.node_port(node, family), 5).map(drop)
            });
        }
    }
    testbed.apply_service(local)?;
    checks.that(format!("{changes}: changed back"), || wait_health_check(&testbed, 0, Some(200)).map(drop));
    expect_local_only(&mut checks, &testbed);
    checks.finish(&testbed.cluster)
}

/// The node with the endpoint answers and keeps the client's address. The other node drops the
/// packets of external clients and pods, but not those of its own processes.
fn expect_local_only(checks: &mut Checks, testbed: &Testbed) {
    for family in Family::BOTH {
        let what = "should support externalTrafficPolicy=Local for type=NodePort";
        checks.that(format!("{what}: the client's address ({family})"), || {
            testbed.external.get_as(testbed.node_port(0, family), 5, Some("web-0"), outside(family))
        });
        checks.that(format!("{what}: a node without endpoints ({family})"), || {
            expect_no_answer(&testbed.external, testbed.node_port(1, family), End::Timeout)
        });
        checks.that(format!("{what}: a process of that node ({family})"), || {
            expect_answers(testbed.cluster.nodes()[1].place(), testbed.node_port(1, family), 5).map(drop)
        });
        checks.that(format!("{what}: a pod at the node without endpoints ({family})"), || {
            expect_no_answer(testbed.client.place(), testbed.node_port(1, family), End::Timeout)
        });
    }
}

/// Waits until a node's health check port answers with this code, or refuses; returns the response.
fn wait_health_check(testbed: &Testbed, node: usize, code: Option<u16>) -> Result<String> {
    let at = SocketAddr::new(testbed.cluster.nodes()[node].address(Family::V4), HEALTH);
    wait::until("health check", TIMEOUT, || {
        let response = testbed.cluster.fabric().outside().enter(|| fetch_health(at))??;
        let is_expected = match code {
            Some(code) => response.starts_with(&format!("HTTP/1.0 {code} ")),
            None => response.is_empty(),
        };
        ensure!(is_expected, "{at}: expected {code:?}: {response:?}");
        Ok(Some(response))
    })
}

/// The response of a port; empty if the port is closed.
fn fetch_health(at: SocketAddr) -> Result<String> {
    let mut stream = match TcpStream::connect_timeout(&at, TIMEOUT) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(String::new()),
        connected => connected.with_context(|| at.to_string())?,
    };
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    Ok(response)
}
