//! The path table: every kind of client connects to every kind of frontend, with real sockets
//! through real agents. The results are compared with the oracle ([`dataplane_oracle`]).
//!
//! A cell is a client, the backends of the service, the frontend, the traffic policy, a protocol
//! and an address family. Host ports are frontends without a policy. SCTP uses raw sockets on both
//! sides, which every kernel has.
//!
//! There is one cluster of three nodes for each routing mode, with and without connect-time
//! translation; all services exist at once. By default a sample of the cells runs, the same every
//! time; with `DATAPLANE_FULL=1` (`cargo xtask test --full`) all cells run. If `KUBE_PROXY` is the
//! path of kube-proxy and `KUBEBUILDER_ASSETS` has an API server, kube-proxy is compared with the
//! oracle, too.

mod cells;
mod host_ports;
mod known_failures;
mod results;
mod services;
mod testbed;

use std::{env, path::Path, thread};

use anyhow::{Context as _, Result, bail};
use dataplane_oracle::{Protocol, Verdict};
use dataplane_testkit::{
    lab::{Place, Routing},
    run,
    traffic::report::{Probe, ProbeResult, Transport},
};

use self::{
    cells::{Cell, ClientKind, Frontend, Policy},
    results::{Results, timeout_ms},
    testbed::Testbed,
};

/// Frontends that the datapath implements. The services have no others.
const FRONTENDS: &[Frontend] = &Frontend::ALL;
/// Traffic policies that the datapath implements.
const POLICIES: &[Policy] = &Policy::ALL;
/// Cells of each cluster that run by default: three for each frontend and protocol.
const SAMPLE: usize = 3 * Frontend::ALL.len() * Protocol::ALL.len();

#[test]
fn native_with_connect_time_translation() -> Result<()> {
    run_table(Routing::Native, true, false)
}

#[test]
fn native_per_packet() -> Result<()> {
    run_table(Routing::Native, false, false)
}

#[test]
fn overlay_with_connect_time_translation() -> Result<()> {
    run_table(Routing::Vxlan, true, false)
}

#[test]
fn overlay_per_packet() -> Result<()> {
    run_table(Routing::Vxlan, false, false)
}

#[test]
fn native_by_xdp() -> Result<()> {
    run_table(Routing::Native, false, true)
}

#[test]
fn overlay_with_xdp() -> Result<()> {
    run_table(Routing::Vxlan, true, true)
}

/// Verifies the oracle: kube-proxy gives the expected result in every cell of its frontends.
#[test]
fn kube_proxy_agrees_with_the_oracle() -> Result<()> {
    let Some(program) = env::var_os("KUBE_PROXY") else {
        run::skip("KUBE_PROXY is not set: kube-proxy is not compared with the oracle");
        return Ok(());
    };
    if env::var_os("KUBEBUILDER_ASSETS").is_none() {
        run::skip("KUBEBUILDER_ASSETS is not set: kube-proxy needs its kube-apiserver");
        return Ok(());
    }
    let protocols = protocols(true);
    let testbed = Testbed::kube_proxy(Path::new(&program), &Frontend::SERVICES, &Policy::ALL)?;
    run_cells(&testbed, &cells::all(&Frontend::SERVICES, &Policy::ALL, &protocols))
}

fn run_table(routing: Routing, connect_time: bool, xdp: bool) -> Result<()> {
    let all = cells::all(FRONTENDS, POLICIES, &protocols(false));
    let cells = if run::is_full() { all } else { cells::sample(all, SAMPLE) };
    let testbed = Testbed::dataplane((routing, connect_time, xdp), FRONTENDS, POLICIES)?;
    run_cells(&testbed, &cells)?;
    testbed.expect_loop_drops(&cells)?;
    if xdp && routing == Routing::Native {
        testbed.expect_forwarded_by_xdp()?;
    }
    if run::is_full() {
        let mode = testbed.mode();
        run::summarize(&format!("path table, {mode}: not covered: {}", missing()));
    }
    Ok(())
}

/// The protocols that can be tested here; `by_kernel`: netfilter translates them.
fn protocols(by_kernel: bool) -> Vec<Protocol> {
    let missing = if Path::new("/proc/net/sctp").exists() {
        Some("the kernel has SCTP, which would reply in addition to the servers of the tests")
    } else if by_kernel && !Path::new("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_closed").exists() {
        Some("the kernel's connection tracking has no SCTP for kube-proxy")
    } else {
        None
    };
    if let Some(missing) = missing {
        run::skip(&format!("{missing}: SCTP is not tested"));
    }
    Protocol::ALL.into_iter().filter(|protocol| *protocol != Protocol::Sctp || missing.is_none()).collect()
}

