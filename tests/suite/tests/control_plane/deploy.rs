//! The manifests in `deploy/`: the API accepts them unchanged, Kustomize and Helm render the same
//! objects, permissions are minimal, and the agent's pod mounts what the agent needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use dataplane_agent::{
    allocate::AllocateArgs,
    cli,
    config::{Config, RunArgs, Settings},
};
use dataplane_testkit::{
    lab::{Cluster, Family, Spec},
    only_as_root, run,
};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::manifests::{directory, helm, kustomize, objects, schema};

/// The command line of the agent.
#[derive(Debug, Parser)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<RunArgs>),
    Allocate(AllocateArgs),
    #[command(flatten)]
    Cli(cli::Command),
}

const NO_KUBECTL: &str = "kubectl is not installed, but needed to render the Kustomize directories";

/// The objects of every Kustomize directory.
fn render_all() -> Result<Option<BTreeMap<&'static str, Vec<Value>>>> {
    let mut all = BTreeMap::new();
    for place in [".", "overlays/microk8s", "overlays/k3s", "overlays/example"] {
        let Some(found) = kustomize::build(&directory().join(place))? else {
            run::skip(NO_KUBECTL);
            return Ok(None);
        };
        all.insert(place, found);
    }
    Ok(Some(all))
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let mut found = objects.iter().filter(|o| o["kind"] == kind && o["metadata"]["name"] == name);
    found.next().with_context(|| format!("no {kind} {name}"))
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[test]
fn the_api_types_keep_every_field() -> Result<()> {
    let Some(all) = render_all()? else { return Ok(()) };
    for (place, objects) in all {
        for object in &objects {
            objects::check(object).with_context(|| place)?;
        }
    }
    Ok(())
}

#[test]
fn the_chart_and_kustomize_render_the_same_objects() -> Result<()> {
    let Some(all) = render_all()? else { return Ok(()) };
    let namespace = json!({ "namespace": { "create": true } });
    for (place, file) in [
        (".", None),
        ("overlays/microk8s", Some("values-microk8s.yaml")),
        ("overlays/k3s", Some("values-k3s.yaml")),
    ] {
        let values = file.map_or_else(|| Ok(json!({})), helm::values)?;
        let (chart, engine) = helm::render(&values)?;
        println!("{place}: rendered by {engine:?}");
        // Helm creates the namespace itself
        let rest: Vec<Value> =
            all[place].iter().filter(|object| object["kind"] != "Namespace").cloned().collect();
        assert_eq!(objects::compare(&rest, &chart), Vec::<String>::new(), "{place}");

        let mut values = values;
        values["namespace"] = namespace["namespace"].clone();
        let (chart, _engine) = helm::render(&values)?;
        assert_eq!(objects::compare(&all[place], &chart), Vec::<String>::new(), "{place} with its namespace");
    }
    Ok(())
}

