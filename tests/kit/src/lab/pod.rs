//! A pod: a network namespace with a device from the CNI plugin, and a cgroup below its node's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    cni::{Container, Runtime},
    family::Family,
    netns::Namespace,
    objects::Backend,
    process::{Place, Process},
};
use crate::traffic::{ECHO, HTTP};

/// A pod of a node.
#[derive(Debug)]
pub struct Pod {
    name: String,
    node: String,
    id: String,
    place: Place,
    runtime: Runtime,
    runtime_config: Value,
    result: Value,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Pod {
    pub(super) fn create(
        name: &str,
        node: &str,
        place: Place,
        runtime: Runtime,
        runtime_config: Value,
    ) -> Result<Self> {
        let id = place.namespace().name().to_owned();
        let netns = place.namespace().path();
        let container = Container { id: &id, netns: &netns, pod: name, runtime_config: &runtime_config };
        let result = match runtime.call("ADD", &container, None) {
            Ok(result) => result,
            Err(error) => {
                // undo a partial ADD, as a runtime does; the first error is the one to report
                let _result_of_undo = runtime.call("DEL", &container, None);
                return Err(error);
            }
        };
        let addresses = addresses(&result).with_context(|| format!("the result of CNI ADD: {result}"))?;
        let v4 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        let v6 = addresses.iter().find_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        let (v4, v6) = v4.zip(v6).with_context(|| format!("pod {name} lacks a family: {addresses:?}"))?;
        let (name, node) = (name.to_owned(), node.to_owned());
        Ok(Self { name, node, id, place, runtime, runtime_config, result, v4, v6 })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the pod's node.
    pub fn node(&self) -> &str {
        &self.node
    }

    pub const fn place(&self) -> &Place {
        &self.place
    }

    pub const fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    pub const fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    pub const fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }

    /// HTTP address of the traffic server.
    pub const fn web(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.address(family), HTTP)
    }

    /// Echo address of the traffic server, TCP and UDP.
    pub const fn echo(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.address(family), ECHO)
    }

    /// Name of the host's end of the pod's veth pair.
    pub fn host_device(&self) -> Result<&str> {
        let interfaces = self.result.get("interfaces").and_then(Value::as_array).into_iter().flatten();
        let mut hosts = interfaces.filter(|interface| interface.get("sandbox").is_none_or(|at| at == ""));
        let name = hosts.next().and_then(|interface| interface.get("name")?.as_str());
        name.with_context(|| format!("no device of the host in {}", self.result))
    }

    /// The pod as a backend of a service.
    pub fn backend(&self) -> Backend {
        Backend { pod: self.name.clone(), node: self.node.clone(), addresses: self.addresses().to_vec() }
    }

    /// Starts the traffic server in the pod, on its default ports.
    pub fn serve(&self) -> Result<Process> {
        self.place.serve(&self.name)
    }

    /// Starts an HTTP server over SCTP at the pod's address of a family.
    pub fn serve_sctp(&self, family: Family) -> Result<Process> {
        let address = self.address(family).to_string();
        self.place.start_traffic(&["serve", "--name", &self.name, "--bind", &address, "--sctp"])
    }

    /// Calls CNI CHECK with the result of ADD.
    pub fn check(&self) -> Result<()> {
        self.call("CHECK", Some(&self.result)).map(drop)
    }

    /// Removes the pod as a runtime does: DEL, then the namespace.
    pub fn delete(self) -> Result<()> {
        self.call("DEL", Some(&self.result))?;
        Namespace::delete(self.place.namespace().name())
    }

    fn call(&self, command: &str, previous: Option<&Value>) -> Result<Value> {
        let netns = self.place.namespace().path();
        let Self { id, name, runtime_config, .. } = self;
        self.runtime.call(command, &Container { id, netns: &netns, pod: name, runtime_config }, previous)
    }
}

fn addresses(result: &Value) -> Option<Vec<IpAddr>> {
    let ips = result.get("ips")?.as_array()?.iter();
    ips.map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok()).collect()
}
