//! Publishes a cluster's objects to its agents: as files in a directory of each node, or through an
//! API server on the fabric.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize as _;
use serde_json::Value;

use super::{
    fabric::{Fabric, Segment},
    netns::Namespace,
    node::Node,
    process::Place,
    resources::Resources,
};
use crate::apiserver::{ApiServer, Needs, Objects, User};

/// Host number of the API server in the first segment.
const HOST: u8 = 253;
/// The API server's bridge port.
const PORT: &str = "api";

/// Manifests with the agent's permissions, as installed.
const ROLES: [&str; 2] = [
    include_str!("../../../../deploy/base/namespace.yaml"),
    include_str!("../../../../deploy/base/rbac.yaml"),
];

/// The setting `source` of the agents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory per agent.
    Manifests,
    /// One API server for all agents.
    Kubernetes(Needs),
}

impl Source {
    /// An API server with default options.
    pub fn kubernetes() -> Self {
        Self::Kubernetes(Needs::default())
    }

    pub const fn name(&self) -> &'static str {
        match self {
            Self::Manifests => "manifests",
            Self::Kubernetes(_) => "kubernetes",
        }
    }
}

/// The API server of a cluster.
#[derive(Debug)]
pub struct Control {
    server: ApiServer,
    objects: Objects,
}

/// Published objects by name, and the API server if there is one.
#[derive(Debug)]
pub(super) struct ObjectPublisher {
    published: BTreeMap<String, Vec<Value>>,
    control: Option<Control>,
}

/// The agents' service account.
pub fn agent_user() -> User {
    User::service_account("dataplane-system", "dataplane-agent")
}

impl Control {
    fn create(resources: &Resources, fabric: &Fabric, mtu: u32, needs: &Needs) -> Result<Self> {
        let namespace = Namespace::create(&resources.namespace(PORT))?;
        fabric.add_device(&namespace, "eth0", Segment::FIRST, PORT, mtu)?;
        let (v4, v6) = (Segment::FIRST.ipv4(HOST), Segment::FIRST.ipv6(HOST));
        let [gateway_v4, gateway_v6] = Segment::FIRST.gateway();
        namespace.ip(&format!(
            "addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             route add default via {gateway_v4}\n\
             route add default via {gateway_v6}"
        ))?;
        let directory = resources.directory().join(PORT);
        let place = Place::new(namespace, &resources.cgroup()?.join(PORT), &directory.join("logs"))?;
        let mut needs = needs.clone();
        needs.users.push(agent_user());
        let server = ApiServer::start(&place, v4.into(), &directory, &needs)?;
        let objects = server.objects()?;
        objects.apply(&agent_roles()?)?;
        Ok(Self { server, objects })
    }

    pub const fn server(&self) -> &ApiServer {
        &self.server
    }

    pub const fn server_mut(&mut self) -> &mut ApiServer {
        &mut self.server
    }

    /// A client with all permissions. It does not use the fabric.
    pub const fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Disconnects or connects the API server: connections stay open, but no packet passes.
    pub fn set_connected(&self, fabric: &Fabric, is_connected: bool) -> Result<()> {
        fabric.set_port(PORT, is_connected)
    }
}

impl ObjectPublisher {
    pub(super) fn create(resources: &Resources, fabric: &Fabric, mtu: u32, source: &Source) -> Result<Self> {
        let control = match source {
            Source::Manifests => None,
            Source::Kubernetes(needs) => Some(Control::create(resources, fabric, mtu, needs)?),
        };
        Ok(Self { published: BTreeMap::new(), control })
    }

    pub(super) const fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    pub(super) const fn control_mut(&mut self) -> Option<&mut Control> {
        self.control.as_mut()
    }

    /// URLs and kubeconfig of the API server for agents.
    pub(super) fn access(&self) -> Result<Option<(Vec<String>, String)>> {
        let Some(control) = &self.control else { return Ok(None) };
        Ok(Some((control.server.urls(), control.server.kubeconfig(&agent_user())?)))
    }

    /// Publishes `objects` under `name` in place of those published under it before.
    pub(super) fn apply(&mut self, nodes: &[Node], name: &str, objects: &[Value]) -> Result<()> {
        let before = self.published.insert(name.to_owned(), objects.to_vec()).unwrap_or_default();
        match &self.control {
            None => nodes.iter().try_for_each(|node| node.apply(name, objects)),
            Some(control) => {
                control.objects.apply(objects)?;
                let kept: Vec<_> = objects.iter().map(identity).collect();
                let deleted: Vec<Value> =
                    before.into_iter().filter(|object| !kept.contains(&identity(object))).collect();
                control.objects.delete(&deleted)
            }
        }
    }

    /// Deletes the objects published under `name`.
    pub(super) fn withdraw(&mut self, nodes: &[Node], name: &str) -> Result<()> {
        let Some(deleted) = self.published.remove(name) else { bail!("no objects are published as {name}") };
        match &self.control {
            None => nodes.iter().try_for_each(|node| node.withdraw(name)),
            Some(control) => control.objects.delete(&deleted),
        }
    }

    /// Writes all published objects for a new node.
    pub(super) fn publish_all_to(&self, node: &Node) -> Result<()> {
        if self.control.is_some() {
            return Ok(());
        }
        self.published.iter().try_for_each(|(name, objects)| node.apply(name, objects))
    }
}

fn identity(object: &Value) -> [Value; 4] {
    let metadata = &object["metadata"];
    [&object["apiVersion"], &object["kind"], &metadata["namespace"], &metadata["name"]].map(Clone::clone)
}

/// The agents' RBAC objects from `deploy/`.
fn agent_roles() -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for text in ROLES {
        for document in serde_norway::Deserializer::from_str(text) {
            let object = Value::deserialize(document).context("a manifest in deploy/")?;
            if !object.is_null() {
                objects.push(object);
            }
        }
    }
    Ok(objects)
}

/// The API server, or an error that says that the cluster has none.
pub(super) fn required<T>(control: Option<T>) -> Result<T> {
    control.context("this cluster has no API server: its source is manifests")
}
