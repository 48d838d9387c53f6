//! Many objects at once, and objects that are odd but legal.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::api::{request::View, views::ServiceView};
use dataplane_testkit::{
    lab::{
        Backend, Checks, Cluster, Family, Pod, Protocol, Service, ServicePort, Source, Spec, WEB_PORT,
        service_addresses,
    },
    traffic::HTTP,
};
use serde_json::{Value, json};

const SERVICES: u16 = 500;
/// Of each service.
const ENDPOINTS: u16 = 10;

#[test]
fn five_hundred_services_and_five_thousand_endpoints_arrive() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let (client, web) = cluster.explain((|| Ok((cluster.pod(0, "client")?, cluster.pod(1, "web")?)))())?;
    let _server = web.serve()?;
    let mut services: Vec<Service> = (0..SERVICES).map(many).collect();
    // one of them is real
    let real = services.last_mut().context("there are services")?;
    real.backends = vec![Backend { addresses: vec![web.v4().into()], ..web.backend() }];
    let at = real.at(Family::V4, WEB_PORT);

    let objects: Vec<Value> = services.iter().flat_map(Service::objects).collect();
    let began = Instant::now();
    cluster.control()?.objects().apply_many(&objects)?;
    let written = began.elapsed();
    for node in cluster.nodes_mut() {
        let name = node.name().to_owned();
        node.await_services(&services).with_context(|| format!("on {name}"))?;
    }
    eprintln!(
        "{SERVICES} services with {} endpoints ({}): written in {written:.1?}, in all tables after {:.1?}",
        services.iter().map(|service| service.backends.len()).sum::<usize>(),
        cluster.describe_source(),
        began.elapsed()
    );
    let mut checks = Checks::of(spec.describe());
    checks
        .that("one of them works", || client.place().get_as(at, 10, Some("web"), client.address(Family::V4)));
    let gone = began.elapsed();
    cluster.control()?.objects().delete(&objects)?;
    for node in cluster.nodes_mut() {
        checks.that(format!("{} has none of them in the end", node.name()), || {
            node.agent_mut().until("end of the services", |agent| {
                let views: Vec<ServiceView> = agent.ask(&View::Services)?;
                Ok((!views.iter().any(|view| view.name.starts_with("many-"))).then_some(()))
            })
        });
    }
    eprintln!("deleted, and gone from all tables after {:.1?}", began.elapsed().saturating_sub(gone));
    checks.finish(&cluster)
}

fn many(number: u16) -> Service {
    let [v4, _] = service_addresses(number + 100);
    let backend = |index: u16| {
        let [high, low] = (number * ENDPOINTS + index + 1).to_be_bytes();
        Backend {
            pod: format!("pod-{number}-{index}"),
            node: "node9".to_owned(),
            addresses: vec![IpAddr::from(Ipv4Addr::new(10, 200, high, low))],
        }
    };
    Service {
        name: format!("many-{number}"),
        addresses: vec![v4],
        ports: vec![ServicePort { name: "http", port: WEB_PORT, protocol: Protocol::Tcp, target: HTTP }],
        backends: (0..ENDPOINTS).map(backend).collect(),
    }
}

#[test]
fn odd_but_legal_objects_change_nothing_they_should_not_by_manifests() -> Result<()> {
    odd_but_legal(&Spec { connect_tcp: false, ..Spec::new(1) })
}

#[test]
fn odd_but_legal_objects_change_nothing_they_should_not_from_an_api_server() -> Result<()> {
    odd_but_legal(&Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(1) })
}

fn odd_but_legal(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let (client, web) = cluster.explain((|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "web")?)))())?;
    let _server = web.serve()?;
    let normal = service("web", 1, &[&web]);
    cluster.apply(&normal)?;
    let before: Vec<ServiceView> = shown(&cluster, "web")?;
    let mut checks = Checks::of(spec.describe());

    for (number, (what, objects)) in (100..).zip(useless(&web)) {
        cluster.apply_objects("odd", &objects).with_context(|| what.to_owned())?;
        await_all(&mut cluster, number, &web)?;
        checks.that(format!("{what}: another service works"), || {
            client.place().get_as(normal.at(Family::V4, WEB_PORT), 3, Some("web"), client.address(Family::V4))
        });
        checks.that(format!("{what}: another service is what it was"), || {
            let now = shown(&cluster, "web")?;
            ensure!(now == before, "{now:?}, not {before:?}");
            Ok(())
        });
        checks.that(format!("{what}: the agent is content"), || {
            let status = cluster.nodes()[0].agent().status()?.status;
            ensure!(status.is_ready(), "{:?}", status.not_ready);
            Ok(())
        });
        cluster.withdraw("odd")?;
    }

    for (number, (what, endpoints, answers)) in (200..).zip(backends(&web)) {
        let odd = service("odd", 3, &[]);
        cluster.apply_objects("odd", &[odd_service(&odd, &json!({})), slice("odd", &endpoints)])?;
        await_all(&mut cluster, number, &web)?;
        checks.that(what, || {
            let at = odd.at(Family::V4, WEB_PORT);
            if answers {
                client.place().get_as(at, 5, Some("web"), client.address(Family::V4))
            } else {
                let requests = client.place().get(at, 1)?;
                ensure!(requests.iter().all(|request| request.answer().is_none()), "{requests:?}");
                Ok(())
            }
        });
        cluster.withdraw("odd")?;
    }
    checks.finish(&cluster)
}

