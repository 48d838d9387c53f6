//! One interface to the real and the fake API server.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    Objects, Permission, Server, User,
    envtest::{Assets, Envtest},
};
use crate::lab::Place;

/// Port of the fake server in a place.
const PORT: u16 = 6443;

/// Options of an API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Users besides the administrator; the real server needs them before it starts.
    pub users: Vec<User>,
    /// Cluster CIDRs from which the real controller manager allocates pod CIDRs; empty: it does not
    /// run.
    pub cluster_cidrs: Vec<String>,
}

/// The fake or the real API server.
#[derive(Debug)]
pub enum ApiServer {
    Fake(Server),
    Real(Envtest),
}

impl ApiServer {
    /// Starts the real server if its binaries are there, else the fake one, and prints which. It
    /// listens in the place at the address; the real one stores its data below `directory`.
    pub fn start(place: &Place, address: IpAddr, directory: &Path, needs: &Needs) -> Result<Self> {
        let server = match Assets::find()? {
            Some(assets) => Self::Real(Envtest::start(assets, Some((place, address)), directory, needs)?),
            None => {
                let mut server = Server::new();
                server.listen(Some(place.namespace().file()), SocketAddr::new(address, PORT))?;
                Self::Fake(server)
            }
        };
        eprintln!("API server: {}", server.describe()?);
        Ok(server)
    }

    /// As [`Self::start`], on loopback, without privileges.
    pub fn start_here(directory: &Path, needs: &Needs) -> Result<Self> {
        let server = match Assets::find()? {
            Some(assets) => Self::Real(Envtest::start(assets, None, directory, needs)?),
            None => Self::Fake(Server::local()?),
        };
        eprintln!("API server: {}", server.describe()?);
        Ok(server)
    }

    /// Name and version, for messages.
    pub fn describe(&self) -> Result<String> {
        match self {
            Self::Fake(_) => Ok("dataplane-fake-apiserver".to_owned()),
            Self::Real(real) => Ok(format!("kube-apiserver {}", real.version()?)),
        }
    }

    /// The fake server, for tests of behaviour that only it has.
    pub const fn fake(&self) -> Option<&Server> {
        match self {
            Self::Fake(server) => Some(server),
            Self::Real(_) => None,
        }
    }

    pub fn urls(&self) -> Vec<String> {
        match self {
            Self::Fake(server) => server.urls(),
            Self::Real(real) => vec![real.url()],
        }
    }

    pub fn kubeconfig(&self, user: &User) -> Result<String> {
        match self {
            Self::Fake(server) => server.kubeconfig(user),
            Self::Real(real) => real.kubeconfig(user),
        }
    }

    /// A client with all permissions.
    pub fn objects(&self) -> Result<Objects> {
        match self {
            Self::Fake(server) => server.objects(),
            Self::Real(real) => real.objects(),
        }
    }

    /// Stops it: connections break, new ones are refused.
    pub fn stop(&mut self) -> Result<()> {
        match self {
            Self::Fake(server) => {
                server.stop();
                Ok(())
            }
            Self::Real(real) => real.stop(),
        }
    }

    /// Starts it again.
    pub fn restart(&mut self) -> Result<()> {
        match self {
            Self::Fake(server) => server.start(),
            Self::Real(real) => real.restart(),
        }
    }

    /// Restarts it with compacted history: a watch cannot resume from an older resource version.
    pub fn restart_compacted(&mut self) -> Result<()> {
        match self {
            Self::Fake(server) => server.restart_compacted(),
            Self::Real(real) => {
                real.stop()?;
                real.compact()?;
                real.restart()
            }
        }
    }

    /// The permissions that a user has used.
    pub fn used_permissions(&self, user: &User) -> Result<BTreeSet<Permission>> {
        match self {
            Self::Fake(server) => Ok(server.used_permissions(user)),
            Self::Real(real) => read_audit(&real.audit_log(), user),
        }
    }
}

/// The permissions of a user's granted requests in the real server's audit log.
fn read_audit(path: &Path, user: &User) -> Result<BTreeSet<Permission>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut uses = BTreeSet::new();
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).context("a line of the audit log")?;
        let object = &event["objectRef"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let is_denied = event["responseStatus"]["code"] == 403;
        if event["user"]["username"] != user.name.as_str() || object.is_null() || is_denied {
            continue;
        }
        let resource = match text(&object["subresource"]) {
            subresource if subresource.is_empty() => text(&object["resource"]),
            subresource => format!("{}/{subresource}", text(&object["resource"])),
        };
        let namespace = text(&object["namespace"]);
        uses.insert(Permission {
            verb: text(&event["verb"]),
            group: text(&object["apiGroup"]),
            resource,
            namespace,
        });
    }
    Ok(uses)
}
