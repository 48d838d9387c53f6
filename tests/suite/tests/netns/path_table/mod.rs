//! The path table: every kind of client at every kind of frontend, with real sockets through real agents, held against the
//! oracle ([`dataplane_oracle`]).
//!
//! A cell is a client, what stands behind the service, the frontend it asks, the service's policy, a protocol and a family. Ports
//! of nodes that are pods' (`hostPort`) are frontends without a policy. SCTP is asked and answered by raw sockets, which any
//! kernel has.
//! One cluster of three nodes for each way of routing, with and without connect-time translation; all services are there at
//! once. A sample runs by default, the same every time; with `DATAPLANE_FULL=1` (`cargo xtask test --full`) all of it.
//! Where `KUBE_PROXY` names one, and `KUBEBUILDER_ASSETS` an API server, the oracle itself is held against kube-proxy.

mod bed;
mod cells;
mod host_ports;
mod judge;
mod known;
mod services;

use std::{env, path::Path, thread};

use anyhow::{Context as _, Result, bail};
use dataplane_oracle::{Protocol, Verdict};
use dataplane_testkit::{
    lab::{Place, Routing},
    run,
    traffic::report::{Probe, ProbeResult, Transport},
};

use self::{
    bed::Bed,
    cells::{Asker, Cell, Frontend, Policy},
    judge::{Sheet, timeout_ms},
};

/// What the datapath serves. One that is not here is not part of the services, either.
const FRONTENDS: &[Frontend] = &Frontend::ALL;
/// What the datapath obeys.
const POLICIES: &[Policy] = &Policy::ALL;
/// Cells of each cluster that run by default: three of each frontend by each protocol.
const SAMPLE: usize = 3 * Frontend::ALL.len() * Protocol::ALL.len();

#[test]
fn native_with_connect_time() -> Result<()> {
    ours(Routing::Native, true, false)
}

#[test]
fn native_by_packets_alone() -> Result<()> {
    ours(Routing::Native, false, false)
}

#[test]
fn overlay_with_connect_time() -> Result<()> {
    ours(Routing::Vxlan, true, false)
}

#[test]
fn overlay_by_packets_alone() -> Result<()> {
    ours(Routing::Vxlan, false, false)
}

#[test]
fn native_in_the_driver() -> Result<()> {
    ours(Routing::Native, false, true)
}

#[test]
fn overlay_beside_the_driver() -> Result<()> {
    ours(Routing::Vxlan, true, true)
}

/// The oracle's own proof: all of the table, whatever of it is ours already.
#[test]
fn kube_proxy_is_as_the_oracle_says() -> Result<()> {
    let Some(program) = env::var_os("KUBE_PROXY") else {
        run::skip("KUBE_PROXY names no kube-proxy to hold the oracle against");
        return Ok(());
    };
    if env::var_os("KUBEBUILDER_ASSETS").is_none() {
        run::skip("KUBEBUILDER_ASSETS names no kube-apiserver for kube-proxy");
        return Ok(());
    }
    let protocols = protocols(true);
    let bed = Bed::peer(Path::new(&program), &Frontend::SERVICES, &Policy::ALL)?;
    table(&bed, &cells::all(&Frontend::SERVICES, &Policy::ALL, &protocols))
}

fn ours(routing: Routing, connect_time: bool, xdp: bool) -> Result<()> {
    let all = cells::all(FRONTENDS, POLICIES, &protocols(false));
    let cells = if run::is_full() { all } else { cells::sample(all, SAMPLE) };
    let bed = Bed::ours((routing, connect_time, xdp), FRONTENDS, POLICIES)?;
    table(&bed, &cells)?;
    bed.expect_loops(&cells)?;
    if xdp && routing == Routing::Native {
        bed.expect_turned_round()?;
    }
    if run::is_full() {
        let mode = bed.mode();
        run::summarize(&format!("path table, {mode}: not asked: {}", missing()));
    }
    Ok(())
}

