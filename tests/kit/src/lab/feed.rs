//! How a cluster's agents hear of its objects: by files in a directory of each, or from an API server on the fabric.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize as _;
use serde_json::Value;

use super::{
    fabric::{Fabric, Segment},
    netns::Namespace,
    node::Node,
    process::Place,
    site::Site,
};
use crate::apiserver::{ApiServer, Needs, Objects, User};

/// Number of the API server on the first segment.
const HOST: u8 = 253;
/// Its port on the fabric's bridge.
const PORT: &str = "api";

/// As they are installed.
const ROLES: [&str; 2] = [
    include_str!("../../../../deploy/base/namespace.yaml"),
    include_str!("../../../../deploy/base/rbac.yaml"),
];

/// The setting `source` of the agents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory for each.
    Manifests,
    /// One API server for all.
    Kubernetes(Needs),
}

impl Source {
    /// An API server nothing else is asked of.
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

/// What has been told, by name, and to whom.
#[derive(Debug)]
pub(super) struct Feed {
    told: BTreeMap<String, Vec<Value>>,
    control: Option<Control>,
}

/// Who the agents are to the API server.
pub fn agent_user() -> User {
    User::service_account("dataplane-system", "dataplane-agent")
}

impl Control {
    fn create(site: &Site, fabric: &Fabric, mtu: u32, needs: &Needs) -> Result<Self> {
        let namespace = Namespace::create(&site.namespace(PORT))?;
        fabric.plug(&namespace, "eth0", Segment::FIRST, PORT, mtu)?;
        let (v4, v6) = (Segment::FIRST.ipv4(HOST), Segment::FIRST.ipv6(HOST));
        let [gateway_v4, gateway_v6] = Segment::FIRST.gateway();
        namespace.ip(&format!(
            "addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             route add default via {gateway_v4}\n\
             route add default via {gateway_v6}"
        ))?;
        let directory = site.directory().join(PORT);
        let place = Place::new(namespace, &site.cgroup()?.join(PORT), &directory.join("logs"))?;
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

    /// Its objects, as somebody who may do everything; they are reached however the fabric is.
    pub const fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Puts its cable out or in: connections stay, and nothing comes through.
    pub fn set_connected(&self, fabric: &Fabric, is_connected: bool) -> Result<()> {
        fabric.set_port(PORT, is_connected)
    }
}

impl Feed {
    pub(super) fn create(site: &Site, fabric: &Fabric, mtu: u32, source: &Source) -> Result<Self> {
        let control = match source {
            Source::Manifests => None,
            Source::Kubernetes(needs) => Some(Control::create(site, fabric, mtu, needs)?),
        };
        Ok(Self { told: BTreeMap::new(), control })
    }

    pub(super) const fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    pub(super) const fn control_mut(&mut self) -> Option<&mut Control> {
        self.control.as_mut()
    }

    /// Where agents ask, and as whom: URLs and a kubeconfig.
    pub(super) fn access(&self) -> Result<Option<(Vec<String>, String)>> {
        let Some(control) = &self.control else { return Ok(None) };
        Ok(Some((control.server.urls(), control.server.kubeconfig(&agent_user())?)))
    }

    /// Makes these the objects of this name; what there was of it besides is gone.
    pub(super) fn apply(&mut self, nodes: &[Node], name: &str, objects: &[Value]) -> Result<()> {
        let before = self.told.insert(name.to_owned(), objects.to_vec()).unwrap_or_default();
        match &self.control {
            None => nodes.iter().try_for_each(|node| node.apply(name, objects)),
            Some(control) => {
                control.objects.apply(objects)?;
                let kept: Vec<_> = objects.iter().map(identity).collect();
                let gone: Vec<Value> =
                    before.into_iter().filter(|object| !kept.contains(&identity(object))).collect();
                control.objects.delete(&gone)
            }
        }
    }

    /// The objects of this name are gone.
    pub(super) fn withdraw(&mut self, nodes: &[Node], name: &str) -> Result<()> {
        let Some(gone) = self.told.remove(name) else { bail!("there are no objects {name}") };
        match &self.control {
            None => nodes.iter().try_for_each(|node| node.withdraw(name)),
            Some(control) => control.objects.delete(&gone),
        }
    }

    /// Tells a node that has just come.
    pub(super) fn tell_all(&self, node: &Node) -> Result<()> {
        if self.control.is_some() {
            return Ok(());
        }
        self.told.iter().try_for_each(|(name, objects)| node.apply(name, objects))
    }
}

fn identity(object: &Value) -> [Value; 4] {
    let metadata = &object["metadata"];
    [&object["apiVersion"], &object["kind"], &metadata["namespace"], &metadata["name"]].map(Clone::clone)
}

/// What agents may do: what `deploy/` grants them.
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

/// Of [`Feed::control`], where a scenario cannot do without.
pub(super) fn required<T>(control: Option<T>) -> Result<T> {
    control.context("this cluster has no API server: its source is manifests")
}
