//! Large requests.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Family, Namespace},
    only_in_full,
    traffic::ECHO,
};
use serde_json::json;

use super::{service_fixture::ServiceFixture, testbed::on_both};

const TIMEOUT: Duration = Duration::from_secs(10);
/// Larger than a segment, a window, and a datagram without fragments.
const LARGE: usize = 200_000;

/// Both the request and the response are large.
#[test]
fn should_be_able_to_handle_large_requests_http() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let mut fixture = ServiceFixture::of("large-tcp", 40, &[&testbed.webs[0], &testbed.webs[1]]);
        fixture.service["spec"]["ports"] =
            json!([{"name": "echo", "port": 7, "protocol": "TCP", "targetPort": ECHO}]);
        for slice in &mut fixture.slices {
            slice["ports"] = json!([{"name": "echo", "port": ECHO, "protocol": "TCP"}]);
        }
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            for place in [testbed.clients[0].place(), testbed.host(0)] {
                for _ in 0..6 {
                    echo(place.namespace(), fixture.at(family, 7))?;
                }
                // `echo` connects outside the cgroup of the lab; a process of the lab is translated
                // at connect(), too
                let held = place.hold(fixture.at(family, 7), 20, Duration::from_millis(5))?.finish()?;
                ensure!(held.broken.is_empty() && held.servers.len() == 2, "{held:?}");
            }
        }
        testbed.withdraw(&fixture)
    })
}

/// The response is the server's name on a line, then the sent bytes.
fn echo(namespace: &Namespace, at: SocketAddr) -> Result<()> {
    namespace.enter(|| {
        let mut stream = TcpStream::connect_timeout(&at, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut reader = stream.try_clone()?;
        let sent: Vec<u8> = (0..LARGE).map(|at| b'a' + (at % 23) as u8).collect();
        let received = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                stream.write_all(&sent)?;
                stream.shutdown(Shutdown::Write)
            });
            let mut received = Vec::new();
            reader.read_to_end(&mut received)?;
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            anyhow::Ok(received)
        })?;
        let parts = received.split_at_checked(received.len().saturating_sub(LARGE));
        let is_right = parts.is_some_and(|(name, echo)| name.starts_with(b"web-") && echo == sent);
        ensure!(is_right, "{at}: received {} bytes of {LARGE}", received.len());
        Ok(())
    })?
}

/// Datagrams of all sizes pass in fragments.
#[test]
fn should_be_able_to_handle_large_requests_udp() -> Result<()> {
    only_in_full!();
    on_both(|testbed| {
        let fixture =
            ServiceFixture::of("large-udp", 41, &[&testbed.webs[0], &testbed.webs[1], &testbed.webs[2]]);
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let [_, at] = fixture.cluster_ip_ports(family);
            for place in [testbed.clients[0].place(), testbed.host(0)] {
                for size in ["2000", "9000", "40000"] {
                    let datagrams = place.send(at, 12, &["--fresh", "--size", size])?;
                    datagrams.check()?;
                }
            }
        }
        testbed.withdraw(&fixture)
    })
}
