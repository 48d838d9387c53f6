//! `dataplane-agent allocate` against an API server: which node gets which range, also when
//! allocators fail. Needs no root.

mod access;
mod leaders;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_fake_apiserver::{Failure, Fault, Objects, Requests, Server, User};
use dataplane_testkit::{bins, lab::wait};
use ipnet::IpNet;
use serde_json::{Value, json};

/// Most steps take milliseconds; a new leader takes seconds.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The shortest lease duration that the allocator accepts, in seconds.
const LEASE: u64 = 5;

/// An API server without nodes.
struct Testbed {
    server: Server,
    objects: Objects,
    directory: tempfile::TempDir,
}

/// A running allocator, killed on drop.
struct Allocator {
    child: Child,
    log: PathBuf,
}

impl Testbed {
    fn new() -> Result<Self> {
        let server = Server::local()?;
        let objects = server.objects()?;
        let namespace =
            |name: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        objects.apply(&[namespace("default"), namespace("kube-system")])?;
        Ok(Self { server, objects, directory: tempfile::tempdir()? })
    }

    fn user(name: &str) -> User {
        User { name: name.to_owned(), groups: vec!["system:masters".to_owned()] }
    }

    /// Starts an allocator with all permissions.
    fn allocator(&self, name: &str, arguments: &str) -> Result<Allocator> {
        self.allocator_as(name, &Self::user(name), arguments)
    }

    fn allocator_as(&self, name: &str, user: &User, arguments: &str) -> Result<Allocator> {
        let kubeconfig = self.directory.path().join(format!("{name}.kubeconfig"));
        fs::write(&kubeconfig, self.server.kubeconfig(user)?)?;
        let log = self.directory.path().join(format!("{name}.log"));
        let lease = LEASE.to_string();
        let child = Command::new(bins::agent()?)
            .args([
                "allocate",
                "--http-bind-address",
                "127.0.0.1:0",
                "--log-format",
                "json",
                "--lease-duration",
                &lease,
            ])
            .args(["--log", "info,dataplane_agent::allocate=debug", "--identity", name, "--kubeconfig"])
            .arg(&kubeconfig)
            .args(arguments.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        Ok(Allocator { child, log })
    }

    fn add(&self, name: &str, pod_cidrs: &[&str]) -> Result<Value> {
        let node = node(name, pod_cidrs);
        self.objects.create(&node)
    }

    /// The pod CIDRs of each node.
    fn ranges(&self) -> Result<BTreeMap<String, Vec<IpNet>>> {
        let nodes = self.objects.list("v1", "Node", "")?;
        nodes
            .iter()
            .map(|node| {
                let name = node["metadata"]["name"].as_str().context("a node has no name")?.to_owned();
                let ranges = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
                let ranges = ranges.map(|range| Ok(range.as_str().context("not a string")?.parse()?));
                Ok((name, ranges.collect::<Result<_>>()?))
            })
            .collect()
    }

    /// Waits until every node has `count` ranges, and checks that no two overlap.
    fn wait_all(&self, count: usize) -> Result<BTreeMap<String, Vec<IpNet>>> {
        let all = wait::until("every node has its ranges", TIMEOUT, || {
            let ranges = self.ranges()?;
            let missing: Vec<_> = ranges.iter().filter(|(_, ranges)| ranges.len() != count).collect();
            ensure!(missing.is_empty(), "nodes without: {missing:?}");
            Ok(Some(ranges))
        })?;
        let flat: Vec<_> =
            all.iter().flat_map(|(name, ranges)| ranges.iter().map(move |range| (name, range))).collect();
        for (index, (node, one)) in flat.iter().enumerate() {
            for (other, two) in &flat[index + 1..] {
                ensure!(!one.contains(*two) && !two.contains(*one), "{node} has {one}, {other} has {two}");
            }
        }
        Ok(all)
    }

    /// Waits for an Event about a node; returns its note.
    fn wait_event(&self, node: &str, reason: &str) -> Result<String> {
        wait::until(&format!("Event {reason} of {node}"), TIMEOUT, || {
            let events = self.objects.list("events.k8s.io/v1", "Event", "default")?;
            let found = events
                .iter()
                .find(|event| event["regarding"]["name"] == node && event["reason"] == reason)
                .and_then(|event| event["note"].as_str().map(str::to_owned));
            Ok(found)
        })
    }

    fn lease(&self) -> Result<Value> {
        let lease =
            self.objects.get("coordination.k8s.io/v1", "Lease", "kube-system", "dataplane-allocator")?;
        lease.context("no Lease")
    }

    fn wait_holder(&self, name: &str) -> Result<Value> {
        wait::until(&format!("{name} holds the Lease"), TIMEOUT, || {
            let lease = self.lease()?;
            Ok((lease["spec"]["holderIdentity"] == name).then_some(lease))
        })
    }
}

fn node(name: &str, pod_cidrs: &[&str]) -> Value {
    let mut node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {}});
    if let Some(first) = pod_cidrs.first() {
        node["spec"] = json!({"podCIDR": first, "podCIDRs": pod_cidrs});
    }
    node
}