fn run_cells(testbed: &Testbed, cells: &[Cell]) -> Result<()> {
    let mode = testbed.mode();
    let results = probe_all(testbed, cells).map_err(|error| error.context(testbed.evidence()))?;
    let summary = results.summarize(mode, run::is_full());
    if run::is_full() {
        run::summarize(&format!("path table, {mode}: {}", summary.counts()));
        for known in summary.known() {
            run::summarize(&format!("path table, {mode}: known: {known}"));
        }
    }
    if let Some(wrong) = summary.wrong() {
        bail!("{mode}: {}\n{wrong}\n{}", summary.counts(), testbed.evidence());
    }
    Ok(())
}

/// Frontends and policies of the table that the datapath does not implement.
fn missing() -> String {
    let frontends = Frontend::ALL.iter().filter(|frontend| !FRONTENDS.contains(frontend));
    let policies = Policy::ALL.iter().filter(|policy| !POLICIES.contains(policy));
    let all: Vec<String> = frontends
        .map(|frontend| format!("{frontend:?}"))
        .chain(policies.map(|policy| format!("policy {policy:?}")))
        .collect();
    if all.is_empty() { "nothing".to_owned() } else { all.join(", ") }
}

/// Runs the queries of all clients in parallel.
fn probe_all(testbed: &Testbed, cells: &[Cell]) -> Result<Results> {
    let mut results = Results::default();
    let queries = with_ports(cells);
    let of = |client| {
        queries.iter().copied().filter(move |(cell, _)| cell.client == client).collect::<Vec<Query>>()
    };
    let groups: Vec<(&Place, Vec<Query>)> =
        ClientKind::ALL.into_iter().map(|client| (testbed.place(client), of(client))).collect();
    thread::scope(|scope| {
        let threads: Vec<_> = groups
            .iter()
            .map(|(place, cells)| scope.spawn(move || probe_from(testbed, place, cells)))
            .collect();
        for thread in threads {
            for (cell, expected, report) in
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?
            {
                results.add(cell, &expected, &report, testbed);
            }
        }
        Ok(results)
    })
}

/// A cell, and the first of its source ports.
type Query = (Cell, Option<u16>);
type Observed = (Cell, Verdict, ProbeResult);

/// Gives every UDP cell source ports of its own: if a backend gets datagrams from one port through
/// two frontends on two nodes, it replies through the first, because a UDP flow has no end. The
/// ports are above the node ports and below the ports of masquerade.
fn with_ports(cells: &[Cell]) -> Vec<Query> {
    let mut free = (33_000..61_000).step_by(Probe::PORTS.into());
    let query = |cell: &Cell| {
        let is_udp = cell.protocol == Protocol::Udp;
        (*cell, is_udp.then(|| free.next().expect("ports for a table")))
    };
    cells.iter().map(query).collect()
}

fn probe_from(testbed: &Testbed, place: &Place, queries: &[Query]) -> Result<Vec<Observed>> {
    let expected = queries
        .iter()
        .map(|(cell, _)| testbed.expected(*cell).with_context(|| cell.to_string()))
        .collect::<Result<Vec<_>>>()?;
    let probe = |(number, ((cell, ports), expected)): (usize, (&Query, &Verdict))| Probe {
        number,
        server: testbed.frontend(*cell),
        transport: match cell.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        },
        servers: results::servers(expected),
        timeout_ms: timeout_ms(expected),
        ports: *ports,
    };
    let probes: Vec<Probe> = queries.iter().zip(&expected).enumerate().map(probe).collect();
    let mut report = place.probe(&probes)?;
    repeat_unrefused(place, &probes, &expected, &mut report)?;
    Ok(queries
        .iter()
        .zip(expected)
        .zip(report)
        .map(|(((cell, _), expected), report)| (*cell, expected, report))
        .collect())
}

/// Repeats the probes that should have been refused and got no response: refusals are limited, to
/// one a second for a client outside. A round lasts until the timeout of its probes, in which the
/// budget allows one more refusal at least, so the number of rounds is bounded.
fn repeat_unrefused(
    place: &Place,
    probes: &[Probe],
    expected: &[Verdict],
    report: &mut [ProbeResult],
) -> Result<()> {
    loop {
        let unrefused: Vec<Probe> = probes
            .iter()
            .zip(expected)
            .zip(&*report)
            .filter(|((_, expected), result)| results::is_unrefused(expected, result))
            .map(|((probe, _), _)| probe.clone())
            .collect();
        if unrefused.is_empty() {
            return Ok(());
        }
        let repeated = place.probe(&unrefused)?;
        let refused = repeated.iter().any(|result| result.refused > 0);
        for result in repeated {
            let number = result.number;
            report[number] = result;
        }
        // what is never refused stays wrong
        if !refused {
            return Ok(());
        }
    }
}
