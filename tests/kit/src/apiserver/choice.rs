//! Either API server, as tests that run on both use it.

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

/// Port of the small server in a place.
const PORT: u16 = 6443;

/// What a test wants of an API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Who will ask, besides those who may do everything: the real server wants to know before it starts.
    pub users: Vec<User>,
    /// Ranges that nodes are given theirs from by the real controller manager; empty: by nobody.
    pub cluster_cidrs: Vec<String>,
}

/// The small one or the real one.
#[derive(Debug)]
pub enum ApiServer {
    Small(Server),
    Real(Envtest),
}

impl ApiServer {
    /// Starts the real one if its binaries are there, else the small one; says which. It listens in the place at the
    /// address; what the real one keeps goes below `directory`.
    pub fn start(place: &Place, address: IpAddr, directory: &Path, needs: &Needs) -> Result<Self> {
        let server = match Assets::find()? {
            Some(assets) => Self::Real(Envtest::start(assets, Some((place, address)), directory, needs)?),
            None => {
                let mut server = Server::new();
                server.listen(Some(place.namespace().file()), SocketAddr::new(address, PORT))?;
                Self::Small(server)
            }
        };
        eprintln!("API server: {}", server.describe()?);
        Ok(server)
    }

    /// As [`Self::start`], on loopback and without privileges.
    pub fn start_here(directory: &Path, needs: &Needs) -> Result<Self> {
        let server = match Assets::find()? {
            Some(assets) => Self::Real(Envtest::start(assets, None, directory, needs)?),
            None => Self::Small(Server::local()?),
        };
        eprintln!("API server: {}", server.describe()?);
        Ok(server)
    }

    /// Which one it is.
    pub fn describe(&self) -> Result<String> {
        match self {
            Self::Small(_) => Ok("the small one of the tests".to_owned()),
            Self::Real(real) => Ok(format!("kube-apiserver {}", real.version()?)),
        }
    }

    /// The small one, for what only it can do.
    pub const fn small(&self) -> Option<&Server> {
        match self {
            Self::Small(server) => Some(server),
            Self::Real(_) => None,
        }
    }

    pub fn urls(&self) -> Vec<String> {
        match self {
            Self::Small(server) => server.urls(),
            Self::Real(real) => vec![real.url()],
        }
    }

    pub fn kubeconfig(&self, user: &User) -> Result<String> {
        match self {
            Self::Small(server) => server.kubeconfig(user),
            Self::Real(real) => real.kubeconfig(user),
        }
    }

    /// Its objects, as somebody who may do everything.
    pub fn objects(&self) -> Result<Objects> {
        match self {
            Self::Small(server) => server.objects(),
            Self::Real(real) => real.objects(),
        }
    }

    /// It refuses connections, and those there are break.
    pub fn stop(&mut self) -> Result<()> {
        match self {
            Self::Small(server) => {
                server.stop();
                Ok(())
            }
            Self::Real(real) => real.stop(),
        }
    }

    /// It is back.
    pub fn restart(&mut self) -> Result<()> {
        match self {
            Self::Small(server) => server.start(),
            Self::Real(real) => real.restart(),
        }
    }

    /// Away and back, with its history forgotten: of what was written before it was back, a watch learns nothing.
    pub fn restart_compacted(&mut self) -> Result<()> {
        match self {
            Self::Small(server) => server.restart_compacted(),
            Self::Real(real) => {
                real.stop()?;
                real.compact()?;
                real.restart()
            }
        }
    }

    /// Which permissions a user has made use of.
    pub fn used_permissions(&self, user: &User) -> Result<BTreeSet<Permission>> {
        match self {
            Self::Small(server) => Ok(server.used_permissions(user)),
            Self::Real(real) => read_audit(&real.audit_log(), user),
        }
    }
}

/// What a user was granted, from the real server's audit log.
fn read_audit(path: &Path, user: &User) -> Result<BTreeSet<Permission>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut uses = BTreeSet::new();
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).context("a line of the audit log")?;
        let about = &event["objectRef"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let is_denied = event["responseStatus"]["code"] == 403;
        if event["user"]["username"] != user.name.as_str() || about.is_null() || is_denied {
            continue;
        }
        let resource = match text(&about["subresource"]) {
            subresource if subresource.is_empty() => text(&about["resource"]),
            subresource => format!("{}/{subresource}", text(&about["resource"])),
        };
        let namespace = text(&about["namespace"]);
        uses.insert(Permission {
            verb: text(&event["verb"]),
            group: text(&about["apiGroup"]),
            resource,
            namespace,
        });
    }
    Ok(uses)
}
