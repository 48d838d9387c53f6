//! A cluster: fabric, nodes with agents, pods.

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
    netns::{Namespace, veth},
    node::Node,
    objects::Service,
    pod::Pod,
    process::Place,
    publisher::{Control, ObjectPublisher, Source, required},
    resources::Resources,
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

/// Parameters of a cluster.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Unique among running clusters.
    pub name: String,
    /// The segment of each node.
    pub nodes: Vec<Segment>,
    pub source: Source,
    pub routing: Routing,
    pub connect_tcp: bool,
    pub connect_udp: bool,
    /// Run native XDP on the uplinks. Transmit checksum offload is then off, as veth would
    /// otherwise pass packets with incomplete checksums to XDP.
    pub xdp: bool,
    pub mtu: u32,
    /// MTU of the link to the outside host.
    pub outside_mtu: u32,
    pub masquerade_except: Vec<IpNet>,
    /// Further keys of the agents' configuration.
    pub config: Value,
}

impl Spec {
    /// One line for messages.
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

    /// A cluster of `nodes` nodes on one segment, with a unique name.
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

/// A running cluster. Dropping it removes it, unless [`Self::keep`] was called.
#[derive(Debug)]
pub struct Cluster {
    // dropped in this order: processes before the namespaces they run in
    nodes: Vec<Node>,
    publisher: ObjectPublisher,
    fabric: Fabric,
    resources: Resources,
    spec: Spec,
}

impl Cluster {
    /// Creates a cluster; returns when every agent is ready.
    pub fn create(spec: &Spec) -> Result<Self> {
        let mut cluster = Self::create_stopped(spec)?;
        cluster.start()?;
        Ok(cluster)
    }

    /// Starts the agents of all nodes; returns when every one is ready.
    pub fn start(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.agent_mut().start()?;
        }
        for node in &mut self.nodes {
            let name = node.name().to_owned();
            node.agent_mut().await_ready().with_context(|| format!("agent of {name}"))?;
        }
        Ok(())
    }

    /// Creates a cluster without starting its agents.
    pub fn create_stopped(spec: &Spec) -> Result<Self> {
        let resources = Resources::claim(&spec.name)?;
        let mut fabric = Fabric::create(&resources, spec.mtu, spec.outside_mtu)?;
        if spec.xdp {
            fabric.enable_native_xdp()?;
        }
        let publisher = ObjectPublisher::create(&resources, &fabric, spec.mtu, &spec.source)?;
        let mut cluster = Self { nodes: Vec::new(), publisher, fabric, resources, spec: spec.clone() };
        for segment in &spec.nodes {
            cluster.add_node(*segment)?;
        }
        for index in 0..cluster.nodes.len() {
            cluster.register(index)?;
        }
        Ok(cluster)
    }

