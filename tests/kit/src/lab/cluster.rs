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
    feed::{Control, Feed, Source, required},
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
    pub source: Source,
    pub routing: Routing,
    pub connect_tcp: bool,
    pub connect_udp: bool,
    /// Uplinks handle services in their drivers, and what is on the wire is complete, as on one of copper.
    pub xdp: bool,
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
            "source {}, routing {}, connect-time TCP {}, UDP {}, XDP {}",
            self.source.name(),
            self.routing.name(),
            on(self.connect_tcp),
            on(self.connect_udp),
            on(self.xdp)
        )
    }

    /// So many nodes on one segment; a name of its own.
    pub fn new(nodes: usize) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self {
            name: format!("t{}x{number}", std::process::id()),
            nodes: vec![Segment::FIRST; nodes],
            source: Source::Manifests,
            routing: Routing::Native,
            connect_tcp: true,
            connect_udp: false,
            xdp: false,
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
    feed: Feed,
    fabric: Fabric,
    site: Site,
    spec: Spec,
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
        let mut fabric = Fabric::create(&site, spec.mtu, spec.outside_mtu)?;
        if spec.xdp {
            fabric.use_drivers()?;
        }
        let feed = Feed::create(&site, &fabric, spec.mtu, &spec.source)?;
        let mut cluster = Self { nodes: Vec::new(), feed, fabric, site, spec: spec.clone() };
        for segment in &spec.nodes {
            cluster.add_node(*segment)?;
        }
        for index in 0..cluster.nodes.len() {
            cluster.register(index)?;
        }
        Ok(cluster)
    }

    /// One more machine, known to nobody, with no agent running; its index.
    pub fn add_node(&mut self, segment: Segment) -> Result<usize> {
        let number = self.nodes.last().map_or(1, |node| node.number() + 1);
        let access = self.feed.access()?;
        let node = Node::create(&self.site, &self.fabric, &self.spec, number, segment, access)?;
        self.feed.tell_all(&node)?;
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    /// Tells of the Node with this index: that there is one, or what it has become.
    pub fn register(&mut self, index: usize) -> Result<()> {
        let (name, object) = {
            let node = self.node(index)?;
            (format!("node-{}", node.name()), node.object())
        };
        self.feed.apply(&self.nodes, &name, &[object])
    }

    /// The Node with this index is no more; the machine is still there.
    pub fn unregister(&mut self, index: usize) -> Result<()> {
        let name = format!("node-{}", self.node(index)?.name());
        self.feed.withdraw(&self.nodes, &name)
    }

    /// The machine with this index goes, with all that runs on it. What is told of it stays: see [`Self::unregister`].
    pub fn remove_node(&mut self, index: usize) -> Result<()> {
        let namespace = self.node(index)?.place().namespace().name().to_owned();
        drop(self.nodes.remove(index));
        Namespace::delete(&namespace)
    }

    pub(super) const fn site(&self) -> &Site {
        &self.site
    }

    fn node(&self, index: usize) -> Result<&Node> {
        self.nodes.get(index).with_context(|| format!("there is no node with index {index}"))
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

    /// Name of a namespace of this cluster's.
    pub(super) fn namespace(&self, what: &str) -> String {
        self.site.namespace(what)
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
        self.pod_with(node, name, json!({}))
    }

    /// A pod for which the runtime asks more: `runtimeConfig` of the plugin.
    pub fn pod_with(&self, node: usize, name: &str, runtime_config: Value) -> Result<Pod> {
        let pod = self.node(node)?.pod(&self.site, name, runtime_config)?;
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
        self.apply_objects(&format!("service-{}", service.name), &service.objects())?;
        for node in &mut self.nodes {
            let name = node.name().to_owned();
            node.await_service(service).with_context(|| format!("on {name}"))?;
        }
        Ok(())
    }

    /// Makes these the objects of this name, for all agents; waits for nobody.
    pub fn apply_objects(&mut self, name: &str, objects: &[Value]) -> Result<()> {
        self.feed.apply(&self.nodes, name, objects)
    }

    /// Has agents told of something; returns when all of them go by it. Of so many objects that they make something of, and
    /// did not know as they are: what is told again is no change to wait for.
    pub fn change(&mut self, objects: usize, tell: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let agents = self.nodes.iter();
        let before: Vec<u64> =
            agents.map(|node| Ok(node.agent().status()?.status.revision)).collect::<Result<_>>()?;
        tell(self)?;
        for (node, before) in self.nodes.iter_mut().zip(before) {
            node.agent_mut().until("the change in the tables", |agent| {
                let status = agent.status()?.status;
                let is_heard = status.revision >= before + objects as u64;
                Ok((is_heard && status.applied_revision == status.revision).then_some(()))
            })?;
        }
        Ok(())
    }

    /// The objects of this name are gone: `service-<name>` are those of a service.
    pub fn withdraw(&mut self, name: &str) -> Result<()> {
        self.feed.withdraw(&self.nodes, name)
    }

    /// Where agents hear of objects, in a few words.
    pub fn describe_source(&self) -> String {
        match self.feed.control() {
            None => "manifests".to_owned(),
            Some(control) => control.server().describe().unwrap_or_else(|error| format!("{error:#}")),
        }
    }

    /// The API server, where there is one.
    pub fn control(&self) -> Result<&Control> {
        required(self.feed.control())
    }

    /// As [`Self::control`], to be changed.
    pub fn control_mut(&mut self) -> Result<&mut Control> {
        required(self.feed.control_mut())
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
    // the first addresses of a cluster belong to its own services
    let host = number + 0x100;
    let [high, low] = host.to_be_bytes();
    [Ipv4Addr::new(10, 96, high, low).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, host).into()]
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