#[test]
fn the_charts_values_reach_the_objects() -> Result<()> {
    let values = json!({
        "image": { "repository": "registry.example:5000/net/dataplane", "tag": "7", "pullSecrets": ["mine"] },
        "apiServer": ["https://10.0.0.1:6443", "https://10.0.0.2:6443"],
        "config": { "mtu": 1400, "vxlan": { "port": 4789 } },
        "agent": { "maxUnavailable": 2, "capabilities": ["NET_ADMIN", "SYS_ADMIN", "SYS_RESOURCE"] },
        "bpffs": { "mount": true },
        "allocator": { "enabled": true, "replicas": 1, "clusterCIDR": ["10.7.0.0/16", "fd07::/48"] },
    });
    let (found, _engine) = helm::render(&values)?;
    for object in &found {
        objects::check(object)?;
    }
    let set = &find(&found, "DaemonSet", "dataplane-agent")?["spec"];
    let pod = &set["template"]["spec"];
    assert_eq!(set["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 2);
    assert_eq!(pod["containers"][0]["image"], "registry.example:5000/net/dataplane:7");
    assert_eq!(pod["imagePullSecrets"], json!([{ "name": "mine" }]));
    assert_eq!(
        pod["containers"][0]["securityContext"]["capabilities"]["add"],
        json!(["NET_ADMIN", "SYS_ADMIN", "SYS_RESOURCE"])
    );
    assert_eq!(pod["initContainers"][0]["securityContext"]["privileged"], true);
    assert_eq!(pod["initContainers"][0]["volumeMounts"][0]["mountPropagation"], "Bidirectional");
    let cluster = find(&found, "ConfigMap", "dataplane-cluster")?;
    assert_eq!(cluster["data"]["DATAPLANE_API_SERVER"], "https://10.0.0.1:6443,https://10.0.0.2:6443");
    let allocator = find(&found, "ConfigMap", "dataplane-allocator")?;
    assert_eq!(allocator["data"]["DATAPLANE_CLUSTER_CIDR"], "10.7.0.0/16,fd07::/48");
    let config = configuration(find(&found, "ConfigMap", "dataplane-agent")?)?;
    assert_eq!((config.mtu, config.vxlan.port), (Some(1_400), 4_789));
    Ok(())
}

#[test]
fn invalid_values_are_refused_by_name() -> Result<()> {
    let schema = directory().join("helm/dataplane/values.schema.json");
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(schema)?)?;
    for (values, place) in [
        (json!({ "images": {} }), "values.images"),
        (json!({ "image": { "repository": "Upper/Case" } }), "values.image.repository"),
        (json!({ "image": { "repository": "a/b", "pullPolicy": "Sometimes" } }), "values.image.pullPolicy"),
        (json!({ "apiServer": "https://10.0.0.1:6443" }), "values.apiServer"),
        (json!({ "apiServer": ["http://10.0.0.1:6443"] }), "values.apiServer[0]"),
        (json!({ "config": { "source": "etcd" } }), "values.config.source"),
        (json!({ "cni": { "binDir": "opt/cni/bin", "confDir": "/etc" } }), "values.cni.binDir"),
        (json!({ "agent": { "maxUnavailable": "0%" } }), "values.agent.maxUnavailable"),
        (json!({ "agent": { "capabilities": ["NET_ADMIN"] } }), "values.agent.capabilities"),
        (json!({ "agent": { "capabilities": ["ALL", "SYS_ADMIN"] } }), "values.agent.capabilities[0]"),
        (json!({ "allocator": { "replicas": 0 } }), "values.allocator.replicas"),
        (json!({ "allocator": { "clusterCIDR": ["10.0.0.0"] } }), "values.allocator.clusterCIDR[0]"),
        (json!({ "allocator": { "clusterCIDR": [] } }), "values.allocator.clusterCIDR"),
    ] {
        let found = schema::violations(&schema, &values)?;
        assert!(found.iter().any(|wrong| wrong.starts_with(&format!("{place}:"))), "{values}: {found:?}");
    }
    Ok(())
}

#[test]
fn permissions_have_no_wildcard_and_are_exactly_those_the_code_uses() -> Result<()> {
    let Some(all) = render_all()? else { return Ok(()) };
    let mut granted: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for object in &all["overlays/microk8s"] {
        for rule in items(&object["rules"]) {
            let (groups, resources, verbs) =
                (strings(&rule["apiGroups"]), strings(&rule["resources"]), strings(&rule["verbs"]));
            assert!(rule["nonResourceURLs"].is_null(), "{rule}");
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            for (group, resource) in groups.iter().flat_map(|g| resources.iter().map(move |r| (g, r))) {
                let granted_verbs = granted.entry(format!("{name}: {group}/{resource}")).or_default();
                granted_verbs.extend(verbs.iter().map(ToString::to_string));
            }
        }
    }
    let expected = [
        ("dataplane-agent: discovery.k8s.io/endpointslices", "list watch"),
        ("dataplane-agent: networking.k8s.io/servicecidrs", "list watch"),
        ("dataplane-agent: /namespaces", "list watch"),
        ("dataplane-agent: /nodes", "get list patch watch"),
        ("dataplane-agent: /nodes/status", "patch"),
        ("dataplane-agent: /pods", "list watch"),
        ("dataplane-agent: /services", "list watch"),
        ("dataplane-allocator: /nodes", "get list patch watch"),
        ("dataplane-allocator: coordination.k8s.io/leases", "create get update"),
        ("dataplane-events: events.k8s.io/events", "create patch"),
    ];
    let expected: BTreeMap<String, BTreeSet<String>> = expected
        .into_iter()
        .map(|(name, verbs)| (name.to_owned(), verbs.split(' ').map(str::to_owned).collect()))
        .collect();
    assert_eq!(granted, expected);
    Ok(())
}

/// The agent's configuration from a ConfigMap.
fn configuration(map: &Value) -> Result<Config> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.yaml");
    std::fs::write(&file, map["data"]["agent.yaml"].as_str().context("no agent.yaml")?)?;
    let settings = Settings { node_name: Some("node1".to_owned()), ..Settings::default() };
    Ok(Config::load(&RunArgs { config: Some(file), settings })?)
}

#[test]
fn the_agents_pod_mounts_what_its_configuration_names() -> Result<()> {
    let Some(all) = render_all()? else { return Ok(()) };
    for (place, objects) in &all {
        let config = configuration(find(objects, "ConfigMap", "dataplane-agent")?)?;
        let pod = &find(objects, "DaemonSet", "dataplane-agent")?["spec"]["template"]["spec"];
        let agent = &pod["containers"][0];

        let volume = |path: &Path| {
            let mount =
                items(&agent["volumeMounts"]).find(|mount| mount["mountPath"] == path.to_str().unwrap_or(""));
            let name =
                &mount.with_context(|| format!("{place}: nothing is mounted at {}", path.display()))?["name"];
            items(&pod["volumes"]).find(|volume| volume["name"] == *name).context("a mount without a volume")
        };
        for path in [&config.state_dir, &config.run_dir, &config.bpffs] {
            assert_eq!(volume(path)?["hostPath"]["path"], path.to_str().unwrap_or(""), "{place}");
        }
        // the default socket of the CNI plugin on the host
        assert_eq!(config.run_dir.join("agent.sock"), Path::new("/run/dataplane/agent.sock"));

        let http = config.http_bind_address.context("no http_bind_address for the probes")?;
        for (probe, path) in
            [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]
        {
            let get = &agent[probe]["httpGet"];
            let expected = json!({ "host": http.ip().to_string(), "port": http.port(), "path": path });
            assert_eq!(*get, expected, "{place}: {probe}");
        }
        for container in items(&pod["containers"]).chain(items(&pod["initContainers"])) {
            parse(container, &[]).with_context(|| place.to_string())?;
        }
    }
    Ok(())
}

