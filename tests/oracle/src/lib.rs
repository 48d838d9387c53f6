//! Who may answer a question to a Service: a pure function of the objects and of who asks, written from kube-proxy's rules.
//!
//! The tests hold the datapath against it. It must not know the agent's compiler, nor share a line with it: two readings of
//! the same rules that agree are worth more than one. What it is written from: `pkg/proxy` of Kubernetes 1.36
//! (`serviceport.go`, `topology.go`, `endpointslicecache.go`, `iptables/proxier.go`, `nftables/proxier.go`; where the last two
//! differ, the last). Where we mean to differ: [`differences`]. Session affinity chooses among those who may answer and does
//! not change who they are: it is not looked at here.

mod decide;
pub mod differences;
mod endpoints;
mod host_ports;
mod ports;
#[cfg(test)]
mod tests;
mod world;

use std::{collections::BTreeMap, fmt, net::IpAddr, net::SocketAddr};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use differences::Rules;
pub use host_ports::{HostPort, at_host_ports};
pub use world::{At, Client, Node, World};

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

    /// Objects that name none mean TCP.
    fn is_named(self, name: Option<&String>) -> bool {
        name.map_or("TCP", String::as_str) == self.name()
    }
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

/// What becomes of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Any one of these may answer; each sees the client as from the address beside it.
    Answered(BTreeMap<SocketAddr, IpAddr>),
    /// Refused at once: RST, or ICMP "port unreachable".
    Rejected,
    /// Silence.
    Dropped,
    /// The Service has no such frontend.
    NotOurs,
    /// Nothing is made of it: who has the address hears it, and has nobody at that very port. Its kernel says so.
    LeftAlone,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(who) => {
                let who: Vec<String> =
                    who.iter().map(|(endpoint, source)| format!("{endpoint} seeing {source}")).collect();
                f.write_str(&who.join(", "))
            }
            Self::Rejected => f.write_str("rejected"),
            Self::Dropped => f.write_str("dropped"),
            Self::NotOurs => f.write_str("no frontend"),
            Self::LeftAlone => f.write_str("left alone"),
        }
    }
}

/// The verdict of `rules` on a question to a Service, both it and its slices as the API has them. Slices of others are passed
/// over.
///
/// # Errors
/// An object that is not what it should be; a client at a node the world does not have.
pub fn answer(
    rules: Rules,
    world: &World,
    service: &Value,
    slices: &[Value],
    client: &Client<'_>,
    question: &Question,
) -> Result<Verdict> {
    let service: Service = read("Service", service)?;
    let slices: Vec<EndpointSlice> =
        slices.iter().map(|slice| read("EndpointSlice", slice)).collect::<Result<_>>()?;
    decide::verdict(rules, world, &service, &slices, client, question)
}

fn read<T: DeserializeOwned>(kind: &str, object: &Value) -> Result<T> {
    serde_json::from_value(object.clone()).with_context(|| format!("{kind} {}", object["metadata"]["name"]))
}
