//! The node's part in the cluster: CNI installation, the Node's condition and startup taint,
//! Events, health checks for load balancers, and the search for leftovers of other networks.
//!
//! Input is the published status and the health checks of services; output goes back into the
//! status as [`Problems`]. The datapath does not depend on anything here.

mod condition;
mod events;
mod install;
pub mod kube_proxy;
mod leftovers;
mod node;
mod problems;
mod proxy_health;
mod service_health;
mod taint;

use std::time::{Duration, Instant};

use kube::Client;
use tokio::{sync::watch, time::sleep};

pub use install::{Install, InstallError, installed_files};
pub use problems::Problems;
pub use proxy_health::ProxyAddresses;
pub use service_health::{HealthCheck, HealthChecks};

use crate::{api::views::Status, event_recorder::EventRecorder, netlink::Netlink};
use condition::ReadinessTracker;
use problems::{NodeProblems, problem};

/// Interval of the check of installed files.
const INSTALL_INTERVAL: Duration = Duration::from_secs(60);
/// Wait after a failed installation.
const INSTALL_RETRY: Duration = Duration::from_secs(5);
/// Interval of the search for leftovers of other networks.
const SCAN_INTERVAL: Duration = Duration::from_secs(60);

/// Settings of the lifecycle tasks.
pub struct Lifecycle {
    pub node_name: String,
    /// Installs the CNI plugin and its configuration, if wanted.
    pub install: Option<Install>,
    /// The API server, if there is one.
    pub client: Option<Client>,
    pub netlink: Netlink,
    /// Addresses of kube-proxy's health endpoints.
    pub proxy: ProxyAddresses,
    /// Health checks of services, for load balancers.
    pub health_checks: watch::Receiver<HealthChecks>,
    /// Time for which the agent may be not ready (a restart) before the Node says so.
    pub grace: Duration,
}

impl Lifecycle {
    /// Defaults: no installation, no API server, no health endpoints.
    pub fn new(node_name: &str, netlink: Netlink) -> Self {
        Self {
            node_name: node_name.to_owned(),
            install: None,
            client: None,
            netlink,
            proxy: ProxyAddresses::default(),
            health_checks: watch::channel(HealthChecks::default()).1,
            grace: condition::GRACE,
        }
    }

    /// Starts the tasks. They end when the sender of `status` is dropped.
    pub fn start(self, status: &watch::Receiver<Status>) -> Problems {
        let (node_problems, problems) = NodeProblems::new();
        if let Some(install) = self.install {
            tokio::spawn(keep_installed(install, status.clone(), node_problems.clone()));
        }
        if let Some(client) = self.client {
            let recorder = EventRecorder::start(client.clone(), "dataplane-agent", &self.node_name);
            let (writer, uid) = node::NodeWriter::new(
                client,
                &self.node_name,
                status.clone(),
                self.grace,
                node_problems.clone(),
            );
            tokio::spawn(writer.run());
            let readiness = ReadinessTracker::new(Instant::now(), self.grace);
            let reporter =
                events::Reporter { recorder, name: self.node_name, status: status.clone(), uid, readiness };
            tokio::spawn(reporter.run());
        }
        if let Err(error) =
            proxy_health::start(self.proxy, self.health_checks, status.clone(), node_problems.clone())
        {
            node_problems.set(
                "proxy",
                vec![problem("healthz", format!("cannot start the health server thread: {error}"))],
            );
        }
        tokio::spawn(scan_leftovers(self.netlink, node_problems));
        problems
    }
}

/// Installs the plugin at once, and the configuration when the agent is ready; restores both if
/// they change.
async fn keep_installed(install: Install, mut status: watch::Receiver<Status>, node_problems: NodeProblems) {
    loop {
        let result = install_files(&install, status.borrow_and_update().is_ready());
        let wait = if result.is_ok() { INSTALL_INTERVAL } else { INSTALL_RETRY };
        let problems = match result {
            Ok(problems) => problems,
            Err(error) => {
                vec![problem("cni", format!("cannot install the CNI plugin; no pod can be added: {error}"))]
            }
        };
        node_problems.set("install", problems);
        let was_ready = status.borrow().is_ready();
        tokio::select! {
            changed = status.wait_for(|status| status.is_ready() != was_ready) => if changed.is_err() { return },
            () = sleep(wait) => {}
        }
    }
}

fn install_files(
    install: &Install,
    is_ready: bool,
) -> Result<Vec<crate::api::views::ProblemView>, InstallError> {
    if install.install_plugin()? {
        tracing::info!("installed CNI plugin {}", install.bin_dir.join(install::PLUGIN).display());
    }
    // a restarting agent leaves it in place
    if is_ready && install.install_conflist()? {
        tracing::info!("installed CNI configuration {}", install.conf_dir.join(install::CONFLIST).display());
    }
    let competing = install.competing_configs()?.into_iter().map(|path| {
        let message = "the container runtime uses this configuration instead of 05-dataplane.conflist: \
                       remove it, or rename it so that it sorts after 05-dataplane.conflist";
        problem(&path.display().to_string(), message.to_owned())
    });
    Ok(competing.collect())
}

/// Searches for leftovers of other networks periodically.
async fn scan_leftovers(netlink: Netlink, node_problems: NodeProblems) {
    loop {
        node_problems.set("leftovers", leftovers::scan(&netlink).await);
        sleep(SCAN_INTERVAL).await;
    }
}
