//! Kubernetes objects as `kubectl get -o yaml` writes them, and the manifest directory of an agent.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{cluster::service_addresses, family::Family, pod::Pod};
use crate::traffic::{ECHO, HTTP};

/// Ports of [`Service::of`].
pub const WEB_PORT: u16 = 80;
pub const ECHO_PORT: u16 = 7;
/// Kubernetes splits the endpoints of a service into slices of at most this size.
const SLICE: usize = 100;

/// A transport protocol, as Kubernetes objects name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// A port of a service, with its target port.
#[derive(Clone, Debug)]
pub struct ServicePort {
    pub name: &'static str,
    pub port: u16,
    pub protocol: Protocol,
    pub target: u16,
}

/// A pod as a backend.
#[derive(Clone, Debug)]
pub struct Backend {
    pub pod: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
}

/// A service and its backends.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub backends: Vec<Backend>,
}

impl Service {
    /// A service for the traffic server ([`crate::traffic`]) in these pods: HTTP over TCP, and an
    /// echo over TCP and UDP.
    pub fn of(pods: &[&Pod]) -> Self {
        let port = |name, port, protocol, target| ServicePort { name, port, protocol, target };
        Self {
            name: "web".to_owned(),
            addresses: service_addresses(1).to_vec(),
            ports: vec![
                port("http", WEB_PORT, Protocol::Tcp, HTTP),
                port("echo", ECHO_PORT, Protocol::Tcp, ECHO),
                port("echo-udp", ECHO_PORT, Protocol::Udp, ECHO),
            ],
            backends: pods.iter().map(|pod| pod.backend()).collect(),
        }
    }

    /// Its frontend: the address of a family, and a port.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        let address = self.addresses.iter().find(|address| family.is_of(address));
        SocketAddr::new(*address.expect("a service of both families"), port)
    }

    /// The Service and its `EndpointSlice`s.
    pub fn objects(&self) -> Vec<Value> {
        let mut objects = vec![self.service()];
        for (family, is_ipv4) in [("IPv4", true), ("IPv6", false)] {
            if !self.addresses.iter().any(|address| address.is_ipv4() == is_ipv4) {
                continue;
            }
            let ready: Vec<(&Backend, IpAddr)> = self
                .backends
                .iter()
                .flat_map(|backend| backend.addresses.iter().map(move |address| (backend, *address)))
                .filter(|(_, address)| address.is_ipv4() == is_ipv4)
                .collect();
            // a service without endpoints has an empty slice, not none
            let slices = ready.len().div_ceil(SLICE).max(1);
            for number in 0..slices {
                let part = ready.iter().skip(number * SLICE).take(SLICE);
                objects.push(self.slice(family, number, part));
            }
        }
        objects
    }

    fn service(&self) -> Value {
        let ports = self.ports.iter().map(|port| {
            json!({
                "name": port.name,
                "port": port.port,
                "protocol": port.protocol.name(),
                "targetPort": port.target,
            })
        });
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(&self.name, &json!({"app": self.name})),
            "spec": {
                "type": "ClusterIP",
                "clusterIP": self.addresses.first(),
                "clusterIPs": self.addresses,
                "ipFamilies": self.addresses.iter().map(family).collect::<Vec<_>>(),
                "ipFamilyPolicy": if self.addresses.len() == 1 { "SingleStack" } else { "PreferDualStack" },
                "internalTrafficPolicy": "Cluster",
                "selector": {"app": self.name},
                "sessionAffinity": "None",
                "ports": ports.collect::<Vec<_>>(),
            },
            "status": {"loadBalancer": {}},
        })
    }

    fn slice<'a>(
        &self,
        family: &str,
        number: usize,
        part: impl Iterator<Item = &'a (&'a Backend, IpAddr)>,
    ) -> Value {
        let endpoints = part.map(|(backend, address)| {
            json!({
                "addresses": [address],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": backend.node,
                "targetRef": {"kind": "Pod", "name": backend.pod, "namespace": "default", "uid": uid("pod", &backend.pod)},
            })
        });
        let ports = self
            .ports
            .iter()
            .map(|port| json!({"name": port.name, "port": port.target, "protocol": port.protocol.name()}));
        let name = format!("{}-{}-{number}", self.name, family.to_lowercase());
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata(&name, &json!({
                "kubernetes.io/service-name": self.name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            })),
            "addressType": family,
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": ports.collect::<Vec<_>>(),
        })
    }
}

/// A Node.
pub(super) fn node(name: &str, addresses: &[IpAddr], pod_cidrs: &[IpNet]) -> Value {
    let addresses = addresses.iter().map(|address| json!({"type": "InternalIP", "address": address}));
    let mut metadata = metadata(name, &json!({"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}));
    if let Some(fields) = metadata.as_object_mut() {
        // the only kind here that is not in a namespace
        fields.remove("namespace");
    }
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": metadata,
        "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs},
        "status": {
            "addresses": addresses.chain([json!({"type": "Hostname", "address": name})]).collect::<Vec<_>>(),
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn metadata(name: &str, labels: &Value) -> Value {
    static VERSION: AtomicU64 = AtomicU64::new(1_000);
    json!({
        "name": name,
        "namespace": "default",
        "uid": uid("object", name),
        "resourceVersion": VERSION.fetch_add(1, Ordering::Relaxed).to_string(),
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": labels,
    })
}

/// A UID that is the same in every manifest of the object.
fn uid(kind: &str, name: &str) -> String {
    let hash = |seed: u64| {
        let bytes = kind.bytes().chain(name.bytes());
        bytes.fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    };
    let (a, b) = (hash(0xcbf2_9ce4_8422_2325), hash(0x9e37_79b9_7f4a_7c15));
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        a >> 16 & 0xffff,
        a & 0xfff,
        b >> 52,
        b & 0xffff_ffff_ffff
    )
}

const fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// A manifest directory that an agent watches. Files are replaced atomically.
#[derive(Clone, Debug)]
pub(super) struct Manifests {
    directory: PathBuf,
    /// On the same file system, but not watched.
    draft: PathBuf,
}

impl Manifests {
    pub(super) fn create(directory: PathBuf, draft: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { directory, draft })
    }

    /// Writes `<name>.yaml`: one document, or a List of several objects.
    pub(super) fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let text = match objects {
            [object] => serde_norway::to_string(object),
            _ => serde_norway::to_string(&json!({"apiVersion": "v1", "kind": "List", "items": objects})),
        };
        self.write_text(name, &text.context("write YAML")?)
    }

    pub(super) fn write_text(&self, name: &str, text: &str) -> Result<()> {
        fs::write(&self.draft, text)?;
        let file = self.directory.join(format!("{name}.yaml"));
        fs::rename(&self.draft, &file).with_context(|| file.display().to_string())
    }

    pub(super) fn remove(&self, name: &str) -> Result<()> {
        let file = self.directory.join(format!("{name}.yaml"));
        fs::remove_file(&file).with_context(|| file.display().to_string())
    }
}

/// Counts occurrences.
pub fn distribution<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeMap<T, u64> {
    let mut counts = BTreeMap::new();
    for item in items {
        *counts.entry(item).or_default() += 1;
    }
    counts
}