/// Those that can be asked here; `by_kernel`: netfilter translates them.
fn protocols(by_kernel: bool) -> Vec<Protocol> {
    let missing = if Path::new("/proc/net/sctp").exists() {
        Some("the kernel has SCTP, which would answer beside the table's servers")
    } else if by_kernel && !Path::new("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_closed").exists() {
        Some("the kernel's connection tracking has no SCTP for kube-proxy")
    } else {
        None
    };
    if let Some(missing) = missing {
        run::skip(&format!("{missing}: all but SCTP is asked"));
    }
    Protocol::ALL.into_iter().filter(|protocol| *protocol != Protocol::Sctp || missing.is_none()).collect()
}

fn table(bed: &Bed, cells: &[Cell]) -> Result<()> {
    let mode = bed.mode();
    let asked = ask(bed, cells).map_err(|error| error.context(bed.evidence()))?;
    let sheet = asked.judge(mode, run::is_full());
    if run::is_full() {
        run::summarize(&format!("path table, {mode}: {}", sheet.summary()));
        for known in sheet.known() {
            run::summarize(&format!("path table, {mode}: known: {known}"));
        }
    }
    if let Some(wrong) = sheet.wrong() {
        bail!("{mode}: {}\n{wrong}\n{}", sheet.summary(), bed.evidence());
    }
    Ok(())
}

/// What the table has, and these services have not.
fn missing() -> String {
    let frontends = Frontend::ALL.iter().filter(|frontend| !FRONTENDS.contains(frontend));
    let policies = Policy::ALL.iter().filter(|policy| !POLICIES.contains(policy));
    let all: Vec<String> = frontends
        .map(|frontend| format!("{frontend:?}"))
        .chain(policies.map(|policy| format!("policy {policy:?}")))
        .collect();
    if all.is_empty() { "nothing".to_owned() } else { all.join(", ") }
}

/// Every client asks all its questions at once, beside the others.
fn ask(bed: &Bed, cells: &[Cell]) -> Result<Sheet> {
    let mut sheet = Sheet::default();
    let questions = with_ports(cells);
    let of = |asker| {
        questions.iter().copied().filter(move |(cell, _)| cell.asker == asker).collect::<Vec<Question>>()
    };
    let groups: Vec<(&Place, Vec<Question>)> =
        Asker::ALL.into_iter().map(|asker| (bed.place(asker), of(asker))).collect();
    thread::scope(|scope| {
        let threads: Vec<_> =
            groups.iter().map(|(place, cells)| scope.spawn(move || ask_from(bed, place, cells))).collect();
        for thread in threads {
            for (cell, expected, heard) in
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?
            {
                sheet.add(cell, &expected, &heard, bed);
            }
        }
        Ok(sheet)
    })
}

/// A cell, and the first of the ports it is asked from.
type Question = (Cell, Option<u16>);
type Asked = (Cell, Verdict, ProbeResult);

/// Over UDP every cell has ports of its own: a backend that is asked from one port through two names, on two nodes, answers
/// under the first, as UDP has no end. They are above the ports of nodes and below those of masquerade.
fn with_ports(cells: &[Cell]) -> Vec<Question> {
    let mut free = (33_000..61_000).step_by(Probe::PORTS.into());
    let question = |cell: &Cell| {
        let is_udp = cell.protocol == Protocol::Udp;
        (*cell, is_udp.then(|| free.next().expect("ports for a table")))
    };
    cells.iter().map(question).collect()
}

fn ask_from(bed: &Bed, place: &Place, questions: &[Question]) -> Result<Vec<Asked>> {
    let expected = questions
        .iter()
        .map(|(cell, _)| bed.expected(*cell).with_context(|| cell.to_string()))
        .collect::<Result<Vec<_>>>()?;
    let probe = |(number, ((cell, ports), expected)): (usize, (&Question, &Verdict))| Probe {
        number,
        server: bed.frontend(*cell),
        transport: match cell.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        },
        servers: judge::servers(expected),
        timeout_ms: timeout_ms(expected),
        ports: *ports,
    };
    let probes: Vec<Probe> = questions.iter().zip(&expected).enumerate().map(probe).collect();
    let heard = place.probe(&probes)?;
    Ok(questions
        .iter()
        .zip(expected)
        .zip(heard)
        .map(|(((cell, _), expected), heard)| (*cell, expected, heard))
        .collect())
}
