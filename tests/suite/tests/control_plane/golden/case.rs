//! A case: its files, read as the agent reads manifests and configuration.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::{
    config::{Config, RunArgs, Settings},
    source::{Problem, manifests::Reader},
    state::SourceEvent,
};
use dataplane_cni::protocol::{PortMapping, PortProtocol};
use k8s_openapi::api::core::v1 as core;
use serde_json::Value;

/// Name of the node whose tables are dumped.
pub(super) const NODE: &str = "node-a";
/// Nodes and pods of the cases that declare no Node.
const DEFAULT_CLUSTER: &str = "cluster.yaml";
const OBJECTS: &str = "objects.yaml";
/// Replaces `objects.yaml` in a second step, if the case has it.
const UPDATE: &str = "update.yaml";
const CONFIG: &str = "agent.yaml";

/// What a case gives to the node.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) config: Config,
    pub(super) steps: Vec<Step>,
    /// Problems of the manifests after the last step.
    pub(super) problems: BTreeSet<Problem>,
}

/// One state of the manifests.
#[derive(Debug)]
pub(super) struct Step {
    /// Changes since the step before, in the order of the objects in the files.
    pub(super) events: Vec<SourceEvent>,
    /// Addresses of the node.
    pub(super) host: Vec<IpAddr>,
    /// Pods of the node in its pod network, sorted by name.
    pub(super) pods: Vec<Pod>,
}

/// A pod as the CNI plugin gets to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) port_mappings: Vec<PortMapping>,
}

impl Case {
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let objects = read(&directory.join(OBJECTS))?;
        let mut texts = vec![objects];
        let update = directory.join(UPDATE);
        if update.exists() {
            texts.push(read(&update)?);
        }
        let cluster = read(&super::directory().join(DEFAULT_CLUSTER))?;

        let manifests = tempfile::tempdir()?;
        let mut reader = Reader::default();
        let (mut steps, mut problems) = (Vec::new(), BTreeSet::new());
        for text in texts {
            let has_nodes = documents(&text).iter().any(|object| object["kind"] == "Node");
            let cluster = if has_nodes { "" } else { &cluster };
            fs::write(manifests.path().join(DEFAULT_CLUSTER), cluster)?;
            fs::write(manifests.path().join(OBJECTS), &text)?;
            let (events, found) = reader.read(manifests.path())?;
            problems = found;
            let objects = [documents(cluster), documents(&text)].concat();
            steps.push(Step::new(in_order(events, &objects), &objects)?);
        }
        let config = Some(directory.join(CONFIG)).filter(|path| path.exists());
        let settings = Settings { node_name: Some(NODE.to_owned()), ..Settings::default() };
        Ok(Self { config: Config::load(&RunArgs { config, settings })?, steps, problems })
    }
}

impl Step {
    fn new(events: Vec<SourceEvent>, objects: &[Value]) -> Result<Self> {
        let of_kind = |kind: &'static str| objects.iter().filter(move |object| object["kind"] == kind);
        let mut host = Vec::new();
        for object in of_kind("Node").filter(|object| object["metadata"]["name"] == NODE) {
            let node: core::Node = serde_json::from_value(object.clone())?;
            let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
            for address in addresses.iter().filter(|it| it.type_ != "Hostname") {
                host.push(address.address.parse()?);
            }
        }
        ensure!(!host.is_empty(), "no Node {NODE} with an address");
        let pods = of_kind("Pod").map(|object| Pod::read(object.clone()));
        let mut pods: Vec<Pod> = pods.filter_map(Result::transpose).collect::<Result<_>>()?;
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Ok(Self { events, host, pods })
    }
}

impl Pod {
    /// `None`: the pod is not on the node, or has no network of its own.
    fn read(object: Value) -> Result<Option<Self>> {
        let pod: core::Pod = serde_json::from_value(object).context("read a Pod")?;
        let spec = pod.spec.unwrap_or_default();
        if spec.node_name.as_deref() != Some(NODE) || spec.host_network == Some(true) {
            return Ok(None);
        }
        let ips = pod.status.and_then(|status| status.pod_ips).unwrap_or_default();
        let ports = spec.containers.iter().flat_map(|container| container.ports.iter().flatten());
        Ok(Some(Self {
            namespace: pod.metadata.namespace.unwrap_or_else(|| "default".to_owned()),
            name: pod.metadata.name.unwrap_or_default(),
            addresses: ips.iter().map(|ip| ip.ip.parse()).collect::<Result<_, _>>()?,
            port_mappings: ports.filter_map(|port| mapping(port).transpose()).collect::<Result<_>>()?,
        }))
    }
}

/// As the container runtime passes a `hostPort` to the CNI plugin.
fn mapping(port: &core::ContainerPort) -> Result<Option<PortMapping>> {
    let Some(host_port) = port.host_port else { return Ok(None) };
    let host_ip = port.host_ip.as_deref().filter(|ip| !ip.is_empty());
    Ok(Some(PortMapping {
        host_ip: host_ip.map(str::parse).transpose()?,
        host_port: host_port.try_into()?,
        protocol: match port.protocol.as_deref() {
            Some("UDP") => PortProtocol::Udp,
            Some("SCTP") => PortProtocol::Sctp,
            _ => PortProtocol::Tcp,
        },
        container_port: port.container_port.try_into()?,
    }))
}

/// Sorts events by the position of their objects in the files; removals come first.
fn in_order(mut events: Vec<SourceEvent>, objects: &[Value]) -> Vec<SourceEvent> {
    let name = |object: &Value| {
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        match (object["kind"].as_str().unwrap_or_default(), text("namespace"), text("name")) {
            (kind @ ("Node" | "Namespace" | "ServiceCIDR"), _, name) => format!("{kind} {name}"),
            (kind, namespace, name) if namespace.is_empty() => format!("{kind} default/{name}"),
            (kind, namespace, name) => format!("{kind} {namespace}/{name}"),
        }
    };
    let names: Vec<String> = objects.iter().map(name).collect();
    events.sort_by_key(|event| match event {
        SourceEvent::Upsert(object) => {
            let key = object.key().to_string();
            names.iter().position(|name| *name == key).map(|position| position + 1)
        }
        SourceEvent::Remove(..) | SourceEvent::Synced => None,
    });
    events
}

/// The documents that are valid YAML.
fn documents(text: &str) -> Vec<Value> {
    let chunks = text.split("\n---");
    chunks.filter_map(|chunk| serde_norway::from_str(chunk).ok()).filter(Value::is_object).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}
