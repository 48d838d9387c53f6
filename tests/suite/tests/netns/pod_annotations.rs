//! What pods request by annotations and by the runtime: fixed addresses and bandwidth limits.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_testkit::lab::{Checks, Cluster, Family, Node, Place, Pod, Service, Spec};
use ipnet::IpNet;
use serde_json::{Value, json};

#[test]
fn requested_addresses_are_assigned_or_refused_with_a_reason() -> Result<()> {
    let spec = Spec::new(1);
    let mut cluster = Cluster::create(&spec)?;
    let [v4, v6] = cluster.nodes()[0].pod_cidrs().map(|cidr| cidr.hosts().nth(76).map(|ip| ip.to_string()));
    let (v4, v6) = v4.zip(v6).context("pod CIDRs with enough addresses")?;
    let pod_with = |name: &str, annotations: Value| cluster.nodes()[0].pod_object(name, &annotations);
    let objects = [
        pod_with("both", json!({"dataplane.local/ipv4": v4, "dataplane.local/ipv6": v6})),
        pod_with("late", json!({"dataplane.local/ipv4": v4})),
        pod_with("out-of-range", json!({"dataplane.local/ipv4": "192.0.2.7"})),
        pod_with("malformed", json!({"dataplane.local/ipv6": v4})),
        pod_with("router", json!({"dataplane.local/allowed-sources": "10.9.0.0/16"})),
    ];
    cluster.apply_objects("annotations", &objects)?;
    // objects are applied in order: when the agents have this service, they have the pods
    cluster.apply(&Service::of(&[]))?;

    let mut checks = Checks::of(spec.describe());
    let mut first = None;
    checks.that("an address of each family", || {
        let pod = cluster.pod(0, "both")?;
        let got = pod.addresses().map(|address| address.to_string());
        ensure!(got == [v4.clone(), v6.clone()], "{got:?}");
        first = Some(pod);
        Ok(())
    });
    for (name, expected) in [
        ("late", format!("{v4} is in use by pod default/both")),
        ("out-of-range", "192.0.2.7 is not a pod address of this node's range".to_owned()),
        ("malformed", "annotation dataplane.local/ipv6".to_owned()),
        (
            "router",
            "namespace default; to allow it, add the namespace to allowed_sources_namespaces".to_owned(),
        ),
    ] {
        checks.that(format!("{name} is refused"), || {
            let Err(error) = cluster.pod(0, name) else { bail!("the pod was created") };
            let message = format!("{error:#}");
            ensure!(message.contains(&expected), "{message}");
            Ok(())
        });
    }
    checks.that("a pod without annotations gets another address", || {
        let pod = cluster.pod(0, "plain")?;
        ensure!(pod.address(Family::V4).to_string() != v4, "{}", pod.address(Family::V4));
        Ok(())
    });
    checks.finish(&cluster)
}

/// A pod that routes for others sends from their addresses, also after a restart of the agent, and
/// until it is deleted.
#[test]
fn pod_sends_from_its_allowed_sources() -> Result<()> {
    let config = json!({"allowed_sources_namespaces": ["vpn", "default"]});
    let spec = Spec { config, ..Spec::new(1) };
    let mut cluster = Cluster::create(&spec)?;
    let pod_with = |name: &str, sources: &str| {
        let annotations = json!({"dataplane.local/allowed-sources": sources});
        cluster.nodes()[0].pod_object(name, &annotations)
    };
    let objects = [pod_with("router", "10.9.0.0/16, fd00:9::/64"), pod_with("malformed", "10.9.0.1/16")];
    cluster.apply_objects("annotations", &objects)?;
    // objects are applied in order: when the agents have this service, they have the pods
    cluster.apply(&Service::of(&[]))?;
    let pods = (|| Ok((cluster.pod(0, "router")?, cluster.pod(0, "plain")?, cluster.pod(0, "server")?)))();
    let (router, plain, server) = cluster.explain(pods)?;
    let _server = server.serve()?;
    let sources = [(Family::V4, "10.9.0.7/32"), (Family::V6, "fd00:9::7/128")];
    for (family, source) in sources {
        for pod in [&router, &plain] {
            let nodad = if family == Family::V6 { "nodad" } else { "" };
            pod.place().namespace().ip(&format!("address add {source} dev eth0 {nodad}"))?;
        }
        // the operator's route of the replies
        let (via, device) = (router.address(family), router.host_device()?);
        cluster.nodes()[0]
            .place()
            .namespace()
            .ip(&format!("route add {source} via {via} dev {device} onlink"))?;
    }

    let mut checks = Checks::of(spec.describe());
    checks.that("an invalid annotation is refused", || {
        let Err(error) = cluster.pod(0, "malformed") else { bail!("the pod was created") };
        let message = format!("{error:#}");
        ensure!(
            message.contains("default/malformed") && message.contains("did you mean 10.9.0.0/16?"),
            "{message}"
        );
        Ok(())
    });
    for (family, source) in sources {
        let source = source.parse::<IpNet>()?.addr();
        checks.that(format!("requests from {source}"), || sends_from(&router, &server, family, source));
        checks.that(format!("a pod without the annotation is refused ({family})"), || {
            let before = cluster.nodes()[0].count("from_pod", "source_not_owned")?;
            let refused = sends_from(&plain, &server, family, source);
            ensure!(refused.is_err(), "{refused:?}");
            ensure!(
                cluster.nodes()[0].count("from_pod", "source_not_owned")? > before,
                "nothing was counted"
            );
            Ok(())
        });
    }
    for (what, variable, wanted) in [
        ("allowed sources outlive the agent", "", 2),
        // a variable overrides the file
        ("they end when the namespace is no longer listed", "DATAPLANE_ALLOWED_SOURCES_NAMESPACES=vpn", 0),
        ("and return with it", "", 2),
    ] {
        checks.that(what, || {
            let agent = cluster.nodes_mut()[0].agent_mut();
            agent.kill()?;
            agent.set_wrapper(
                ["env", variable].into_iter().filter(|it| !it.is_empty()).map(str::to_owned).collect(),
            );
            agent.start()?;
            agent.await_ready()?;
            ensure!(rows(&cluster.nodes()[0])? == wanted, "{} rows", rows(&cluster.nodes()[0])?);
            let sent = sends_from(&router, &server, Family::V4, "10.9.0.7".parse()?);
            ensure!(sent.is_ok() == (wanted > 0), "{sent:?}");
            Ok(())
        });
    }
    checks.that("they end with the pod", || {
        router.delete()?;
        ensure!(rows(&cluster.nodes()[0])? == 0, "{} rows", rows(&cluster.nodes()[0])?);
        Ok(())
    });
    checks.finish(&cluster)
}

