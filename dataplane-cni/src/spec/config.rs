//! The network configuration on stdin.
//!
//! Runtimes put keys of their own into it, and so do other plugins of a list: what is not ours is not looked at. What
//! is ours must be of the right type.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Error, Version, environment::is_identifier, runtime};
use crate::protocol::{Attachment, Bandwidth, DEFAULT_SOCKET, PortMapping};

/// What every command needs of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// Where the agent listens: `agentSocket`.
    pub socket: PathBuf,
    /// Handed on in the result, as it is.
    pub dns: Option<Value>,
    /// Result of the plugin before, or of the ADD before.
    pub previous: Option<Value>,
    rest: Map<String, Value>,
}

/// What GC finds in it besides.
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
    /// The object, and its version: errors are told in that version.
    pub fn version(bytes: &[u8]) -> Result<(Map<String, Value>, Version), Error> {
        let decode = |problem: serde_json::Error| Error::Decode(problem.to_string());
        let Value::Object(keys) = serde_json::from_slice(bytes).map_err(decode)? else {
            return Err(Error::Decode("not a JSON object".to_owned()));
        };
        let found = match keys.get("cniVersion") {
            // what the specification says an absent version is
            None => "0.1.0",
            Some(Value::String(text)) => text,
            Some(other) => return Err(Error::Decode(format!("cniVersion: {other} is not a string"))),
        };
        let version = Version::parse(found).ok_or_else(|| Error::Version { found: found.to_owned() })?;
        Ok((keys, version))
    }

    /// The rest of the object.
    pub fn read(mut keys: Map<String, Value>, version: Version) -> Result<Self, Error> {
        let name = text(&keys, "name")?.ok_or_else(|| wrong("name", "is missing"))?;
        if !is_identifier(&name) {
            return Err(wrong(
                "name",
                format!("{name:?} is not an alphanumeric followed by alphanumerics, '_', '.' and '-'"),
            ));
        }
        let socket = PathBuf::from(text(&keys, "agentSocket")?.unwrap_or_else(|| DEFAULT_SOCKET.to_owned()));
        if !socket.is_absolute() {
            return Err(wrong("agentSocket", format!("{} is not an absolute path", socket.display())));
        }
        let mut object = |key| keys.remove(key).filter(|value| !value.is_null());
        let (dns, previous) = (object("dns"), object("prevResult"));
        Ok(Self { version, name, socket, dns, previous, rest: keys })
    }

    /// The ports of the node that the runtime wants to lead to the container.
    pub fn port_mappings(&self) -> Result<Vec<PortMapping>, Error> {
        runtime::port_mappings(self.rest.get("runtimeConfig"))
    }

    /// How fast the runtime wants the container to talk.
    pub fn bandwidth(&self) -> Result<Bandwidth, Error> {
        runtime::bandwidth(self.rest.get("runtimeConfig"))
    }

    /// What GC needs. A list that is not there is not an empty list: taking it for one would remove every pod.
    pub fn gc(&self) -> Result<GcConfig, Error> {
        const KEY: &str = "cni.dev/valid-attachments";
        // a misprint in drafts of 1.1 made two names of it; runtimes write both, some only the first they knew
        let valid = self.rest.get(KEY).or_else(|| self.rest.get("cni.dev/attachments"));
        let valid: Option<Vec<ValidAttachment>> = match valid {
            None => return Err(wrong(KEY, "is missing")),
            // how Go writes an empty list
            Some(Value::Null) => None,
            Some(list) => {
                Some(Deserialize::deserialize(list).map_err(|problem| wrong(KEY, problem.to_string()))?)
            }
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
        Some(other) => Err(wrong(key, format!("{other} is not a string"))),
    }
}

fn wrong(key: &'static str, problem: impl Into<String>) -> Error {
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
    fn keys_of_others_are_let_be() {
        let config = read(&json!({
            "cniVersion": "1.0.0", "name": "pods", "type": "dataplane-cni", "capabilities": {"bandwidth": true},
            "args": {"cni": {}}, "runtimeConfig": 7, "prevResult": null, "unheard": []
        }));
        let config = config.unwrap();
        assert_eq!((config.version, config.name.as_str()), (Version::V1_0_0, "pods"));
        assert_eq!(config.socket, PathBuf::from(DEFAULT_SOCKET));
        assert_eq!(config.previous, None);
    }

    #[test]
    fn a_key_of_ours_with_a_wrong_value_is_named() {
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
    fn a_version_is_one_we_speak() {
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
    fn only_an_explicit_list_says_that_nothing_is_valid() {
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
