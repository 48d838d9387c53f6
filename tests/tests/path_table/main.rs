//! The path table: every kind of client at every kind of frontend, with real sockets through real agents, held against the
//! oracle ([`dataplane_tests::oracle`]).
//!
//! A cell is a client, what stands behind the service, the frontend it asks, the service's policy, a protocol and a family.
//! One cluster of three nodes for each way of routing, with and without connect-time translation; all services are there at
//! once. A sample runs by default, the same every time; with `DATAPLANE_FULL=1` (`cargo xtask test --full`) all of it.

mod bed;
mod cells;
mod judge;
mod known;
mod services;

use std::{env, thread};

use anyhow::{Context as _, Result, bail};
use dataplane_tests::{
    lab::{Place, Routing},
    oracle::Verdict,
    traffic::report::{Heard, Probe, Transport},
};

use self::{
    bed::Bed,
    cells::{Asker, Cell, Frontend, Policy},
    judge::{Sheet, patience_ms},
    known::Mode,
};

/// What the datapath serves. One that is not here is not part of the services, either.
const FRONTENDS: &[Frontend] = &[Frontend::ClusterIp];
/// What the datapath obeys.
const POLICIES: &[Policy] = &[Policy::Cluster];
/// Cells of each cluster that run by default.
const SAMPLE: usize = 75;

#[test]
fn native_with_connect_time() -> Result<()> {
    table(Mode { routing: Routing::Native, connect_time: true })
}

#[test]
fn native_by_packets_alone() -> Result<()> {
    table(Mode { routing: Routing::Native, connect_time: false })
}

#[test]
fn overlay_with_connect_time() -> Result<()> {
    table(Mode { routing: Routing::Vxlan, connect_time: true })
}

#[test]
fn overlay_by_packets_alone() -> Result<()> {
    table(Mode { routing: Routing::Vxlan, connect_time: false })
}

fn table(mode: Mode) -> Result<()> {
    let is_full = env::var("DATAPLANE_FULL").is_ok_and(|value| value == "1");
    let all = cells::all(FRONTENDS, POLICIES);
    let cells = if is_full { all } else { cells::sample(all, SAMPLE) };
    let mut bed = Bed::create(mode, FRONTENDS, POLICIES)?;
    let asked = bed.lay_services().and_then(|()| ask(&bed, &cells));
    let sheet = bed.cluster().explain(asked)?.judge(mode, is_full);
    if is_full {
        note(&format!("path table, {mode}: {}; not asked: {}", sheet.summary(), missing()));
        sheet.known().iter().for_each(|known| note(&format!("path table, {mode}: known: {known}")));
    }
    if let Some(wrong) = sheet.wrong() {
        bail!("{mode}: {}\n{wrong}\n{}", sheet.summary(), bed.cluster().evidence());
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

#[expect(clippy::print_stdout, reason = "`cargo xtask test` repeats such lines at its end")]
fn note(text: &str) {
    println!("SUMMARY: {text}");
}

/// Every client asks all its questions at once, beside the others.
fn ask(bed: &Bed, cells: &[Cell]) -> Result<Sheet> {
    let mut sheet = Sheet::default();
    let of = |asker| cells.iter().copied().filter(move |cell| cell.asker == asker).collect::<Vec<Cell>>();
    let groups: Vec<(&Place, Vec<Cell>)> =
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

type Asked = (Cell, Verdict, Heard);

fn ask_from(bed: &Bed, place: &Place, cells: &[Cell]) -> Result<Vec<Asked>> {
    let expected = cells
        .iter()
        .map(|cell| bed.expected(cell).with_context(|| cell.to_string()))
        .collect::<Result<Vec<_>>>()?;
    let probe = |(number, (cell, expected)): (usize, (&Cell, &Verdict))| Probe {
        number,
        server: bed.frontend(cell),
        transport: if cell.is_udp { Transport::Udp } else { Transport::Tcp },
        servers: judge::servers(expected),
        patience_ms: patience_ms(expected),
    };
    let probes: Vec<Probe> = cells.iter().zip(&expected).enumerate().map(probe).collect();
    let heard = place.probe(&probes)?;
    Ok(cells
        .iter()
        .copied()
        .zip(expected)
        .zip(heard)
        .map(|((cell, expected), heard)| (cell, expected, heard))
        .collect())
}