/// Waits until what was told has arrived: what comes after it has. The number is nobody else's.
fn await_all(cluster: &mut Cluster, number: u16, web: &Pod) -> Result<()> {
    cluster.apply(&service(&format!("marker-{number}"), number, &[web]))
}

/// Objects that mean nothing to a datapath.
fn useless(web: &Pod) -> Vec<(&'static str, Vec<Value>)> {
    let odd = service("odd", 3, &[web]);
    let address = web.v4().to_string();
    let with = |change: Value| odd_service(&odd, &change);
    let unowned = |labels: Value, change: Value| {
        let mut slice = slice("odd", &json!([{"addresses": [address], "conditions": {"ready": true}}]));
        slice["metadata"]["labels"] = labels;
        if let (Some(slice), Some(change)) = (slice.as_object_mut(), change.as_object()) {
            slice.extend(change.clone());
        }
        slice
    };
    let headless = json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}});
    let external = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "odd", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "db.example.org"},
    });
    vec![
        ("a service without endpoints", vec![with(json!({}))]),
        ("a status without addresses", vec![with(json!({"status": {"loadBalancer": {}, "conditions": []}}))]),
        ("a headless service", vec![with(headless), slice("odd", &json!([{"addresses": [address]}]))]),
        ("a service by another name", vec![external]),
        ("a service that selects nothing", vec![with(json!({"spec": {"selector": null}}))]),
        ("a slice of nobody", vec![unowned(json!({}), json!({}))]),
        ("a slice of a service there is not", vec![slice("odd", &json!([{"addresses": [address]}]))]),
        (
            "a slice of names",
            vec![
                with(json!({})),
                unowned(
                    json!({"kubernetes.io/service-name": "odd"}),
                    json!({"addressType": "FQDN", "endpoints": [{"addresses": ["db.example.org"]}]}),
                ),
            ],
        ),
        (
            "a slice without endpoints and ports",
            vec![
                with(json!({})),
                unowned(json!({"kubernetes.io/service-name": "odd"}), json!({"endpoints": [], "ports": []})),
            ],
        ),
    ]
}

/// Endpoints of a service, and whether it answers with them.
fn backends(web: &Pod) -> Vec<(&'static str, Value, bool)> {
    let address = web.v4().to_string();
    let ready = json!({"addresses": [address], "conditions": {"ready": true}, "nodeName": "node1"});
    let terminating = |serving: bool| {
        json!([{
            "addresses": [address],
            "conditions": {"ready": false, "serving": serving, "terminating": true},
            "nodeName": "node1",
        }])
    };
    vec![
        ("the same address twice is one backend", json!([ready, ready]), true),
        (
            "an endpoint without a node",
            json!([{"addresses": [address], "conditions": {"ready": true}}]),
            true,
        ),
        ("an endpoint without conditions is ready", json!([{"addresses": [address]}]), true),
        ("the last endpoint that ends still serves", terminating(true), true),
        ("one that ends and serves no more", terminating(false), false),
        ("one that is not ready", json!([{"addresses": [address], "conditions": {"ready": false}}]), false),
    ]
}

fn shown(cluster: &Cluster, name: &str) -> Result<Vec<ServiceView>> {
    let views: Vec<ServiceView> = cluster.nodes()[0].agent().ask(&View::Services)?;
    Ok(views.into_iter().filter(|view| view.name == name).collect())
}

fn service(name: &str, number: u16, backends: &[&Pod]) -> Service {
    let [v4, _] = service_addresses(number);
    let v4_only = |pod: &&Pod| Backend { addresses: vec![pod.v4().into()], ..pod.backend() };
    Service {
        name: name.to_owned(),
        addresses: vec![v4],
        ports: vec![ServicePort { name: "http", port: WEB_PORT, protocol: Protocol::Tcp, target: HTTP }],
        backends: backends.iter().map(v4_only).collect(),
    }
}

/// The Service of a service, with fields of its spec or its status changed.
fn odd_service(service: &Service, change: &Value) -> Value {
    let mut object = service.objects().swap_remove(0);
    for part in ["spec", "status"] {
        if let (Some(fields), Some(changes)) =
            (object.get_mut(part).and_then(Value::as_object_mut), change.get(part).and_then(Value::as_object))
        {
            fields.extend(changes.clone());
        }
    }
    object
}

fn slice(service: &str, endpoints: &Value) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-ipv4-0"),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": HTTP, "protocol": "TCP"}],
    })
}
