//! Large requests, and what every service does.

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

use super::{bed::on_both, told::Told};

const PATIENCE: Duration = Duration::from_secs(10);
/// More than a segment, a window, or a datagram without fragments has room for.
const LARGE: usize = 200_000;

/// The request is large as well as its answer.
#[test]
fn should_be_able_to_handle_large_requests_http() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let mut told = Told::of("large-tcp", 40, &[&bed.webs[0], &bed.webs[1]]);
        told.service["spec"]["ports"] =
            json!([{"name": "echo", "port": 7, "protocol": "TCP", "targetPort": ECHO}]);
        for slice in &mut told.slices {
            slice["ports"] = json!([{"name": "echo", "port": ECHO, "protocol": "TCP"}]);
        }
        bed.tell(&told)?;
        for family in Family::BOTH {
            for place in [bed.clients[0].place(), bed.host(0)] {
                for _ in 0..6 {
                    echo(place.namespace(), told.at(family, 7))?;
                }
                // these sockets were made where no program sees them connect; those of a process of the place are seen
                let held = place.hold(told.at(family, 7), 20, Duration::from_millis(5))?.finish()?;
                ensure!(held.broken.is_empty() && held.servers.len() == 2, "{held:?}");
            }
        }
        bed.withdraw(&told)
    })
}

/// What comes back is the server's name on a line, and then what was sent.
fn echo(namespace: &Namespace, at: SocketAddr) -> Result<()> {
    namespace.enter(|| {
        let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = stream.try_clone()?;
        let sent: Vec<u8> = (0..LARGE).map(|at| b'a' + (at % 23) as u8).collect();
        let heard = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                stream.write_all(&sent)?;
                stream.shutdown(Shutdown::Write)
            });
            let mut heard = Vec::new();
            reader.read_to_end(&mut heard)?;
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            anyhow::Ok(heard)
        })?;
        let said = heard.split_at_checked(heard.len().saturating_sub(LARGE));
        let is_right = said.is_some_and(|(name, echo)| name.starts_with(b"web-") && echo == sent);
        ensure!(is_right, "{at}: {} bytes came back of {LARGE}", heard.len());
        Ok(())
    })?
}

/// In fragments, whatever the size.
#[test]
fn should_be_able_to_handle_large_requests_udp() -> Result<()> {
    only_in_full!();
    on_both(|bed| {
        let told = Told::of("large-udp", 41, &[&bed.webs[0], &bed.webs[1], &bed.webs[2]]);
        bed.tell(&told)?;
        for family in Family::BOTH {
            let [_, at] = told.cluster(family);
            for place in [bed.clients[0].place(), bed.host(0)] {
                for size in ["2000", "9000", "40000"] {
                    let datagrams = place.send(at, 12, &["--fresh", "--size", size])?;
                    datagrams.check()?;
                }
            }
        }
        bed.withdraw(&told)
    })
}
