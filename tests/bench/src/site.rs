//! Where traffic runs: a client and a server, each in its place, and what the client asks.

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

/// Processor of the client, and of what the kernel does on its behalf.
const CLIENT_CORE: usize = 0;
/// Processor of the server.
const SERVER_CORE: usize = 1;

/// Where a process runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub namespace: PathBuf,
    /// Connect-time translation belongs to one.
    pub cgroup: Option<PathBuf>,
}

/// A client, a server and what the client asks: the server itself or a service before it.
#[derive(Clone, Debug)]
pub struct Site {
    pub client: Place,
    pub server: Place,
    pub listen: SocketAddrV4,
    pub target: SocketAddr,
}

impl Site {
    /// What no traffic can run on.
    #[cfg(test)]
    pub(super) fn nowhere() -> Self {
        let place = Place { namespace: PathBuf::new(), cgroup: None };
        let listen = SocketAddrV4::new(std::net::Ipv4Addr::UNSPECIFIED, 0);
        Self { client: place.clone(), server: place, listen, target: listen.into() }
    }

    /// The same ends, asked through a service.
    #[must_use]
    pub fn through(&self, service: SocketAddr) -> Self {
        Self { target: service, ..self.clone() }
    }

    /// One block of traffic.
    pub fn ask(&self, load: Load, warm_up: Duration, time: Duration) -> Result<Outcome> {
        let mut command = generator(&self.client, CLIENT_CORE)?;
        command.arg("ask").arg(self.target.to_string());
        match load {
            Load::TcpRr { connections } => {
                command.args(["--load", "tcp-rr", "--connections", &connections.to_string()])
            }
            Load::TcpCrr => command.args(["--load", "tcp-crr"]),
            Load::UdpRr => command.args(["--load", "udp-rr"]),
        };
        command.args(["--warm-up-ms", &warm_up.as_millis().to_string()]);
        command.args(["--time-ms", &time.as_millis().to_string()]);
        let output = command.stdin(Stdio::null()).output().context("run the load generator")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("read what the load generator printed")
    }
}

/// The servers of all sites, running for as long as this lives.
#[derive(Debug, Default)]
pub struct Servers {
    running: Vec<(Place, SocketAddrV4, Child)>,
}

impl Servers {
    /// Starts the server of a site, unless it runs already.
    pub fn start(&mut self, site: &Site) -> Result<()> {
        if self.running.iter().any(|(place, listen, _)| *place == site.server && *listen == site.listen) {
            return Ok(());
        }
        let mut command = generator(&site.server, SERVER_CORE)?;
        command.arg("serve").arg(site.listen.to_string());
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start a server")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("a server has no stdout")?).read_line(&mut line)?;
        self.running.push((site.server.clone(), site.listen, child));
        ensure!(line.trim() == READY, "the server on {} did not start", site.listen);
        Ok(())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for (_, _, child) in &mut self.running {
            // it may have ended; nothing to be done about anything else
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

fn generator(place: &Place, core: usize) -> Result<Command> {
    let mut command = Command::new(bins::load()?);
    // what it says goes into the report: a sentence, not a stack
    command.env("RUST_LIB_BACKTRACE", "0");
    command.arg("--netns").arg(&place.namespace).args(["--core", &core.to_string()]);
    if let Some(cgroup) = &place.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    Ok(command)
}
