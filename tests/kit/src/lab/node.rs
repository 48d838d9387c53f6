//! A node: a network namespace on the fabric, a cgroup, a directory, an agent.

use std::{
    collections::HashMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Result, bail, ensure};
use dataplane_agent::api::{request::View, views::ServiceView};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use super::{
    agent::Agent,
    cluster::Spec,
    cni::Runtime,
    fabric::{Fabric, Segment},
    family::Family,
    netns::Namespace,
    objects::{self, Manifests, Service},
    pod::Pod,
    process::{Place, Process},
    resources::{Resources, mount_bpffs},
};
use crate::traffic::HTTP;

/// A node of a cluster.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    segment: Segment,
    /// Host number of its address in the segment.
    host: u8,
    /// Number of its pod CIDR.
    range: u8,
    place: Place,
    directory: PathBuf,
    manifests: Manifests,
    agent: Agent,
}

impl Node {
    /// `number` starts at 1. `access`: URLs of the API server and a kubeconfig, if there is one.
    pub(super) fn create(
        resources: &Resources,
        fabric: &Fabric,
        spec: &Spec,
        number: u8,
        segment: Segment,
        access: Option<(Vec<String>, String)>,
    ) -> Result<Self> {
        let name = format!("node{number}");
        let namespace = Namespace::create(&resources.namespace(&name))?;
        let directory = resources.directory().join(&name);
        let place = Place::new(namespace, &resources.cgroup()?.join(&name), &directory.join("logs"))?;
        for child in ["run", "state"] {
            fs::create_dir_all(directory.join(child))?;
        }
        mount_bpffs(&directory.join("bpf"))?;
        let manifests = Manifests::create(directory.join("manifests"), directory.join("draft"))?;
        let mut config = config(spec, &name, &directory, place.cgroup());
        if let Some((urls, kubeconfig)) = access {
            let file = directory.join("kubeconfig");
            fs::write(&file, kubeconfig)?;
            config["source"] = json!("kubernetes");
            config["api_server"] = json!(urls);
            config["kubeconfig"] = json!(file);
            // the agent must not install into this machine's own directories
            config["cni"] = json!({"bin_dir": directory.join("opt/cni/bin"), "conf_dir": directory.join("etc/cni/net.d")});
        }
        let agent = Agent::new(place.clone(), &directory, &config)?;
        let node =
            Self { name, number, segment, host: number, range: number, place, directory, manifests, agent };
        node.connect(fabric, spec.mtu)?;
        Ok(node)
    }

    fn connect(&self, fabric: &Fabric, mtu: u32) -> Result<()> {
        let namespace = self.place.namespace();
        fabric.add_device(namespace, "eth0", self.segment, &self.name, mtu)?;
        let [v4, v6] = self.segment.gateway();
        namespace.ip(&format!(
            "addr add {}/24 dev eth0\n\
             addr add {}/64 dev eth0 nodad\n\
             route add default via {v4}\n\
             route add default via {v6}",
            self.v4(),
            self.v6()
        ))?;
        Ok(())
    }

    /// The BPF file system of its agent.
    pub fn bpffs(&self) -> PathBuf {
        self.directory.join("bpf")
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) const fn number(&self) -> u8 {
        self.number
    }

    /// Changes its pod CIDR; takes effect with the next update of the Node object.
    pub const fn set_range(&mut self, range: u8) {
        self.range = range;
    }

    /// Changes the address of its device; the Node object has it from its next update on.
    pub fn set_host(&mut self, host: u8) -> Result<()> {
        let (old_v4, old_v6) = (self.v4(), self.v6());
        self.host = host;
        let [gateway_v4, gateway_v6] = self.segment.gateway();
        // deleting the last address of a prefix deletes its routes
        self.place.namespace().ip(&format!(
            "addr add {}/24 dev eth0\n\
             addr add {}/64 dev eth0 nodad\n\
             addr del {old_v4}/24 dev eth0\n\
             addr del {old_v6}/64 dev eth0\n\
             addr replace {}/24 dev eth0\n\
             route replace default via {gateway_v4}\n\
             route replace default via {gateway_v6}",
            self.v4(),
            self.v6(),
            self.v4()
        ))?;
        Ok(())
    }

    /// The place of host processes.
    pub const fn place(&self) -> &Place {
        &self.place
    }

    pub const fn agent(&self) -> &Agent {
        &self.agent
    }

    pub const fn agent_mut(&mut self) -> &mut Agent {
        &mut self.agent
    }

    pub fn v4(&self) -> Ipv4Addr {
        self.segment.ipv4(self.host)
    }

    pub fn v6(&self) -> Ipv6Addr {
        self.segment.ipv6(self.host)
    }

