//! Many objects at once, and unusual but valid objects.

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
/// Endpoints of each service.
const ENDPOINTS: u16 = 10;

#[test]
fn five_hundred_services_with_five_thousand_endpoints_are_applied() -> Result<()> {
    let spec = Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let (client, web) = cluster.explain((|| Ok((cluster.pod(0, "client")?, cluster.pod(1, "web")?)))())?;
    let _server = web.serve()?;
    let mut services: Vec<Service> = (0..SERVICES).map(numbered_service).collect();
    // one of them has a real backend
    let served = services.last_mut().context("there are services")?;
    served.backends = vec![Backend { addresses: vec![web.v4().into()], ..web.backend() }];
    let at = served.at(Family::V4, WEB_PORT);

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
    checks.that("the service with a real backend works", || {
        client.place().get_as(at, 10, Some("web"), client.address(Family::V4))
    });
    let deleted = began.elapsed();
    cluster.control()?.objects().delete(&objects)?;
    for node in cluster.nodes_mut() {
        checks.that(format!("{} removes all of them", node.name()), || {
            node.agent_mut().until("removal of the services", |agent| {
                let views: Vec<ServiceView> = agent.ask(&View::Services)?;
                Ok((!views.iter().any(|view| view.name.starts_with("many-"))).then_some(()))
            })
        });
    }
    eprintln!("removed from all tables {:.1?} after deletion", began.elapsed().saturating_sub(deleted));
    checks.finish(&cluster)
}

fn numbered_service(number: u16) -> Service {
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
fn unusual_objects_do_not_affect_other_services_from_manifests() -> Result<()> {
    unusual_objects(&Spec { connect_tcp: false, ..Spec::new(1) })
}

#[test]
fn unusual_objects_do_not_affect_other_services_from_an_api_server() -> Result<()> {
    unusual_objects(&Spec { source: Source::kubernetes(), connect_tcp: false, ..Spec::new(1) })
}

fn unusual_objects(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let (client, web) = cluster.explain((|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "web")?)))())?;
    let _server = web.serve()?;
    let normal = service("web", 1, &[&web]);
    cluster.apply(&normal)?;
    let before: Vec<ServiceView> = shown(&cluster, "web")?;
    let mut checks = Checks::of(spec.describe());

    for (number, (what, objects)) in (100..).zip(ignored_objects(&web)) {
        cluster.apply_objects("odd", &objects).with_context(|| what.to_owned())?;
        await_all(&mut cluster, number, &web)?;
        checks.that(format!("{what}: another service works"), || {
            client.place().get_as(normal.at(Family::V4, WEB_PORT), 3, Some("web"), client.address(Family::V4))
        });
        checks.that(format!("{what}: another service is unchanged"), || {
            let now = shown(&cluster, "web")?;
            ensure!(now == before, "{now:?}, expected {before:?}");
            Ok(())
        });
        checks.that(format!("{what}: the agent is ready"), || {
            let status = cluster.nodes()[0].agent().status()?.status;
            ensure!(status.is_ready(), "{:?}", status.not_ready);
            Ok(())
        });
        cluster.withdraw("odd")?;
    }

    for (number, (what, endpoints, responds)) in (200..).zip(backends(&web)) {
        let odd = service("odd", 3, &[]);
        cluster.apply_objects("odd", &[odd_service(&odd, &json!({})), slice("odd", &endpoints)])?;
        await_all(&mut cluster, number, &web)?;
        checks.that(what, || {
            let at = odd.at(Family::V4, WEB_PORT);
            if responds {
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

/// Waits until all changes so far are applied, by a marker service with a unique number applied
/// after them.
fn await_all(cluster: &mut Cluster, number: u16, web: &Pod) -> Result<()> {
    cluster.apply(&service(&format!("marker-{number}"), number, &[web]))
}

/// Objects from which the datapath makes no backends.
fn ignored_objects(web: &Pod) -> Vec<(&'static str, Vec<Value>)> {
    let odd = service("odd", 3, &[web]);
    let address = web.v4().to_string();
    let with = |change: Value| odd_service(&odd, &change);
    let slice_with = |labels: Value, change: Value| {
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
        ("a service of type ExternalName", vec![external]),
        ("a service without a selector", vec![with(json!({"spec": {"selector": null}}))]),
        ("a slice without a service label", vec![slice_with(json!({}), json!({}))]),
        ("a slice of a missing service", vec![slice("odd", &json!([{"addresses": [address]}]))]),
        (
            "a slice of type FQDN",
            vec![
                with(json!({})),
                slice_with(
                    json!({"kubernetes.io/service-name": "odd"}),
                    json!({"addressType": "FQDN", "endpoints": [{"addresses": ["db.example.org"]}]}),
                ),
            ],
        ),
        (
            "a slice without endpoints and ports",
            vec![
                with(json!({})),
                slice_with(
                    json!({"kubernetes.io/service-name": "odd"}),
                    json!({"endpoints": [], "ports": []}),
                ),
            ],
        ),
    ]
}

/// Endpoints of a service, and whether the service responds.
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
        ("the last endpoint is terminating and serving", terminating(true), true),
        ("the last endpoint is terminating and not serving", terminating(false), false),
        (
            "an endpoint that is not ready",
            json!([{"addresses": [address], "conditions": {"ready": false}}]),
            false,
        ),
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

/// The Service object, with changed fields of its spec or status.
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