    /// Adds a machine without a Node object and without a running agent; returns its index.
    pub fn add_node(&mut self, segment: Segment) -> Result<usize> {
        let number = self.nodes.last().map_or(1, |node| node.number() + 1);
        let access = self.publisher.access()?;
        let node = Node::create(&self.resources, &self.fabric, &self.spec, number, segment, access)?;
        self.publisher.publish_all_to(&node)?;
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    /// Creates or updates the Node object of the node with this index.
    pub fn register(&mut self, index: usize) -> Result<()> {
        let (name, object) = {
            let node = self.node(index)?;
            (format!("node-{}", node.name()), node.object())
        };
        self.publisher.apply(&self.nodes, &name, &[object])
    }

    /// Deletes the Node object of the node with this index; the machine stays.
    pub fn unregister(&mut self, index: usize) -> Result<()> {
        let name = format!("node-{}", self.node(index)?.name());
        self.publisher.withdraw(&self.nodes, &name)
    }

    /// Removes the machine with this index and all that runs on it. Its Node object stays: see
    /// [`Self::unregister`].
    pub fn remove_node(&mut self, index: usize) -> Result<()> {
        let namespace = self.node(index)?.place().namespace().name().to_owned();
        drop(self.nodes.remove(index));
        Namespace::delete(&namespace)
    }

    pub(super) const fn resources(&self) -> &Resources {
        &self.resources
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

    /// Name of a namespace of this cluster.
    pub(super) fn namespace(&self, what: &str) -> String {
        self.resources.namespace(what)
    }

    /// The host beyond the gateway, to run processes there.
    pub fn outside(&self) -> Result<Place> {
        Place::new(
            self.fabric.outside().clone(),
            &self.resources.cgroup()?.join("outside"),
            &self.resources.directory().join("logs"),
        )
    }

    /// The router between the segments, to run processes there.
    pub fn gateway(&self) -> Result<Place> {
        Place::new(
            self.fabric.gateway().clone(),
            &self.resources.cgroup()?.join("gateway"),
            &self.resources.directory().join("logs"),
        )
    }

    /// Connects the machine with this index to a segment by a further device, without an address.
    pub fn add_device(&self, node: usize, device: &str, segment: Segment) -> Result<()> {
        let node = self.node(node)?;
        let port = format!("{}-{device}", node.name());
        self.fabric.add_device(node.place().namespace(), device, segment, &port, self.spec.mtu)
    }

    /// Creates a container that is no pod: a namespace with a device `eth0`, whose other end is a
    /// port of a bridge on the node with this index.
    pub fn container(&self, node: usize, name: &str, bridge: &str) -> Result<Place> {
        let node = self.node(node)?;
        let namespace = Namespace::create(&self.resources.namespace(name))?;
        let host = node.place().namespace();
        veth((&namespace, "eth0"), (host, name))?;
        host.ip(&format!("link set {name} master {bridge} up"))?;
        namespace.ip("link set eth0 up")?;
        Place::new(namespace, &node.place().cgroup().join(name), node.place().logs())
    }

    /// Creates a pod on the node with this index.
    pub fn pod(&self, node: usize, name: &str) -> Result<Pod> {
        self.pod_with(node, name, json!({}))
    }

    /// As [`Self::pod`], with a `runtimeConfig` for the plugin.
    pub fn pod_with(&self, node: usize, name: &str, runtime_config: Value) -> Result<Pod> {
        let pod = self.node(node)?.pod(&self.resources, name, runtime_config)?;
        let record = PodRecord {
            namespace: pod.place().namespace().name().to_owned(),
            cgroup: pod.place().cgroup().to_owned(),
            logs: pod.place().logs().to_owned(),
        };
        let directory = self.resources.directory().join("pods");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(name), serde_json::to_string(&record)?)?;
        Ok(pod)
    }

    /// Publishes a service and waits until every agent has applied it.
    pub fn apply(&mut self, service: &Service) -> Result<()> {
        self.apply_objects(&format!("service-{}", service.name), &service.objects())?;
        for node in &mut self.nodes {
            let name = node.name().to_owned();
            node.await_service(service).with_context(|| format!("on {name}"))?;
        }
        Ok(())
    }

    /// Publishes `objects` under `name` in place of those published under it before. Does not wait
    /// for the agents.
    pub fn apply_objects(&mut self, name: &str, objects: &[Value]) -> Result<()> {
        self.publisher.apply(&self.nodes, name, objects)
    }

    /// Runs `publish`, and waits until every agent has applied it. `objects`: how many objects it
    /// changes that agents use; an object published again unchanged does not count.
    pub fn change(&mut self, objects: usize, publish: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let agents = self.nodes.iter();
        let before: Vec<u64> =
            agents.map(|node| Ok(node.agent().status()?.status.revision)).collect::<Result<_>>()?;
        publish(self)?;
        for (node, before) in self.nodes.iter_mut().zip(before) {
            node.agent_mut().until("the change in the tables", |agent| {
                let status = agent.status()?.status;
                let is_received = status.revision >= before + objects as u64;
                Ok((is_received && status.applied_revision == status.revision).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Deletes the objects published under `name`; [`Self::apply`] uses `service-<name>`.
    pub fn withdraw(&mut self, name: &str) -> Result<()> {
        self.publisher.withdraw(&self.nodes, name)
    }

    /// Where agents get their objects, for messages.
    pub fn describe_source(&self) -> String {
        match self.publisher.control() {
            None => "manifests".to_owned(),
            Some(control) => control.server().describe().unwrap_or_else(|error| format!("{error:#}")),
        }
    }

    /// The API server.
    ///
    /// # Errors
    /// The cluster's source is manifests.
    pub fn control(&self) -> Result<&Control> {
        required(self.publisher.control())
    }

    /// As [`Self::control`], mutable.
    pub fn control_mut(&mut self) -> Result<&mut Control> {
        required(self.publisher.control_mut())
    }

    /// Leaves the cluster running when this process ends.
    pub fn keep(mut self) -> Result<()> {
        self.resources.keep()?;
        for node in &mut self.nodes {
            node.agent_mut().detach();
        }
        Ok(())
    }
}

/// IPv4 and IPv6 cluster IP of the service with this number.
pub fn service_addresses(number: u16) -> [IpAddr; 2] {
    // the first addresses of the range are those of the cluster's own services
    let host = number + 0x100;
    let [high, low] = host.to_be_bytes();
    [Ipv4Addr::new(10, 96, high, low).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, host).into()]
}

/// A pod's record on disk for [`attach_to_pod`].
#[derive(Serialize, Deserialize)]
struct PodRecord {
    namespace: String,
    cgroup: PathBuf,
    logs: PathBuf,
}

/// The place of a pod of a cluster that another program created. The error lists the pods there
/// are.
pub fn attach_to_pod(cluster: &str, pod: &str) -> Result<Place> {
    let directory = Path::new("/run/dataplane-lab").join(cluster).join("pods");
    let file = directory.join(pod);
    let Ok(text) = fs::read_to_string(&file) else {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("cluster {cluster} is not running"))?;
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        anyhow::bail!("cluster {cluster} has no pod {pod}; it has {}", names.join(", "));
    };
    let record: PodRecord = serde_json::from_str(&text)?;
    Place::new(Namespace::open(&record.namespace)?, &record.cgroup, &record.logs)
}
