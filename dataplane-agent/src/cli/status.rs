//! Text output of `status`.

use std::{
    fmt::{self, Write},
    time::{Duration, SystemTime},
};

use super::{
    table::{list, or_dash, table, text},
    text::duration,
};
use crate::api::views::{Moment, SourceView, Status, StatusView, unix_seconds};

/// Most drop reasons shown; `-o json` has every counter.
const DROPS_SHOWN: usize = 10;

pub(super) fn status(view: &StatusView) -> String {
    let mut out = String::new();
    let written = write_all(&mut out, view);
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
    out
}

fn write_all(out: &mut String, view: &StatusView) -> fmt::Result {
    let status = &view.status;
    write_head(out, status)?;
    write_problems(out, status)?;
    write_network(out, view)?;
    write_tables(out, status)?;
    write_drops(out, view)
}

fn write_head(out: &mut String, status: &Status) -> fmt::Result {
    let up = duration(status.started.elapsed());
    writeln!(out, "Node       {}", status.node)?;
    writeln!(
        out,
        "Agent      {} (table layout v{}), pid {}, up {up}",
        status.version, status.abi, status.pid
    )?;
    writeln!(out, "Ready      {}", if status.is_ready() { "yes" } else { "no" })?;
    for failing in &status.not_ready {
        writeln!(out, "           {}: {}", failing.check, failing.reason)?;
    }
    let applied = if status.applied_revision == status.revision {
        "applied".to_owned()
    } else {
        format!("applied up to {}", status.applied_revision)
    };
    let synced = if status.synced { "source synced" } else { "source not synced" };
    writeln!(out, "Revision   {}, {applied}, {synced}", status.revision)?;
    writeln!(out, "Source     {}", source(&status.source))?;
    let objects = status.objects;
    writeln!(
        out,
        "Objects    {} nodes, {} services, {} endpoint slices, {} pods on this node",
        objects.nodes, objects.services, objects.endpoint_slices, objects.pods
    )?;
    let ago = |moment: Option<Moment>| match moment {
        Some(moment) => format!("{} ago", duration(moment.elapsed())),
        None => "never".to_owned(),
    };
    writeln!(out, "Last event {}, last audit {}", ago(status.last_event), ago(status.last_audit))?;
    let reconcile = status.reconcile;
    writeln!(
        out,
        "Writes     {} failed, {} retried, {} pending; audits found {} changed rows",
        reconcile.errors, reconcile.retries, reconcile.pending, reconcile.drift
    )?;
    let egress = &status.egress;
    let reason = if egress.reason.is_empty() { String::new() } else { format!(": {}", egress.reason) };
    writeln!(out, "Egress     {}{reason}", or_dash(Some(&egress.way).filter(|way| !way.is_empty())))?;
    writeln!(out, "Adopted    {} pinned tables of an earlier agent", status.pins_adopted)
}

fn source(source: &SourceView) -> String {
    let SourceView { name, behind_since, relists, watch_errors, failovers } = source;
    if name != "kubernetes" {
        return or_dash((!name.is_empty()).then_some(name));
    }
    let state = match behind_since {
        None => "watching the cluster".to_owned(),
        Some(since) => {
            let age = unix_seconds(SystemTime::now()).saturating_sub(*since);
            format!("state is {} old", duration(Duration::from_secs(age)))
        }
    };
    format!("{name}: {state}; {relists} relists, {watch_errors} watch errors, {failovers} failovers")
}

fn write_problems(out: &mut String, status: &Status) -> fmt::Result {
    if status.problems.is_empty() {
        return Ok(());
    }
    let mut rows = table(["ORIGIN", "SUBJECT", "PROBLEM"]);
    for problem in &status.problems {
        rows.add_row([problem.origin.name(), &problem.subject, &problem.message]);
    }
    write!(out, "\n{}", text(&rows))
}

fn write_network(out: &mut String, view: &StatusView) -> fmt::Result {
    let mut rows = table(["UPLINK", "MTU", "SERVICE-HOOK", "ADDRESSES", "REASON"]);
    for uplink in &view.status.uplinks {
        rows.add_row([
            uplink.device.clone(),
            uplink.mtu.to_string(),
            uplink.service_hook.clone(),
            list(&uplink.addresses),
            or_dash(Some(&uplink.reason).filter(|reason| !reason.is_empty())),
        ]);
    }
    if !view.status.uplinks.is_empty() {
        write!(out, "\n{}", text(&rows))?;
    }
    let mut rows = table(["NOT-UPLINK", "REASON"]);
    for device in &view.status.other_devices {
        rows.add_row([&device.device, &device.reason]);
    }
    if !view.status.other_devices.is_empty() {
        write!(out, "\n{}", text(&rows))?;
    }
    let mut rows = table(["NODE", "ROUTING", "INTERNAL-IPS", "POD-CIDRS"]);
    for node in &view.status.nodes {
        rows.add_row([
            node.name.clone(),
            node.routing.clone(),
            list(&node.internal_ips),
            list(&node.pod_cidrs),
        ]);
    }
    if !view.status.nodes.is_empty() {
        write!(out, "\n{}", text(&rows))?;
    }
    let mut rows = table(["POD-CIDR", "USED", "FREE"]);
    for range in &view.ipam {
        rows.add_row([range.cidr.to_string(), range.used.to_string(), range.free.to_string()]);
    }
    if !view.ipam.is_empty() {
        write!(out, "\n{}", text(&rows))?;
    }
    Ok(())
}