impl Allocator {
    /// Waits until the process exits with an error; returns the message.
    fn wait_error(mut self) -> Result<String> {
        let status = wait::until("the allocator ends", TIMEOUT, || Ok(self.child.try_wait()?))?;
        ensure!(!status.success(), "the allocator exited without an error");
        let log = fs::read_to_string(&self.log)?;
        let message = log.lines().find_map(|line| line.strip_prefix("dataplane-agent: allocate: "));
        Ok(message.with_context(|| format!("no error in {log}"))?.to_owned())
    }

    fn terminate(mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let status = wait::until("the allocator ends", TIMEOUT, || Ok(self.child.try_wait()?))?;
        ensure!(status.success(), "{status}");
        Ok(())
    }

    /// Kills the process, as a crash would.
    fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn http(&self, path: &str) -> Result<(u16, String)> {
        let address = wait::until("the HTTP address in the log", TIMEOUT, || {
            let log = fs::read_to_string(&self.log)?;
            let found = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut found = found.filter(|line| line["message"] == "serving metrics and health");
            Ok(found.next().and_then(|line| line["address"].as_str().map(str::to_owned)))
        })?;
        get(&address, path)
    }

    fn metric(&self, name: &str) -> Result<Option<f64>> {
        let (_, text) = self.http("/metrics")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.map(str::parse).transpose()?)
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        // it may have exited
        let _killed = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn get(address: &str, path: &str) -> Result<(u16, String)> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let code = text.split(' ').nth(1).context("not an HTTP response")?.parse()?;
    Ok((code, text))
}

#[test]
fn nodes_get_one_range_of_each_family_and_keep_existing_ones() -> Result<()> {
    let testbed = Testbed::new()?;
    testbed.add("old", &["10.1.7.0/24", "fd00:1:0:7::/64"])?;
    for number in 0..5 {
        testbed.add(&format!("n{number}"), &[])?;
    }
    let allocator = testbed.allocator("a", "--cluster-cidr 10.1.0.0/16,fd00:1::/48")?;
    let all = testbed.wait_all(2)?;
    ensure!(all["old"] == ["10.1.7.0/24".parse()?, "fd00:1:0:7::/64".parse()?], "{all:?}");
    for (name, ranges) in &all {
        let lengths: Vec<_> = ranges.iter().map(IpNet::prefix_len).collect();
        ensure!(lengths == [24, 64], "{name}: {ranges:?}");
    }
    let first = testbed.objects.get("v1", "Node", "", "n0")?.context("n0")?;
    ensure!(first["spec"]["podCIDR"] == first["spec"]["podCIDRs"][0], "{first}");

    let began = Instant::now();
    testbed.add("late", &[])?;
    testbed.wait_all(2)?;
    let took = began.elapsed();
    eprintln!("a new node has its ranges after {took:?}");
    ensure!(took < Duration::from_secs(1), "{took:?}");

    ensure!(allocator.http("/healthz")?.0 == 200);
    ensure!(allocator.http("/readyz")?.0 == 200);
    ensure!(allocator.metric("dataplane_allocator_leader")? == Some(1.0));
    ensure!(allocator.metric("dataplane_allocator_assignments_total")? == Some(6.0));
    ensure!(allocator.metric("dataplane_allocator_ranges_used{family=\"ipv4\"}")? == Some(7.0));
    ensure!(allocator.metric("dataplane_allocator_ranges_free{family=\"ipv6\"}")? == Some(65_529.0));
    Ok(())
}

