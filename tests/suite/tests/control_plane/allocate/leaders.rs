//! Leader election: the Lease, clock skew, and the first steps of a new leader.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dataplane_fake_apiserver::{Fault, Requests};
use dataplane_testkit::lab::wait;
use serde_json::json;

use super::{LEASE, TIMEOUT, Testbed, node};

#[test]
fn no_range_is_assigned_twice_when_the_leader_is_killed_while_it_writes() -> Result<()> {
    let testbed = Testbed::new()?;
    let arguments = "--cluster-cidr 10.1.0.0/16";
    let a = testbed.allocator("a", arguments)?;
    testbed.wait_holder("a")?;
    testbed.add("n0", &[])?;
    testbed.wait_all(1)?;
    // the next write of the leader hangs in the API server
    let writes = Requests { user: Some("a".to_owned()), ..Requests::to("patch", "nodes") };
    testbed.server.faults().always(writes, Fault::Delay(Duration::from_secs(60)));
    let versions: Vec<_> = (1..9)
        .map(|number| {
            let node = testbed.add(&format!("n{number}"), &[])?;
            Ok(node["metadata"]["resourceVersion"].clone())
        })
        .collect::<Result<_>>()?;
    wait::until("the leader writes", TIMEOUT, || Ok((testbed.server.faults().hits() != [0]).then_some(())))?;
    let b = testbed.allocator("b", arguments)?;
    a.kill()?;
    let lease = testbed.wait_holder("b")?;
    ensure!(lease["spec"]["leaseTransitions"] == 1, "{lease}");
    testbed.wait_all(1)?;
    // the writes of the killed leader arrive late
    for (number, version) in (1..9).zip(versions) {
        let late = json!({
            "metadata": {"resourceVersion": version},
            "spec": {"podCIDR": "10.1.1.0/24", "podCIDRs": ["10.1.1.0/24"]},
        });
        let refused = testbed.objects.patch(&node(&format!("n{number}"), &[]), &late);
        let refused = format!("{:?}", refused.err().context("a late write succeeded")?);
        ensure!(refused.contains("409") || refused.contains("Conflict"), "{refused}");
    }
    testbed.wait_all(1)?;
    ensure!(b.metric("dataplane_allocator_leader")? == Some(1.0));
    Ok(())
}

#[test]
fn a_new_leader_fences_nodes_before_it_assigns_ranges() -> Result<()> {
    let testbed = Testbed::new()?;
    // there is one range: if both the late write and the new leader assigned it, two nodes had it
    let first = testbed.add("n0", &[])?;
    testbed.add("n1", &[])?;
    // the delay separates the new leader's first write, the fence, from the assignment
    let writes = Requests { user: Some("b".to_owned()), ..Requests::to("patch", "nodes") };
    testbed.server.faults().next(1, writes.clone(), Fault::Delay(Duration::from_millis(1)));
    let b = testbed.allocator("b", "--cluster-cidr 10.1.0.0/24")?;
    wait::until("the first write", TIMEOUT, || {
        let node = testbed.objects.get("v1", "Node", "", "n0")?.context("n0")?;
        Ok((node["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]).then_some(()))
    })?;
    let late = json!({
        "metadata": {"resourceVersion": first["metadata"]["resourceVersion"]},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]},
    });
    ensure!(testbed.objects.patch(&node("n0", &[]), &late).is_err(), "the late write succeeded");
    wait::until("one node has the range", TIMEOUT, || {
        let assigned: usize = testbed.ranges()?.values().map(Vec::len).sum();
        ensure!(assigned < 2, "both nodes have the range");
        Ok((assigned == 1).then_some(()))
    })?;
    let marked = testbed.objects.get("v1", "Node", "", "n0")?.context("n0")?;
    ensure!(marked["metadata"]["annotations"]["dataplane.local/allocator"] == "b/1", "{marked}");
    drop(b);
    Ok(())
}

#[test]
fn clock_skew_neither_shortens_nor_extends_the_lease() -> Result<()> {
    for clock in ["2001-01-01T00:00:00.000000Z", "2101-01-01T00:00:00.000000Z"] {
        let testbed = Testbed::new()?;
        testbed.add("n0", &[])?;
        testbed.objects.create(&json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "dataplane-allocator", "namespace": "kube-system"},
            "spec": {
                "holderIdentity": "gone", "leaseDurationSeconds": LEASE, "leaseTransitions": 6,
                "acquireTime": clock, "renewTime": clock,
            },
        }))?;
        let began = Instant::now();
        let _a = testbed.allocator("a", "--cluster-cidr 10.1.0.0/16")?;
        let lease = testbed.wait_holder("a")?;
        let took = began.elapsed();
        ensure!(took >= Duration::from_secs(LEASE), "{clock}: taken after {took:?}");
        ensure!(took < Duration::from_secs(LEASE + 5), "{clock}: taken after {took:?}");
        ensure!(lease["spec"]["leaseTransitions"] == 7, "{lease}");
        testbed.wait_all(1)?;
    }
    Ok(())
}

#[test]
fn a_stopped_leader_releases_the_lease_at_once() -> Result<()> {
    let testbed = Testbed::new()?;
    let arguments = "--cluster-cidr 10.1.0.0/16";
    let a = testbed.allocator("a", arguments)?;
    testbed.wait_holder("a")?;
    let b = testbed.allocator("b", arguments)?;
    wait::until("b follows a", TIMEOUT, || {
        let (code, text) = b.http("/readyz")?;
        Ok((code == 200 && text.contains(r#""leader":"a""#)).then_some(()))
    })?;
    let began = Instant::now();
    a.terminate()?;
    testbed.wait_holder("b")?;
    ensure!(began.elapsed() < Duration::from_secs(LEASE), "{:?}", began.elapsed());
    testbed.add("n0", &[])?;
    testbed.wait_all(1)?;
    Ok(())
}
