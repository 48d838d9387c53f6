//! The expected verdict for a connection to a Service: a pure function of the objects and the
//! client, written from the rules of kube-proxy.
//!
//! The tests compare the datapath with it. It shares no code with the agent, so that the same
//! mistake is unlikely in both. Source: `pkg/proxy` of Kubernetes 1.36 (`serviceport.go`,
//! `topology.go`, `endpointslicecache.go`, `iptables/proxier.go`, `nftables/proxier.go`; where the
//! last two differ, the last). Intended differences are in [`differences`]. Session affinity only
//! selects among the eligible backends and is not modelled.

pub mod differences;
mod endpoints;
mod evaluate;
mod host_ports;
mod ports;
#[cfg(test)]
mod tests;
mod topology;

use std::{collections::BTreeMap, fmt, net::IpAddr, net::SocketAddr};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use differences::Rules;
pub use host_ports::{HostPort, at_host_ports};
pub use topology::{Client, Location, Node, Topology};

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// Whether an object's protocol field is this protocol; an absent field means TCP.
    fn is_named(self, name: Option<&String>) -> bool {
        name.map_or("TCP", String::as_str) == self.name()
    }
}

/// The address, port and protocol that a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

/// The expected result of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One of these endpoints gets the connection; the value is the source address that it sees.
    Delivered(BTreeMap<SocketAddr, IpAddr>),
    /// Rejected at once with a RST or ICMP "port unreachable".
    Rejected,
    /// Dropped without a reply.
    Dropped,
    /// The Service has no such frontend.
    NoFrontend,
    /// Not translated: the packet reaches the address, whose kernel rejects it as nothing listens
    /// there.
    NotTranslated,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delivered(endpoints) => {
                let endpoints: Vec<String> = endpoints
                    .iter()
                    .map(|(endpoint, source)| format!("{endpoint} seeing {source}"))
                    .collect();
                f.write_str(&endpoints.join(", "))
            }
            Self::Rejected => f.write_str("rejected"),
            Self::Dropped => f.write_str("dropped"),
            Self::NoFrontend => f.write_str("no frontend"),
            Self::NotTranslated => f.write_str("not translated"),
        }
    }
}

/// Returns the verdict of `rules` for a connection to a Service. `service` and `slices` are API
/// objects; slices of other Services are ignored.
///
/// # Errors
/// An object is invalid, or the client's node is not in the topology.
pub fn verdict(
    rules: Rules,
    topology: &Topology,
    service: &Value,
    slices: &[Value],
    client: &Client<'_>,
    destination: &Destination,
) -> Result<Verdict> {
    let service: Service = read("Service", service)?;
    let slices: Vec<EndpointSlice> =
        slices.iter().map(|slice| read("EndpointSlice", slice)).collect::<Result<_>>()?;
    evaluate::verdict(rules, topology, &service, &slices, client, destination)
}

fn read<T: DeserializeOwned>(kind: &str, object: &Value) -> Result<T> {
    serde_json::from_value(object.clone()).with_context(|| format!("{kind} {}", object["metadata"]["name"]))
}
