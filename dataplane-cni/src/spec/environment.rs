//! The environment variables of a CNI command.

use std::{ffi::OsString, fmt, path::PathBuf};

use super::Error;
use crate::protocol::{Attachment, Pod};

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The CNI environment variables. Each command validates only those it needs.
#[derive(Clone, Debug)]
pub struct Environment {
    pub command: Command,
    container_id: Option<String>,
    netns: Option<String>,
    ifname: Option<String>,
    args: Option<String>,
}

/// An attachment with its network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub attachment: Attachment,
    pub netns: PathBuf,
}

impl Environment {
    /// Reads the variables through `get`.
    pub fn read(get: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let text = |name: &'static str| match get(name).map(OsString::into_string) {
            None => Ok(None),
            // runtimes set unused variables to the empty string
            Some(Ok(value)) => Ok(Some(value).filter(|value| !value.is_empty())),
            Some(Err(_)) => Err(environment_error(name, "is not UTF-8")),
        };
        let commands = || Command::ALL.map(Command::as_str).join(", ");
        let command = text("CNI_COMMAND")?.ok_or_else(|| {
            environment_error("CNI_COMMAND", format!("is not set; it must be one of {}", commands()))
        })?;
        let command = Command::ALL.into_iter().find(|known| known.as_str() == command).ok_or_else(|| {
            environment_error("CNI_COMMAND", format!("is {command:?}; it must be one of {}", commands()))
        })?;
        Ok(Self {
            command,
            container_id: text("CNI_CONTAINERID")?,
            netns: text("CNI_NETNS")?,
            ifname: text("CNI_IFNAME")?,
            args: text("CNI_ARGS")?,
        })
    }

    /// The attachment the command is about.
    pub fn attachment(&self) -> Result<Attachment, Error> {
        let container_id = self.required("CNI_CONTAINERID", self.container_id.as_ref())?;
        if !is_identifier(container_id) {
            return Err(environment_error(
                "CNI_CONTAINERID",
                format!(
                    "is {container_id:?}: it must be alphanumeric and may contain '_', '.' and '-' after the first \
                     character"
                ),
            ));
        }
        let ifname = self.required("CNI_IFNAME", self.ifname.as_ref())?;
        if let Some(problem) = device_name_problem(ifname) {
            return Err(environment_error("CNI_IFNAME", format!("is {ifname:?}: {problem}")));
        }
        Ok(Attachment { container_id: container_id.clone(), ifname: ifname.clone() })
    }

    /// The attachment and its network namespace.
    pub fn target(&self) -> Result<Target, Error> {
        let netns = self.required("CNI_NETNS", self.netns.as_ref())?;
        Ok(Target { attachment: self.attachment()?, netns: netns.into() })
    }

    /// The pod named in `CNI_ARGS`.
    pub fn pod(&self) -> Result<Option<Pod>, Error> {
        let (mut namespace, mut name, mut uid) = (None, None, String::new());
        for pair in self.args.iter().flat_map(|args| args.split(';')).filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                environment_error("CNI_ARGS", format!("contains {pair:?}, which is not KEY=VALUE"))
            })?;
            match key {
                "K8S_POD_NAMESPACE" => namespace = Some(value.to_owned()),
                "K8S_POD_NAME" => name = Some(value.to_owned()),
                "K8S_POD_UID" => value.clone_into(&mut uid),
                _ => {}
            }
        }
        Ok(namespace.zip(name).map(|(namespace, name)| Pod { namespace, name, uid }))
    }

    fn required<'a>(&self, name: &'static str, value: Option<&'a String>) -> Result<&'a String, Error> {
        value.ok_or_else(|| environment_error(name, format!("is not set; {} requires it", self.command)))
    }
}

/// Whether a container ID or network name has the form the specification requires.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn device_name_problem(name: &str) -> Option<&'static str> {
    match name {
        "." | ".." => Some("not a valid interface name"),
        _ if name.len() > 15 => Some("longer than 15 bytes"),
        _ if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) => {
            Some("contains '/', ':' or white space")
        }
        _ => None,
    }
}

fn environment_error(name: &'static str, problem: impl Into<String>) -> Error {
    Error::Environment { name, problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Result<Environment, Error> {
        Environment::read(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn missing_or_invalid_variable_is_named() {
        let base = [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        assert!(environment(&[]).unwrap_err().to_string().starts_with("CNI_COMMAND is not set"));
        assert!(environment(&[("CNI_COMMAND", "add")]).unwrap_err().to_string().contains("\"add\""));
        let no_netns = environment(&base).unwrap().target().unwrap_err();
        assert_eq!(no_netns.to_string(), "CNI_NETNS is not set; ADD requires it");
        for (name, value) in [
            ("CNI_CONTAINERID", "-c"),
            ("CNI_CONTAINERID", "a/b"),
            ("CNI_CONTAINERID", ""),
            ("CNI_IFNAME", "a-name-too-long0"),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "eth 0"),
            ("CNI_IFNAME", "a:b"),
        ] {
            let mut pairs = base.to_vec();
            pairs.retain(|(key, _)| *key != name);
            pairs.push((name, value));
            let error = environment(&pairs).unwrap().attachment().unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }

    #[test]
    fn pod_is_read_from_cni_args() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=7;X=a=b;";
        let pod = environment(&[("CNI_COMMAND", "ADD"), ("CNI_ARGS", args)]).unwrap().pod().unwrap().unwrap();
        assert_eq!((pod.to_string(), pod.uid), ("shop/web-0".to_owned(), "7".to_owned()));
        let none = environment(&[("CNI_COMMAND", "ADD")]).unwrap().pod().unwrap();
        assert_eq!(none, None);
        let broken = environment(&[("CNI_COMMAND", "ADD"), ("CNI_ARGS", "A=1;B")]).unwrap().pod();
        assert!(broken.unwrap_err().to_string().contains("\"B\""));
    }
}
