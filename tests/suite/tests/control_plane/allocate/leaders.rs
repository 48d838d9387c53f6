//! Who leads: leases, clocks, and what a new leader does first.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dataplane_fake_apiserver::{Fault, Requests};
use dataplane_testkit::lab::wait;
use serde_json::json;

use super::{Bed, LEASE, PATIENCE, node};

#[test]
fn a_leader_killed_while_it_writes_is_replaced_and_nothing_is_given_twice() -> Result<()> {
    let bed = Bed::new()?;
    let arguments = "--cluster-cidr 10.1.0.0/16";
    let a = bed.allocator("a", arguments)?;
    bed.wait_holder("a")?;
    bed.add("n0", &[])?;
    bed.wait_all(1)?;
    // the next write of the leader hangs in the API server
    let writes = Requests { user: Some("a".to_owned()), ..Requests::to("patch", "nodes") };
    bed.server.faults().always(writes, Fault::Delay(Duration::from_secs(60)));
    let versions: Vec<_> = (1..9)
        .map(|number| {
            let node = bed.add(&format!("n{number}"), &[])?;
            Ok(node["metadata"]["resourceVersion"].clone())
        })
        .collect::<Result<_>>()?;
    wait::until("the leader writes", PATIENCE, || Ok((bed.server.faults().hits() != [0]).then_some(())))?;
    let b = bed.allocator("b", arguments)?;
    a.kill()?;
    let lease = bed.wait_holder("b")?;
    ensure!(lease["spec"]["leaseTransitions"] == 1, "{lease}");
    bed.wait_all(1)?;
    // what the dead leader wrote arrives now, for whichever node it was
    for (number, version) in (1..9).zip(versions) {
        let late = json!({
            "metadata": {"resourceVersion": version},
            "spec": {"podCIDR": "10.1.1.0/24", "podCIDRs": ["10.1.1.0/24"]},
        });
        let refused = bed.objects.patch(&node(&format!("n{number}"), &[]), &late);
        let refused = format!("{:?}", refused.err().context("a late write was done")?);
        ensure!(refused.contains("409") || refused.contains("Conflict"), "{refused}");
    }
    bed.wait_all(1)?;
    ensure!(b.metric("dataplane_allocator_leader")? == Some(1.0));
    Ok(())
}

#[test]
fn a_new_leader_fences_nodes_before_it_gives_anything() -> Result<()> {
    let bed = Bed::new()?;
    // one range: if the late write and the new leader both gave it, two nodes would have it
    let first = bed.add("n0", &[])?;
    bed.add("n1", &[])?;
    // the new leader cannot write n0's range yet: its first write, the fence, is done, and the rest waits
    let writes = Requests { user: Some("b".to_owned()), ..Requests::to("patch", "nodes") };
    bed.server.faults().next(1, writes.clone(), Fault::Delay(Duration::from_millis(1)));
    let b = bed.allocator("b", "--cluster-cidr 10.1.0.0/24")?;
    wait::until("the first write", PATIENCE, || {
        let node = bed.objects.get("v1", "Node", "", "n0")?.context("n0")?;
        Ok((node["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]).then_some(()))
    })?;
    let late = json!({
        "metadata": {"resourceVersion": first["metadata"]["resourceVersion"]},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]},
    });
    ensure!(bed.objects.patch(&node("n0", &[]), &late).is_err(), "the late write was done");
    wait::until("one of them has the range", PATIENCE, || {
        let given: usize = bed.ranges()?.values().map(Vec::len).sum();
        ensure!(given < 2, "both have it");
        Ok((given == 1).then_some(()))
    })?;
    let marked = bed.objects.get("v1", "Node", "", "n0")?.context("n0")?;
    ensure!(marked["metadata"]["annotations"]["dataplane.local/allocator"] == "b/1", "{marked}");
    drop(b);
    Ok(())
}

#[test]
fn whose_clock_is_off_neither_takes_the_lease_early_nor_waits_longer() -> Result<()> {
    for clock in ["2001-01-01T00:00:00.000000Z", "2101-01-01T00:00:00.000000Z"] {
        let bed = Bed::new()?;
        bed.add("n0", &[])?;
        bed.objects.create(&json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "dataplane-allocator", "namespace": "kube-system"},
            "spec": {
                "holderIdentity": "gone", "leaseDurationSeconds": LEASE, "leaseTransitions": 6,
                "acquireTime": clock, "renewTime": clock,
            },
        }))?;
        let began = Instant::now();
        let _a = bed.allocator("a", "--cluster-cidr 10.1.0.0/16")?;
        let lease = bed.wait_holder("a")?;
        let took = began.elapsed();
        ensure!(took >= Duration::from_secs(LEASE), "{clock}: taken after {took:?}");
        ensure!(took < Duration::from_secs(LEASE + 5), "{clock}: taken after {took:?}");
        ensure!(lease["spec"]["leaseTransitions"] == 7, "{lease}");
        bed.wait_all(1)?;
    }
    Ok(())
}

#[test]
fn one_that_is_told_to_stop_lets_the_next_lead_at_once() -> Result<()> {
    let bed = Bed::new()?;
    let arguments = "--cluster-cidr 10.1.0.0/16";
    let a = bed.allocator("a", arguments)?;
    bed.wait_holder("a")?;
    let b = bed.allocator("b", arguments)?;
    wait::until("b waits", PATIENCE, || {
        let (code, text) = b.http("/readyz")?;
        Ok((code == 200 && text.contains(r#""leader":"a""#)).then_some(()))
    })?;
    let began = Instant::now();
    a.terminate()?;
    bed.wait_holder("b")?;
    ensure!(began.elapsed() < Duration::from_secs(LEASE), "{:?}", began.elapsed());
    bed.add("n0", &[])?;
    bed.wait_all(1)?;
    Ok(())
}
