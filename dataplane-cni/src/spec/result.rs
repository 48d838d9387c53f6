//! Results of CNI commands, in the form of the requested version.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Error, Version};
use crate::protocol::Added;

/// The result of ADD.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AddResult {
    cni_version: &'static str,
    interfaces: Vec<Interface>,
    ips: Vec<Ip>,
    routes: Vec<Route>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns: Option<Value>,
}

#[derive(Clone, Debug, Serialize)]
struct Interface {
    name: String,
    mac: String,
    /// Since 1.1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    /// `None` for the host device.
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct Ip {
    /// Until 0.4.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    address: IpNet,
    gateway: IpAddr,
    /// Index into `interfaces`.
    interface: usize,
}

#[derive(Clone, Debug, Serialize)]
struct Route {
    dst: IpNet,
    gw: IpAddr,
}

impl AddResult {
    /// The interface `ifname` in the namespace `sandbox`, as the agent created it.
    pub fn new(version: Version, added: &Added, ifname: &str, sandbox: &str, dns: Option<Value>) -> Self {
        let mtu = (version >= Version::V1_1_0).then_some(added.mtu);
        let interfaces = vec![
            Interface { name: added.host_device.clone(), mac: added.host_mac.clone(), mtu, sandbox: None },
            Interface {
                name: ifname.to_owned(),
                mac: added.pod_mac.clone(),
                mtu,
                sandbox: Some(sandbox.to_owned()),
            },
        ];
        let ips = added.addresses.iter().map(|pod| Ip {
            version: (version < Version::V1_0_0).then_some(family(pod.gateway)),
            address: pod.address,
            gateway: pod.gateway,
            interface: 1,
        });
        let routes = added
            .addresses
            .iter()
            .map(|pod| Route { dst: default_destination(pod.gateway), gw: pod.gateway });
        Self { cni_version: version.as_str(), interfaces, ips: ips.collect(), routes: routes.collect(), dns }
    }
}

/// The result of VERSION.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionResult {
    cni_version: &'static str,
    supported_versions: [&'static str; Version::ALL.len()],
}

impl VersionResult {
    /// The result in the version of the request.
    pub fn new(version: Version) -> Self {
        Self { cni_version: version.as_str(), supported_versions: Version::ALL.map(Version::as_str) }
    }
}

/// An interface of `prevResult`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreviousDevice {
    pub mac: Option<String>,
    pub addresses: Vec<IpAddr>,
}

impl PreviousDevice {
    /// Finds the interface `ifname` in the namespace `sandbox`. Later plugins of the list may have
    /// added interfaces.
    pub fn find(previous: &Value, ifname: &str, sandbox: &str) -> Result<Self, Error> {
        let invalid = |problem: String| Error::Config { key: "prevResult", problem };
        let previous = Previous::deserialize(previous).map_err(|problem| invalid(problem.to_string()))?;
        let is_searched =
            |interface: &PreviousInterface| interface.name == ifname && interface.sandbox == sandbox;
        let index = previous
            .interfaces
            .iter()
            .position(is_searched)
            .ok_or_else(|| invalid(format!("has no interface {ifname} in {sandbox}")))?;
        let ips = previous.ips.iter().filter(|ip| ip.interface == Some(index));
        Ok(Self {
            mac: Some(previous.interfaces[index].mac.clone()).filter(|mac| !mac.is_empty()),
            addresses: ips.map(|ip| ip.address.addr()).collect(),
        })
    }
}

#[derive(Deserialize)]
struct Previous {
    #[serde(default)]
    interfaces: Vec<PreviousInterface>,
    #[serde(default)]
    ips: Vec<PreviousIp>,
}

#[derive(Deserialize)]
struct PreviousInterface {
    name: String,
    #[serde(default)]
    mac: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct PreviousIp {
    address: IpNet,
    interface: Option<usize>,
}

const fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "4" } else { "6" }
}

fn default_destination(family: IpAddr) -> IpNet {
    let unspecified = match family {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    IpNet::new_assert(unspecified, 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protocol::PodAddress;

    fn added() -> Added {
        let pod = |address: &str, gateway: &str| PodAddress {
            address: address.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
        };
        Added {
            host_device: "dp0123456789a".to_owned(),
            host_mac: "0e:da:7a:00:00:01".to_owned(),
            pod_mac: "0a:da:0a:01:00:05".to_owned(),
            mtu: 1_450,
            addresses: vec![pod("10.1.0.5/32", "169.254.1.1"), pod("fd00::5/128", "fe80::1")],
        }
    }

    fn result(version: Version) -> Value {
        let dns = Some(json!({"nameservers": ["10.96.0.10"]}));
        serde_json::to_value(AddResult::new(version, &added(), "eth0", "/run/netns/a", dns)).unwrap()
    }

    #[test]
    fn add_result_has_the_form_of_its_version() {
        let newest = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "dp0123456789a", "mac": "0e:da:7a:00:00:01", "mtu": 1450},
                {"name": "eth0", "mac": "0a:da:0a:01:00:05", "mtu": 1450, "sandbox": "/run/netns/a"},
            ],
            "ips": [
                {"address": "10.1.0.5/32", "gateway": "169.254.1.1", "interface": 1},
                {"address": "fd00::5/128", "gateway": "fe80::1", "interface": 1},
            ],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
            "dns": {"nameservers": ["10.96.0.10"]},
        });
        assert_eq!(result(Version::V1_1_0), newest);
        let mut older = newest;
        older["cniVersion"] = json!("1.0.0");
        for interface in older["interfaces"].as_array_mut().unwrap() {
            interface.as_object_mut().unwrap().remove("mtu");
        }
        assert_eq!(result(Version::V1_0_0), older);
        for (ip, family) in older["ips"].as_array_mut().unwrap().iter_mut().zip(["4", "6"]) {
            ip["version"] = json!(family);
        }
        for (version, text) in [(Version::V0_4_0, "0.4.0"), (Version::V0_3_1, "0.3.1")] {
            older["cniVersion"] = json!(text);
            assert_eq!(result(version), older);
        }
    }

    #[test]
    fn own_interface_is_found_in_the_result_of_a_plugin_list() {
        let mut previous = result(Version::V1_1_0);
        previous["interfaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "eth0", "sandbox": "/run/netns/b"}));
        previous["ips"].as_array_mut().unwrap().push(json!({"address": "10.9.9.9/32", "interface": 2}));
        let found = PreviousDevice::find(&previous, "eth0", "/run/netns/a").unwrap();
        assert_eq!(found.mac.as_deref(), Some("0a:da:0a:01:00:05"));
        assert_eq!(found.addresses, ["10.1.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
        let missing = PreviousDevice::find(&previous, "eth1", "/run/netns/a").unwrap_err();
        assert!(missing.to_string().contains("no interface eth1"), "{missing}");
    }
}
