//! A cluster: fabric, nodes with agents that know of each other, pods.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    fabric::{Fabric, Segment},
    netns::Namespace,
    node::Node,
    objects::Service,
    pod::Pod,
    process::Place,
    site::Site,
};

/// The setting `routing` of the agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    Auto,
    Native,
    Vxlan,
}

impl Routing {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Vxlan => "vxlan",
        }
    }
}

/// What a cluster is to be.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Not used by any other running cluster.
    pub name: String,
    /// Where each node is.
    pub nodes: Vec<Segment>,
    pub routing: Routing,
    pub connect_tcp: bool,
    pub connect_udp: bool,
    pub mtu: u32,
    /// Of the link to the outside host.
    pub outside_mtu: u32,
    pub masquerade_except: Vec<IpNet>,
    /// Further keys of the agents' configuration.
    pub config: Value,
}

impl Spec {
    /// In a few words, for messages.
    pub fn describe(&self) -> String {
        let on = |on: bool| if on { "on" } else { "off" };
        format!(
            "routing {}, connect-time TCP {}, UDP {}",
            self.routing.name(),
            on(self.connect_tcp),
            on(self.connect_udp)
        )
    }

    /// So many nodes on one segment; a name of its own.
    pub fn new(nodes: usize) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self {
            name: format!("t{}x{number}", std::process::id()),
            nodes: vec![Segment::FIRST; nodes],
            routing: Routing::Native,
            connect_tcp: true,
            connect_udp: false,
            mtu: 1_500,
            outside_mtu: 1_500,
            masquerade_except: Vec::new(),
            config: json!({}),
        }
    }
}

/// A running cluster. It ends with its handle, unless kept.
#[derive(Debug)]
pub struct Cluster {
    // ends before what it runs on
    nodes: Vec<Node>,
    fabric: Fabric,
    site: Site,
}

impl Cluster {
    /// Makes it; returns when every agent is ready.
    pub fn create(spec: &Spec) -> Result<Self> {
        let mut cluster = Self::lay_out(spec)?;
        for node in &mut cluster.nodes {
            node.agent_mut().start()?;
        }
        for node in &mut cluster.nodes {
            let name = node.name().to_owned();
            node.agent_mut().await_ready().with_context(|| format!("agent of {name}"))?;
        }
        Ok(cluster)
    }

    /// Makes all but the agents' processes.
    pub fn lay_out(spec: &Spec) -> Result<Self> {
        let site = Site::claim(&spec.name)?;
        let fabric = Fabric::create(&site, spec.mtu, spec.outside_mtu)?;
        let mut nodes = Vec::new();
        for (number, segment) in (1..).zip(&spec.nodes) {
            nodes.push(Node::create(&site, &fabric, spec, number, *segment)?);
        }
        let objects: Vec<Value> = nodes.iter().map(Node::object).collect();
        for node in &nodes {
            for (object, of) in objects.iter().zip(&nodes) {
                node.apply(&format!("node-{}", of.name()), std::slice::from_ref(object))?;
            }
        }
        Ok(Self { nodes, fabric, site })
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn nodes_mut(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    pub const fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// The host beyond the gateway, as a place for processes.
    pub fn outside(&self) -> Result<Place> {
        Place::new(
            self.fabric.outside().clone(),
            &self.site.cgroup()?.join("outside"),
            &self.site.directory().join("logs"),
        )
    }

    /// Makes a pod on the node with this index.
    pub fn pod(&self, node: usize, name: &str) -> Result<Pod> {
        let node = self.nodes.get(node).with_context(|| format!("there is no node with index {node}"))?;
        let pod = node.pod(&self.site, name)?;
        let known = Known {
            namespace: pod.place().namespace().name().to_owned(),
            cgroup: pod.place().cgroup().to_owned(),
            logs: pod.place().logs().to_owned(),
        };
        let directory = self.site.directory().join("pods");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(name), serde_json::to_string(&known)?)?;
        Ok(pod)
    }

    /// Tells every agent of a service and waits until each has it.
    pub fn apply(&mut self, service: &Service) -> Result<()> {
        let objects = service.objects();
        for node in &self.nodes {
            node.apply(&format!("service-{}", service.name), &objects)?;
        }
        for node in &mut self.nodes {
            let name = node.name().to_owned();
            node.await_service(service).with_context(|| format!("on {name}"))?;
        }
        Ok(())
    }

    /// Leaves it running.
    pub fn keep(mut self) -> Result<()> {
        self.site.keep()?;
        for node in &mut self.nodes {
            node.agent_mut().leave();
        }
        Ok(())
    }
}

/// IPv4 and IPv6 address of the service with this number.
pub fn service_addresses(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [Ipv4Addr::new(10, 96, high, low).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number).into()]
}

/// What is remembered of a pod for [`attach_to_pod`].
#[derive(Serialize, Deserialize)]
struct Known {
    namespace: String,
    cgroup: PathBuf,
    logs: PathBuf,
}

/// The place of a pod of a cluster another program made; the names of those there are if it is none of them.
pub fn attach_to_pod(cluster: &str, pod: &str) -> Result<Place> {
    let directory = Path::new("/run/dataplane-lab").join(cluster).join("pods");
    let file = directory.join(pod);
    let Ok(text) = fs::read_to_string(&file) else {
        let entries = fs::read_dir(&directory).with_context(|| format!("cluster {cluster} does not run"))?;
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        anyhow::bail!("cluster {cluster} has no pod {pod}; it has {}", names.join(", "));
    };
    let known: Known = serde_json::from_str(&text)?;
    Place::new(Namespace::open(&known.namespace)?, &known.cgroup, &known.logs)
}