#[test]
fn the_allocator_accepts_its_arguments_and_variables() -> Result<()> {
    let Some(all) = render_all()? else { return Ok(()) };
    let objects = &all["overlays/microk8s"];
    let container =
        &find(objects, "Deployment", "dataplane-allocator")?["spec"]["template"]["spec"]["containers"][0];
    let mut flags = Vec::new();
    for map in ["dataplane-allocator", "dataplane-cluster"] {
        let data = find(objects, "ConfigMap", map)?["data"].as_object().context("no data")?;
        for (name, value) in data {
            let flag =
                name.strip_prefix("DATAPLANE_").context(name.clone())?.to_lowercase().replace('_', "-");
            flags.extend([format!("--{flag}"), value.as_str().unwrap_or_default().to_owned()]);
        }
    }
    let line = format!("{:?}", parse(container, &flags)?);
    let probe = &container["readinessProbe"]["httpGet"];
    let http = format!("{}:{}", probe["host"].as_str().unwrap_or_default(), probe["port"]);
    for expected in ["10.1.0.0/16", "10.152.183.0/24", "\"dataplane-system\"", "127.0.0.1:16443", &http] {
        assert!(line.contains(expected), "{expected} is not in {line}");
    }
    let cidr = find(objects, "ConfigMap", "dataplane-allocator")?["data"]["DATAPLANE_CLUSTER_CIDR"].as_str();
    cidr.context("no cluster CIDR")?.parse::<IpNet>()?;
    Ok(())
}

/// Parses a container's arguments; its environment variables are given as flags in `more`.
fn parse(container: &Value, more: &[String]) -> Result<Command> {
    let words = ["dataplane-agent"].into_iter().chain(strings(&container["args"]));
    let words = words.chain(more.iter().map(String::as_str));
    Ok(Line::try_parse_from(words)?.command)
}

#[test]
fn images_have_this_version_and_containers_are_restricted() -> Result<()> {
    let Some(all) = render_all()? else { return Ok(()) };
    for (place, objects) in &all {
        for object in objects {
            let pod = &object["spec"]["template"]["spec"];
            for container in items(&pod["containers"]).chain(items(&pod["initContainers"])) {
                let what = format!("{place}: {}", container["name"]);
                assert_eq!(
                    container["image"],
                    format!("dataplane.local/dataplane:{}", env!("CARGO_PKG_VERSION")),
                    "{what}"
                );
                let security = &container["securityContext"];
                assert_eq!(security["readOnlyRootFilesystem"], true, "{what}");
                assert_eq!(security["allowPrivilegeEscalation"], false, "{what}");
                assert!(security["privileged"].is_null(), "{what}");
                assert_eq!(strings(&security["capabilities"]["drop"]), ["ALL"], "{what}");
                assert!(container["resources"]["requests"]["memory"].is_string(), "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_manifests_capabilities_suffice_for_pods_and_traffic() -> Result<()> {
    only_as_root!();
    let granted = match kustomize::build(&directory())? {
        Some(objects) => {
            let pod = find(&objects, "DaemonSet", "dataplane-agent")?["spec"]["template"]["spec"].clone();
            let add = &pod["containers"][0]["securityContext"]["capabilities"]["add"];
            strings(add).into_iter().map(str::to_lowercase).collect::<Vec<_>>()
        }
        None => {
            run::skip(NO_KUBECTL);
            return Ok(());
        }
    };
    let set = granted.iter().fold("-all".to_owned(), |set, name| format!("{set},+{name}"));
    let confine =
        ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set", &set].map(str::to_owned).to_vec();

    let mut cluster = Cluster::create_stopped(&Spec::new(2))?;
    for node in cluster.nodes_mut() {
        node.agent_mut().set_wrapper(confine.clone());
        node.agent_mut().start()?;
    }
    for node in cluster.nodes_mut() {
        node.agent_mut().await_ready().context("with the manifest's capabilities")?;
    }
    let (here, there) = (cluster.pod(0, "here")?, cluster.pod(1, "there")?);
    for family in Family::BOTH {
        here.place().ping(there.address(family), 3, 1_000)?.check()?;
    }
    Ok(())
}