#[test]
fn lost_replies_assign_no_second_range() -> Result<()> {
    let testbed = Testbed::new()?;
    let _a = testbed.allocator("a", "--cluster-cidr 10.1.0.0/16")?;
    testbed.wait_holder("a")?;
    let lost = Fault::ExecuteThenRefuse(Failure::new(500, "InternalError", "timed out"));
    testbed.server.faults().next(5, Requests::to("patch", "nodes"), lost);
    for number in 0..8 {
        testbed.add(&format!("n{number}"), &[])?;
    }
    let all = testbed.wait_all(1)?;
    let used: Vec<_> = all.values().flatten().collect();
    ensure!(
        used.iter().all(|range| "10.1.0.0/21".parse::<IpNet>().is_ok_and(|first| first.contains(*range))),
        "{all:?}"
    );
    Ok(())
}

#[test]
fn exhaustion_is_an_event_and_ends_when_a_node_leaves() -> Result<()> {
    let testbed = Testbed::new()?;
    testbed.add("n0", &["10.1.0.0/24"])?;
    testbed.add("n1", &["10.1.1.0/24"])?;
    let _a = testbed.allocator("a", "--cluster-cidr 10.1.0.0/23")?;
    testbed.wait_holder("a")?;
    testbed.add("n2", &[])?;
    let note = testbed.wait_event("n2", "PodCIDRsExhausted")?;
    ensure!(note.contains("all 2 ranges of cluster CIDR 10.1.0.0/23 are assigned"), "{note}");
    testbed.objects.delete(&[node("n0", &[])])?;
    let all = testbed.wait_all(1)?;
    ensure!(all["n2"] == ["10.1.0.0/24".parse()?], "{all:?}");
    Ok(())
}

#[test]
fn overlapping_and_foreign_ranges_are_events() -> Result<()> {
    let testbed = Testbed::new()?;
    testbed.add("n0", &["10.1.0.0/24"])?;
    testbed.add("n1", &["10.1.0.0/24"])?;
    testbed.add("n2", &["10.1.2.0/24"])?;
    let a = testbed.allocator("a", "--cluster-cidr 10.1.0.0/16,fd00::/48")?;
    for (node, other) in [("n0", "n1"), ("n1", "n0")] {
        let note = testbed.wait_event(node, "PodCIDROverlap")?;
        ensure!(
            note.starts_with(&format!("pod CIDR 10.1.0.0/24 overlaps 10.1.0.0/24 of node {other}")),
            "{note}"
        );
    }
    testbed.wait_event("n2", "PodCIDRFamilyMissing")?;
    testbed.add("n3", &["192.168.0.0/24", "fd00::/64"])?;
    let note = testbed.wait_event("n3", "PodCIDROutsideCluster")?;
    ensure!(note.contains("192.168.0.0/24 is outside of cluster CIDR 10.1.0.0/16"), "{note}");
    ensure!(a.metric("dataplane_allocator_conflicts_total{reason=\"PodCIDROverlap\"}")? == Some(2.0));
    let untouched = testbed.ranges()?;
    ensure!(untouched["n0"] == untouched["n1"], "{untouched:?}");
    Ok(())
}

#[test]
fn a_cluster_cidr_that_contradicts_the_cluster_is_refused_at_start() -> Result<()> {
    let testbed = Testbed::new()?;
    testbed.add("n0", &["10.244.0.0/24"])?;
    let message = testbed.allocator("a", "--cluster-cidr 10.1.0.0/16")?.wait_error()?;
    ensure!(
        message.starts_with("node n0: pod CIDR 10.244.0.0/24 is outside of cluster CIDR 10.1.0.0/16"),
        "{message}"
    );
    let message =
        testbed.allocator("b", "--cluster-cidr 10.244.0.0/16 --service-cidr 10.244.8.0/24")?.wait_error()?;
    ensure!(message.contains("10.244.0.0/16 overlaps service CIDR 10.244.8.0/24"), "{message}");
    testbed.objects.patch_status(
        &node("n0", &[]),
        &json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.244.3.3"}]}}),
    )?;
    let message = testbed.allocator("c", "--cluster-cidr 10.244.0.0/16")?.wait_error()?;
    ensure!(
        message.starts_with("node n0: node address 10.244.3.3 is inside of cluster CIDR 10.244.0.0/16"),
        "{message}"
    );
    Ok(())
}