fn write_tables(out: &mut String, status: &Status) -> fmt::Result {
    let mut rows = table(["TABLE", "USED", "CAPACITY", "USE%", "WRITES", "REMOVALS"]);
    for row in &status.tables {
        let percent = (row.used * 100).checked_div(row.capacity).map(|percent| format!("{percent}%"));
        rows.add_row([
            row.name.clone(),
            row.used.to_string(),
            row.capacity.to_string(),
            or_dash(percent),
            row.writes.to_string(),
            row.removals.to_string(),
        ]);
    }
    if status.tables.is_empty() {
        return Ok(());
    }
    write!(out, "\n{}", text(&rows))
}

fn write_drops(out: &mut String, view: &StatusView) -> fmt::Result {
    let drops: Vec<_> = view.outcomes.iter().filter(|count| count.dropped).collect();
    if drops.is_empty() {
        return writeln!(out, "\nNo packets dropped.");
    }
    let mut rows = table(["DROPPED", "REASON", "HOOK", "DESCRIPTION"]);
    for count in drops.iter().take(DROPS_SHOWN) {
        rows.add_row([&count.packets.to_string(), &count.outcome, &count.hook, &count.text]);
    }
    write!(out, "\n{}", text(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::views::{CountView, Origin, OtherDeviceView, ProblemView, TableView, UplinkView};

    fn view() -> StatusView {
        StatusView {
            status: Status::starting("node-1"),
            ready: false,
            outcomes: Vec::new(),
            ipam: Vec::new(),
        }
    }

    #[test]
    fn agent_that_is_not_ready_shows_the_failing_check() {
        let out = status(&view());
        assert!(out.contains("Ready      no\n           start: the agent is starting\n"), "{out}");
        assert!(out.contains("source not synced"), "{out}");
        assert!(out.ends_with("\nNo packets dropped.\n"), "{out}");
    }

    #[test]
    fn every_device_has_the_reason_why_it_is_an_uplink_or_not() {
        let mut view = view();
        view.status.uplinks = vec![UplinkView {
            device: "eth0".to_owned(),
            ifindex: 2,
            mtu: 1_500,
            addresses: vec!["10.0.0.5/24".parse().unwrap()],
            service_hook: "tc".to_owned(),
            reason: "has an address of the node".to_owned(),
        }];
        view.status.other_devices = vec![OtherDeviceView {
            device: "lo".to_owned(),
            ifindex: 1,
            reason: "loopback device".to_owned(),
        }];
        let out = status(&view);
        assert!(
            out.contains("eth0    1500  tc            10.0.0.5/24  has an address of the node\n"),
            "{out}"
        );
        assert!(out.contains("\nNOT-UPLINK  REASON\nlo          loopback device\n"), "{out}");
    }

    #[test]
    fn problems_tables_and_drops_have_a_section_each() {
        let mut view = view();
        view.status.problems = vec![ProblemView {
            origin: Origin::Source,
            subject: "web.yaml: Service default/web".to_owned(),
            message: "spec.clusterIP: no address".to_owned(),
        }];
        view.status.tables =
            vec![TableView { name: "SERVICES".to_owned(), used: 25, capacity: 100, writes: 30, removals: 5 }];
        view.outcomes = vec![CountView {
            hook: "from_pod".to_owned(),
            outcome: "no_backend".to_owned(),
            dropped: true,
            text: "The service has no ready backend.".to_owned(),
            packets: 12,
        }];
        let out = status(&view);
        let line = |word: &str| {
            let line =
                out.lines().find(|line| line.contains(word)).unwrap_or_else(|| panic!("{word} in {out}"));
            line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>()
        };
        assert_eq!(
            line("web.yaml"),
            ["source", "web.yaml: Service default/web", "spec.clusterIP: no address"]
        );
        assert_eq!(line("SERVICES"), ["SERVICES", "25", "100", "25%", "30", "5"]);
        assert_eq!(line("no_backend"), ["12", "no_backend", "from_pod", "The service has no ready backend."]);
    }
}
