//! What pods ask for: an address of their own choice, and limits of their traffic.

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_testkit::lab::{Checks, Cluster, Family, Place, Service, Spec};
use serde_json::{Value, json};

#[test]
fn a_pod_gets_the_address_it_asks_for_or_hears_why_not() -> Result<()> {
    let spec = Spec::new(1);
    let mut cluster = Cluster::create(&spec)?;
    let [v4, v6] = cluster.nodes()[0].pod_cidrs().map(|cidr| cidr.hosts().nth(76).map(|ip| ip.to_string()));
    let (v4, v6) = v4.zip(v6).context("pod ranges with room")?;
    let asks = |name: &str, annotations: Value| cluster.nodes()[0].pod_object(name, &annotations);
    let objects = [
        asks("both", json!({"dataplane.local/ipv4": v4, "dataplane.local/ipv6": v6})),
        asks("late", json!({"dataplane.local/ipv4": v4})),
        asks("stranger", json!({"dataplane.local/ipv4": "192.0.2.7"})),
        asks("nonsense", json!({"dataplane.local/ipv6": v4})),
    ];
    cluster.apply_objects("wishes", &objects)?;
    // the agents have read them when they know the last file
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
        ("stranger", "192.0.2.7 is not a pod address of this node's range".to_owned()),
        ("nonsense", "annotation dataplane.local/ipv6".to_owned()),
    ] {
        checks.that(format!("{name} is refused"), || {
            let Err(error) = cluster.pod(0, name) else { bail!("it was made") };
            let said = format!("{error:#}");
            ensure!(said.contains(&expected), "{said}");
            Ok(())
        });
    }
    checks.that("who asks for nothing gets another", || {
        let pod = cluster.pod(0, "plain")?;
        ensure!(pod.address(Family::V4).to_string() != v4, "{}", pod.address(Family::V4));
        Ok(())
    });
    checks.finish(&cluster)
}

#[test]
fn traffic_of_a_limited_pod_passes_its_queues() -> Result<()> {
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
    checks.that("the queues have the rates", || {
        ensure!(queue(host, &device)?.rate == "80Mbit", "{:?}", queue(host, &device)?);
        ensure!(queue(limited.place(), "eth0")?.rate == "40Mbit", "{:?}", queue(limited.place(), "eth0")?);
        Ok(())
    });
    for (who, client) in
        [("a pod beside it", near.place()), ("a pod of another node", far.place()), ("its host", host)]
    {
        checks.that(format!("requests of {who} pass both"), || {
            const BYTES: usize = 50_000;
            let before = (queue(host, &device)?.bytes, queue(limited.place(), "eth0")?.bytes);
            let requests = client.get_bytes(limited.web(Family::V4), 5, BYTES)?;
            ensure!(requests.len() == 5, "{requests:?}");
            let after = (queue(host, &device)?.bytes, queue(limited.place(), "eth0")?.bytes);
            // acknowledgements to the pod, the pages from it
            ensure!(after.0 > before.0, "{} bytes passed the queue to the pod", after.0 - before.0);
            let sent = after.1 - before.1;
            ensure!(sent >= 5 * BYTES as u64, "{sent} bytes passed the queue from the pod");
            Ok(())
        });
    }
    checks.that("a pod without limits has no queue", || {
        let shown = host.run("tc", &["qdisc", "show", "dev", near.host_device()?])?;
        ensure!(!shown.contains("tbf"), "{shown}");
        Ok(())
    });
    checks.finish(&cluster)
}

/// A token bucket, as `tc` shows it.
#[derive(Debug)]
struct Queue {
    rate: String,
    bytes: u64,
}

fn queue(place: &Place, device: &str) -> Result<Queue> {
    let shown = place.run("tc", &["-s", "qdisc", "show", "dev", device])?;
    let after = |word: &str| shown.split_whitespace().skip_while(|found| *found != word).nth(1);
    ensure!(shown.contains("qdisc tbf"), "{shown}");
    let rate = after("rate").with_context(|| shown.clone())?.to_owned();
    let bytes = after("Sent").with_context(|| shown.clone())?.parse()?;
    Ok(Queue { rate, bytes })
}