    /// IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4().into(), self.v6().into()]
    }

    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4().into(),
            Family::V6 => self.v6().into(),
        }
    }

    /// HTTP address of a traffic server on the host.
    pub fn web(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.address(family), HTTP)
    }

    pub fn pod_cidrs(&self) -> [IpNet; 2] {
        let v4 = Ipv4Addr::new(10, 1, self.range, 0);
        let v6 = Ipv6Addr::new(0xfd00, 0x10, self.range.into(), 0, 0, 0, 0, 0);
        [Ipv4Net::new_assert(v4, 24).into(), Ipv6Net::new_assert(v6, 64).into()]
    }

    /// The Node object.
    pub(super) fn object(&self) -> Value {
        objects::node(&self.name, &self.addresses(), &self.pod_cidrs())
    }

    /// Writes objects to the file `<name>.yaml` of the directory that the agent watches.
    pub fn apply(&self, name: &str, objects: &[Value]) -> Result<()> {
        self.manifests.write(name, objects)
    }

    /// As [`Self::apply`], with any text.
    pub fn apply_text(&self, name: &str, text: &str) -> Result<()> {
        self.manifests.write_text(name, text)
    }

    /// Removes the file `<name>.yaml`.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        self.manifests.remove(name)
    }

    /// Waits until the agent has applied the service with exactly these backends.
    pub fn await_service(&mut self, wanted: &Service) -> Result<()> {
        self.await_services(std::slice::from_ref(wanted))
    }

    /// Waits until the agent has applied all these services, each with exactly its backends.
    pub fn await_services(&mut self, wanted: &[Service]) -> Result<()> {
        self.agent.until("services in the datapath", |agent| {
            // the list is costly with thousands of services: request it only when all are known
            let known = agent.status()?.status.objects.services;
            ensure!(known as usize >= wanted.len(), "the agent knows {known} of {} services", wanted.len());
            let views: Vec<ServiceView> = agent.ask(&View::Services)?;
            let mut by_name: HashMap<&str, Vec<&ServiceView>> = HashMap::new();
            for view in &views {
                by_name.entry(&view.name).or_default().push(view);
            }
            for service in wanted {
                let found = by_name.get(service.name.as_str()).map_or(&[][..], Vec::as_slice);
                if found.len() != service.ports.len()
                    || !found.iter().all(|view| matches_service(view, service))
                {
                    bail!("service {} differs: {found:?}", service.name);
                }
            }
            let status = agent.status()?.status;
            Ok((status.applied_revision == status.revision).then_some(()))
        })
    }

    /// Waits until the agent has applied services of all these names, whatever their backends.
    pub fn await_names(&mut self, wanted: &[String]) -> Result<()> {
        self.agent.until("services in the datapath", |agent| {
            let views: Vec<ServiceView> = agent.ask(&View::Services)?;
            if let Some(missing) = wanted.iter().find(|name| views.iter().all(|view| view.name != **name)) {
                bail!("there is no service {missing}");
            }
            let status = agent.status()?.status;
            Ok((status.applied_revision == status.revision).then_some(()))
        })
    }

    /// Starts the traffic server as a host process.
    pub fn serve(&self) -> Result<Process> {
        self.place.serve(&self.name)
    }

    /// A Pod object, bound to this node.
    pub fn pod_object(&self, name: &str, annotations: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "default", "name": name, "annotations": annotations},
            "spec": {"nodeName": self.name(), "containers": [{"name": "main", "image": "none"}]},
        })
    }

    pub(super) fn pod(&self, resources: &Resources, name: &str, runtime_config: Value) -> Result<Pod> {
        let namespace = Namespace::create(&resources.namespace(&format!("pod-{name}")))?;
        let place = Place::new(namespace, &self.place.cgroup().join("pods").join(name), self.place.logs())?;
        let runtime = Runtime::new(self.place.clone(), self.agent.socket().to_owned());
        let netns = place.namespace().name().to_owned();
        Pod::create(name, &self.name, place, runtime, runtime_config).or_else(|error| {
            // the next attempt gets a new sandbox, as from a container runtime
            Namespace::delete(&netns)?;
            Err(error.context(format!("on {}; log of its agent:\n{}", self.name, self.agent.log_tail())))
        })
    }
}

fn matches_service(view: &ServiceView, wanted: &Service) -> bool {
    let is_port =
        wanted.ports.iter().any(|port| port.port == view.port && port.protocol.name() == view.protocol);
    let mut found: Vec<IpAddr> = view.backends.iter().map(|backend| backend.address).collect();
    let mut expected: Vec<IpAddr> =
        wanted.backends.iter().flat_map(|backend| backend.addresses.clone()).collect();
    expected
        .retain(|address| wanted.addresses.iter().any(|frontend| frontend.is_ipv4() == address.is_ipv4()));
    found.sort();
    expected.sort();
    is_port && found == expected
}

fn config(spec: &Spec, name: &str, directory: &Path, cgroup: &Path) -> Value {
    let mut config = json!({
        "node_name": name,
        "manifests": directory.join("manifests"),
        "state_dir": directory.join("state"),
        "run_dir": directory.join("run"),
        "bpffs": directory.join("bpf"),
        "cgroup": cgroup,
        "routing": spec.routing.name(),
        "xdp": if spec.xdp { "native" } else { "off" },
        "masquerade": {"enabled": true, "except": spec.masquerade_except},
        "connect_time": {"tcp": spec.connect_tcp, "udp": spec.connect_udp},
        "log_format": "text",
    });
    if let (Some(config), Some(more)) = (config.as_object_mut(), spec.config.as_object()) {
        config.extend(more.clone());
    }
    config
}
