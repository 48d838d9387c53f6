//! Traffic paths: a client and a server process, and the address that the client connects to.

use std::{
    io::{BufRead as _, BufReader},
    net::{SocketAddr, SocketAddrV4},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::load::{Load, Outcome, READY};
use dataplane_testkit::bins;

/// Port the servers listen on.
pub const PORT: u16 = 7000;

/// Processor of the client and of the kernel's work on its behalf.
const CLIENT_CORE: usize = 0;
/// Processor of the server.
const SERVER_CORE: usize = 1;

/// Namespace and cgroup of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    pub namespace: PathBuf,
    /// For connect-time translation.
    pub cgroup: Option<PathBuf>,
}

/// A client, a server, and the target of the client: the server itself or a Service.
#[derive(Clone, Debug)]
pub struct TrafficPath {
    pub client: Location,
    pub server: Location,
    pub listen: SocketAddrV4,
    pub target: SocketAddr,
}

impl TrafficPath {
    /// A path without traffic.
    #[cfg(test)]
    pub(super) fn empty() -> Self {
        let location = Location { namespace: PathBuf::new(), cgroup: None };
        let listen = SocketAddrV4::new(std::net::Ipv4Addr::UNSPECIFIED, 0);
        Self { client: location.clone(), server: location, listen, target: listen.into() }
    }

    /// Returns the same path through a Service.
    #[must_use]
    pub fn through(&self, service: SocketAddr) -> Self {
        Self { target: service, ..self.clone() }
    }

    /// Runs one block.
    pub fn measure(&self, load: Load, warm_up: Duration, time: Duration) -> Result<Outcome> {
        let mut command = generator(&self.client, CLIENT_CORE)?;
        command.arg("measure").arg(self.target.to_string());
        match load {
            Load::TcpRr { connections } => {
                command.args(["--load", "tcp-rr", "--connections", &connections.to_string()])
            }
            Load::TcpCrr => command.args(["--load", "tcp-crr"]),
            Load::UdpRr => command.args(["--load", "udp-rr"]),
            Load::Bulk => command.args(["--load", "bulk"]),
        };
        command.args(["--warm-up-ms", &warm_up.as_millis().to_string()]);
        command.args(["--time-ms", &time.as_millis().to_string()]);
        let output = command.stdin(Stdio::null()).output().context("cannot run the load generator")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("cannot parse the load generator's output")
    }
}

/// The running servers of all paths; dropping stops them.
#[derive(Debug, Default)]
pub struct Servers {
    running: Vec<(Location, SocketAddrV4, Child)>,
}

impl Servers {
    /// Starts the server of a path if it does not run yet.
    pub fn start(&mut self, path: &TrafficPath) -> Result<()> {
        if self.running.iter().any(|(location, listen, _)| *location == path.server && *listen == path.listen)
        {
            return Ok(());
        }
        let mut command = generator(&path.server, SERVER_CORE)?;
        command.arg("serve").arg(path.listen.to_string());
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start a server")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("the server has no stdout")?).read_line(&mut line)?;
        self.running.push((path.server.clone(), path.listen, child));
        ensure!(line.trim() == READY, "the server on {} did not start", path.listen);
        Ok(())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for (_, _, child) in &mut self.running {
            // it may have exited; other errors cannot be handled
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

fn generator(location: &Location, core: usize) -> Result<Command> {
    let mut command = Command::new(bins::load()?);
    // its error is part of the report: no backtrace
    command.env("RUST_LIB_BACKTRACE", "0");
    command.arg("--netns").arg(&location.namespace).args(["--core", &core.to_string()]);
    if let Some(cgroup) = &location.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    Ok(command)
}