fn sends_from(pod: &Pod, server: &Pod, family: Family, source: IpAddr) -> Result<()> {
    let requests = pod.place().get_from(server.web(family), 3, source)?;
    ensure!(requests.iter().all(|request| request.answer().is_some()), "{requests:?}");
    Ok(())
}

/// Rows of `ALLOWED_SOURCES`, as `status` says.
fn rows(node: &Node) -> Result<u64> {
    let tables = node.agent().status()?.status.tables;
    let table = tables.iter().find(|table| table.name == "ALLOWED_SOURCES").context("no such table")?;
    Ok(table.used)
}

#[test]
fn traffic_of_a_pod_with_bandwidth_limits_passes_its_qdiscs() -> Result<()> {
    let spec = Spec::new(2);
    let cluster = Cluster::create(&spec)?;
    let limits = json!({"bandwidth": {
        "ingressRate": 80_000_000, "ingressBurst": 0, "egressRate": 40_000_000, "egressBurst": 4_294_967_295_u32,
    }});
    let made =
        (|| Ok((cluster.pod_with(0, "limited", limits)?, cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (limited, near, far) = cluster.explain(made)?;
    let _servers = [limited.serve()?, near.serve()?];
    let host = cluster.nodes()[0].place();

    let mut checks = Checks::of(spec.describe());
    let device = limited.host_device()?.to_owned();
    checks.that("the qdiscs have the rates", || {
        ensure!(qdisc(host, &device)?.rate == "80Mbit", "{:?}", qdisc(host, &device)?);
        ensure!(qdisc(limited.place(), "eth0")?.rate == "40Mbit", "{:?}", qdisc(limited.place(), "eth0")?);
        Ok(())
    });
    for (from, client) in
        [("a pod of the same node", near.place()), ("a pod of another node", far.place()), ("its host", host)]
    {
        checks.that(format!("requests of {from} pass both qdiscs"), || {
            const BYTES: usize = 50_000;
            let before = (qdisc(host, &device)?.bytes, qdisc(limited.place(), "eth0")?.bytes);
            let requests = client.get_bytes(limited.web(Family::V4), 5, BYTES)?;
            ensure!(requests.len() == 5, "{requests:?}");
            let after = (qdisc(host, &device)?.bytes, qdisc(limited.place(), "eth0")?.bytes);
            // requests go to the pod, responses come from it
            ensure!(after.0 > before.0, "{} bytes passed the qdisc to the pod", after.0 - before.0);
            let sent = after.1 - before.1;
            ensure!(sent >= 5 * BYTES as u64, "{sent} bytes passed the qdisc from the pod");
            Ok(())
        });
    }
    checks.that("a pod without limits has no qdisc", || {
        let shown = host.run("tc", &["qdisc", "show", "dev", near.host_device()?])?;
        ensure!(!shown.contains("tbf"), "{shown}");
        Ok(())
    });
    checks.finish(&cluster)
}

/// A token bucket filter, as `tc` shows it.
#[derive(Debug)]
struct Qdisc {
    rate: String,
    bytes: u64,
}

fn qdisc(place: &Place, device: &str) -> Result<Qdisc> {
    let shown = place.run("tc", &["-s", "qdisc", "show", "dev", device])?;
    let after = |word: &str| shown.split_whitespace().skip_while(|found| *found != word).nth(1);
    ensure!(shown.contains("qdisc tbf"), "{shown}");
    let rate = after("rate").with_context(|| shown.clone())?.to_owned();
    let bytes = after("Sent").with_context(|| shown.clone())?.parse()?;
    Ok(Qdisc { rate, bytes })
}
