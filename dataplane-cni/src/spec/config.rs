//! The network configuration on stdin.
//!
//! Runtimes and other plugins of a list add keys of their own, so unknown keys are ignored. Known
//! keys must have the right type.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Error, Version, environment::is_identifier, runtime};
use crate::protocol::{Attachment, Bandwidth, DEFAULT_SOCKET, PortMapping};

/// The keys that every command uses.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// Socket of the agent: `agentSocket`.
    pub socket: PathBuf,
    /// Copied into the result.
    pub dns: Option<Value>,
    /// `prevResult`: the result of the previous plugin, or of ADD.
    pub previous: Option<Value>,
    rest: Map<String, Value>,
}

/// The key that GC uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GcConfig {
    pub valid: Vec<Attachment>,
}

#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

impl Config {
    /// Parses the object and its version. Errors are reported in that version.
    pub fn version(bytes: &[u8]) -> Result<(Map<String, Value>, Version), Error> {
        let decode = |problem: serde_json::Error| Error::Decode(problem.to_string());
        let Value::Object(keys) = serde_json::from_slice(bytes).map_err(decode)? else {
            return Err(Error::Decode("not a JSON object".to_owned()));
        };
        let found = match keys.get("cniVersion") {
            // the specification's default
            None => "0.1.0",
            Some(Value::String(text)) => text,
            Some(other) => return Err(Error::Decode(format!("cniVersion: {other} is not a string"))),
        };
        let version = Version::parse(found).ok_or_else(|| Error::Version { found: found.to_owned() })?;
        Ok((keys, version))
    }

    /// Reads the other keys.
    pub fn read(mut keys: Map<String, Value>, version: Version) -> Result<Self, Error> {
        let name = text(&keys, "name")?.ok_or_else(|| config_error("name", "is missing"))?;
        if !is_identifier(&name) {
            return Err(config_error(
                "name",
                format!(
                    "{name:?} must be alphanumeric and may contain '_', '.' and '-' after the first character"
                ),
            ));
        }
        let socket = PathBuf::from(text(&keys, "agentSocket")?.unwrap_or_else(|| DEFAULT_SOCKET.to_owned()));
        if !socket.is_absolute() {
            return Err(config_error("agentSocket", format!("{} is not an absolute path", socket.display())));
        }
        let mut object = |key| keys.remove(key).filter(|value| !value.is_null());
        let (dns, previous) = (object("dns"), object("prevResult"));
        Ok(Self { version, name, socket, dns, previous, rest: keys })
    }

    /// The requested host ports.
    pub fn port_mappings(&self) -> Result<Vec<PortMapping>, Error> {
        runtime::port_mappings(self.rest.get("runtimeConfig"))
    }

    /// The requested rate limits.
    pub fn bandwidth(&self) -> Result<Bandwidth, Error> {
        runtime::bandwidth(self.rest.get("runtimeConfig"))
    }

    /// The list of valid attachments for GC. A missing list is an error, not an empty list: that
    /// would remove every pod.
    pub fn gc(&self) -> Result<GcConfig, Error> {
        const KEY: &str = "cni.dev/valid-attachments";
        // a misprint in drafts of CNI 1.1 led to two names; runtimes write both, or only
        // `cni.dev/attachments`
        let valid = self.rest.get(KEY).or_else(|| self.rest.get("cni.dev/attachments"));
        let valid: Option<Vec<ValidAttachment>> = match valid {
            None => return Err(config_error(KEY, "is missing")),
            // Go encodes an empty list as null
            Some(Value::Null) => None,
            Some(list) => Some(
                Deserialize::deserialize(list).map_err(|problem| config_error(KEY, problem.to_string()))?,
            ),
        };
        let valid = valid.into_iter().flatten();
        Ok(GcConfig {
            valid: valid
                .map(|valid| Attachment { container_id: valid.container_id, ifname: valid.ifname })
                .collect(),
        })
    }
}

fn text(keys: &Map<String, Value>, key: &'static str) -> Result<Option<String>, Error> {
    match keys.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(config_error(key, format!("{other} is not a string"))),
    }
}

fn config_error(key: &'static str, problem: impl Into<String>) -> Error {
    Error::Config { key, problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: &Value) -> Result<Config, Error> {
        let (keys, version) = Config::version(config.to_string().as_bytes())?;
        Config::read(keys, version)
    }

    #[test]
    fn unknown_keys_are_ignored() {
        let config = read(&json!({
            "cniVersion": "1.0.0", "name": "pods", "type": "dataplane-cni", "capabilities": {"bandwidth": true},
            "args": {"cni": {}}, "runtimeConfig": 7, "prevResult": null, "unknown": []
        }));
        let config = config.unwrap();
        assert_eq!((config.version, config.name.as_str()), (Version::V1_0_0, "pods"));
        assert_eq!(config.socket, PathBuf::from(DEFAULT_SOCKET));
        assert_eq!(config.previous, None);
    }

    #[test]
    fn known_key_with_invalid_value_is_named() {
        for (key, value) in [
            ("name", json!(7)),
            ("name", json!("a b")),
            ("agentSocket", json!(["/run/x"])),
            ("agentSocket", json!("agent.sock")),
        ] {
            let mut config = json!({"cniVersion": "1.1.0", "name": "pods"});
            config[key] = value;
            let error = read(&config).unwrap_err().to_string();
            assert!(error.starts_with(&format!("network configuration: {key}: ")), "{error}");
        }
    }

    #[test]
    fn unsupported_version_is_refused() {
        for (config, expected) in [
            (json!({"cniVersion": "2.0.0"}), "cniVersion 2.0.0 is not supported"),
            (json!({}), "cniVersion 0.1.0 is not supported"),
            (json!({"cniVersion": 1}), "network configuration: cniVersion: 1 is not a string"),
            (json!([]), "network configuration: not a JSON object"),
        ] {
            let error = read(&config).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn missing_list_of_valid_attachments_is_an_error() {
        let base = json!({"cniVersion": "1.1.0", "name": "pods"});
        assert!(read(&base).unwrap().gc().unwrap_err().to_string().contains("valid-attachments: is missing"));
        for (key, value, count) in [
            ("cni.dev/valid-attachments", json!(null), 0),
            ("cni.dev/valid-attachments", json!([]), 0),
            ("cni.dev/valid-attachments", json!([{"containerID": "a", "ifname": "eth0"}]), 1),
            ("cni.dev/attachments", json!([{"containerID": "a", "ifname": "eth0", "x": 1}]), 1),
        ] {
            let mut config = base.clone();
            config[key] = value;
            assert_eq!(read(&config).unwrap().gc().unwrap().valid.len(), count, "{config}");
        }
        let mut config = base;
        config["cni.dev/valid-attachments"] = json!([{"containerID": "a"}]);
        assert!(read(&config).unwrap().gc().unwrap_err().to_string().contains("ifname"));
    }
}
