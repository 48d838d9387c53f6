//! `runtimeConfig`: values of the runtime for a plugin's capabilities (CNI conventions, "Dynamic
//! Plugin specific fields").
//!
//! Keys are compared without case: the conventions write `hostPort`, containerd writes `HostPort`,
//! and the reference plugins accept both.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use super::Error;
use crate::protocol::{Bandwidth, Limit, PortMapping, PortProtocol};

const PORTS: &str = "runtimeConfig.portMappings";

/// An element of `portMappings`.
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

/// The requested host ports. Elements without a host port are ignored.
pub(super) fn port_mappings(runtime: Option<&Value>) -> Result<Vec<PortMapping>, Error> {
    let list = runtime.and_then(|runtime| runtime.get("portMappings")).filter(|list| !list.is_null());
    let Some(list) = list else { return Ok(Vec::new()) };
    let list: Vec<Mapping> = serde_json::from_value(lowercase_keys(list))
        .map_err(|problem| port_mappings_error(problem.to_string()))?;
    let with_host_port = list.iter().enumerate().filter(|(_, mapping)| mapping.host_port != 0);
    with_host_port
        .map(|(index, mapping)| {
            mapping.read().map_err(|problem| port_mappings_error(format!("[{index}] {problem}")))
        })
        .collect()
}

/// `bandwidth`: rates in bits per second, bursts in bits.
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

/// The requested rate limits. A rate of 0 means no limit.
pub(super) fn bandwidth(runtime: Option<&Value>) -> Result<Bandwidth, Error> {
    let rates = runtime.and_then(|runtime| runtime.get("bandwidth")).filter(|rates| !rates.is_null());
    let Some(rates) = rates else { return Ok(Bandwidth::default()) };
    let rates: Rates = serde_json::from_value(lowercase_keys(rates))
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
                other => return Err(format!("protocol: {other:?} is not one of tcp, udp, sctp")),
            },
            container_port: port("containerPort", self.container_port)?,
        })
    }

    /// The unspecified address of either family means all addresses, as in Kubernetes.
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

/// Converts all keys to lower case.
fn lowercase_keys(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            object.iter().map(|(key, value)| (key.to_ascii_lowercase(), lowercase_keys(value))).collect()
        }
        Value::Array(list) => list.iter().map(lowercase_keys).collect(),
        other => other.clone(),
    }
}

fn port_mappings_error(problem: String) -> Error {
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
    fn port_mappings_of_kubelet_are_read() {
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
    fn capitalized_keys_of_containerd_are_read() {
        let list = json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": ""}]);
        assert_eq!(read(&list).unwrap()[0].to_string(), "8080/TCP");
        let rates =
            json!({"IngressRate": 50, "IngressBurst": 4_294_967_295_u32, "EgressRate": 0, "EgressBurst": 1});
        let limits = bandwidth(Some(&json!({ "bandwidth": rates }))).unwrap();
        assert_eq!(limits.ingress, Some(Limit { rate: 50, burst: Some(4_294_967_295) }));
        assert_eq!(limits.egress, None);
    }

    #[test]
    fn rate_of_zero_means_no_limit() {
        let read = |rates: Value| bandwidth(Some(&json!({ "bandwidth": rates })));
        let limits = read(json!({"ingressRate": 1_000_000, "ingressBurst": 0, "egressRate": 0})).unwrap();
        assert_eq!(limits, Bandwidth { ingress: Some(Limit { rate: 1_000_000, burst: None }), egress: None });
        assert_eq!(bandwidth(None).unwrap(), Bandwidth::default());
        let error = read(json!({"egressRate": -1})).unwrap_err().to_string();
        assert!(error.contains("runtimeConfig.bandwidth: invalid value"), "{error}");
    }

    #[test]
    fn invalid_port_mapping_is_named() {
        for (mapping, expected) in [
            (json!({"hostPort": 70000, "containerPort": 80}), "[0] hostPort: 70000 is not a port"),
            (json!({"hostPort": 80, "containerPort": 0}), "[0] containerPort: 0 is not a port"),
            (
                json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"}),
                "\"icmp\" is not one of tcp, udp, sctp",
            ),
            (json!({"hostPort": 80, "containerPort": 80, "hostIP": "eth0"}), "hostIP: \"eth0\" is not an IP"),
            (json!({"hostPort": "80", "containerPort": 80}), "invalid type"),
        ] {
            let error = read(&json!([mapping])).unwrap_err();
            assert!(error.contains(expected) && error.contains(PORTS), "{error}");
        }
    }
}
