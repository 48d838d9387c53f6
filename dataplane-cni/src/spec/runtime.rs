//! `runtimeConfig`: what the runtime fills in for the capabilities a plugin has (CNI conventions, "Dynamic Plugin
//! specific fields").
//!
//! The conventions write `hostPort`; containerd writes `HostPort`, and the reference plugins, in Go, read either. So keys
//! are compared without case.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use super::Error;
use crate::protocol::{Bandwidth, Limit, PortMapping, PortProtocol};

const PORTS: &str = "runtimeConfig.portMappings";

/// As the runtime writes it.
#[derive(Deserialize)]
struct Mapping {
    #[serde(default, rename = "hostport")]
    host_port: i64,
    #[serde(rename = "containerport")]
    container_port: i64,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostip")]
    host_ip: String,
}

/// The ports of the node that lead to the container. Those without a host port ask for nothing.
pub(super) fn port_mappings(runtime: Option<&Value>) -> Result<Vec<PortMapping>, Error> {
    let list = runtime.and_then(|runtime| runtime.get("portMappings")).filter(|list| !list.is_null());
    let Some(list) = list else { return Ok(Vec::new()) };
    let list: Vec<Mapping> =
        serde_json::from_value(without_case(list)).map_err(|problem| wrong(problem.to_string()))?;
    let asked = list.iter().enumerate().filter(|(_, mapping)| mapping.host_port != 0);
    asked
        .map(|(index, mapping)| mapping.read().map_err(|problem| wrong(format!("[{index}] {problem}"))))
        .collect()
}

/// As the runtime writes it: bits per second, and bits.
#[derive(Deserialize)]
struct Rates {
    #[serde(default, rename = "ingressrate")]
    ingress_rate: u64,
    #[serde(default, rename = "ingressburst")]
    ingress_burst: u64,
    #[serde(default, rename = "egressrate")]
    egress_rate: u64,
    #[serde(default, rename = "egressburst")]
    egress_burst: u64,
}

/// How fast the container may talk. A rate of 0 is no limit.
pub(super) fn bandwidth(runtime: Option<&Value>) -> Result<Bandwidth, Error> {
    let rates = runtime.and_then(|runtime| runtime.get("bandwidth")).filter(|rates| !rates.is_null());
    let Some(rates) = rates else { return Ok(Bandwidth::default()) };
    let rates: Rates = serde_json::from_value(without_case(rates))
        .map_err(|problem| Error::Config { key: "runtimeConfig.bandwidth", problem: problem.to_string() })?;
    let limit = |rate: u64, burst: u64| {
        (rate != 0).then_some(Limit { rate, burst: Some(burst).filter(|burst| *burst != 0) })
    };
    Ok(Bandwidth {
        ingress: limit(rates.ingress_rate, rates.ingress_burst),
        egress: limit(rates.egress_rate, rates.egress_burst),
    })
}

impl Mapping {
    fn read(&self) -> Result<PortMapping, String> {
        let port = |name: &str, number: i64| {
            let port = u16::try_from(number).ok().filter(|port| *port != 0);
            port.ok_or_else(|| format!("{name}: {number} is not a port"))
        };
        Ok(PortMapping {
            host_ip: self.host_ip()?,
            host_port: port("hostPort", self.host_port)?,
            protocol: match self.protocol.to_ascii_lowercase().as_str() {
                "" | "tcp" => PortProtocol::Tcp,
                "udp" => PortProtocol::Udp,
                "sctp" => PortProtocol::Sctp,
                other => return Err(format!("protocol: {other:?} is none of tcp, udp, sctp")),
            },
            container_port: port("containerPort", self.container_port)?,
        })
    }

    /// The unspecified address of either family means every address, as Kubernetes has it.
    fn host_ip(&self) -> Result<Option<IpAddr>, String> {
        if self.host_ip.is_empty() {
            return Ok(None);
        }
        let Ok(ip) = self.host_ip.parse::<IpAddr>() else {
            return Err(format!("hostIP: {:?} is not an IP address", self.host_ip));
        };
        Ok(Some(ip.to_canonical()).filter(|ip| !ip.is_unspecified()))
    }
}

/// The same with every key in lower case.
fn without_case(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            object.iter().map(|(key, value)| (key.to_ascii_lowercase(), without_case(value))).collect()
        }
        Value::Array(list) => list.iter().map(without_case).collect(),
        other => other.clone(),
    }
}

fn wrong(problem: String) -> Error {
    Error::Config { key: PORTS, problem }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(list: &Value) -> Result<Vec<PortMapping>, String> {
        port_mappings(Some(&json!({ "portMappings": list }))).map_err(|error| error.to_string())
    }

    #[test]
    fn what_kubelet_asks_for_is_read() {
        let list = json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"},
            {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "::"},
            {"hostPort": 38412, "containerPort": 38412, "protocol": "SCTP"},
            {"hostPort": 0, "containerPort": 9000, "protocol": "tcp"},
        ]);
        let texts: Vec<_> = read(&list).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["8080/TCP on 127.0.0.1", "53/UDP", "38412/SCTP"]);
        assert_eq!(read(&Value::Null).unwrap(), []);
        assert_eq!(port_mappings(None).unwrap(), []);
    }

    #[test]
    fn containerd_writes_keys_as_go_names_its_fields() {
        let list = json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": ""}]);
        assert_eq!(read(&list).unwrap()[0].to_string(), "8080/TCP");
        let rates =
            json!({"IngressRate": 50, "IngressBurst": 4_294_967_295_u32, "EgressRate": 0, "EgressBurst": 1});
        let limits = bandwidth(Some(&json!({ "bandwidth": rates }))).unwrap();
        assert_eq!(limits.ingress, Some(Limit { rate: 50, burst: Some(4_294_967_295) }));
        assert_eq!(limits.egress, None);
    }

    #[test]
    fn a_rate_of_zero_is_no_limit() {
        let read = |rates: Value| bandwidth(Some(&json!({ "bandwidth": rates })));
        let limits = read(json!({"ingressRate": 1_000_000, "ingressBurst": 0, "egressRate": 0})).unwrap();
        assert_eq!(limits, Bandwidth { ingress: Some(Limit { rate: 1_000_000, burst: None }), egress: None });
        assert_eq!(bandwidth(None).unwrap(), Bandwidth::default());
        let error = read(json!({"egressRate": -1})).unwrap_err().to_string();
        assert!(error.contains("runtimeConfig.bandwidth: invalid value"), "{error}");
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (mapping, expected) in [
            (json!({"hostPort": 70000, "containerPort": 80}), "[0] hostPort: 70000 is not a port"),
            (json!({"hostPort": 80, "containerPort": 0}), "[0] containerPort: 0 is not a port"),
            (
                json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"}),
                "\"icmp\" is none of tcp, udp, sctp",
            ),
            (json!({"hostPort": 80, "containerPort": 80, "hostIP": "eth0"}), "hostIP: \"eth0\" is not an IP"),
            (json!({"hostPort": "80", "containerPort": 80}), "invalid type"),
        ] {
            let error = read(&json!([mapping])).unwrap_err();
            assert!(error.contains(expected) && error.contains(PORTS), "{error}");
        }
    }
}
