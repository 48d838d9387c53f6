//! The node's life in the cluster: the plugin for the container runtime, the Node's condition and startup taint, Events,
//! and what others left behind.
//!
//! Driven by the agent's published status and the health checks of services; tells what is wrong back to it ([`Problems`]). Nothing here
//! moves packets, and nothing that moves packets waits for anything here.

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

pub use install::{Install, InstallError, ours};
pub use problems::Problems;
pub use proxy_health::ProxyAddresses;
pub use service_health::{HealthCheck, HealthChecks};

use crate::{announce::Announcer, api::views::Status, netlink::Netlink};
use condition::Judge;
use problems::{NodeProblems, problem};

/// Files that are wrong or gone are put right after so long.
const FILES: Duration = Duration::from_secs(60);
/// Files that could not be written are tried again.
const FILES_RETRY: Duration = Duration::from_secs(5);
/// What others left is looked for so often.
const SCAN: Duration = Duration::from_secs(60);

/// What to take care of.
pub struct Lifecycle {
    pub node_name: String,
    /// Plugin and configuration, if they are ours to place.
    pub install: Option<Install>,
    /// The API server, if there is one.
    pub client: Option<Client>,
    pub netlink: Netlink,
    /// Where kube-proxy's health is answered.
    pub proxy: ProxyAddresses,
    /// What load balancers ask of services.
    pub health_checks: watch::Receiver<HealthChecks>,
    /// An agent that is not ready for less is being restarted.
    pub grace: Duration,
}

impl Lifecycle {
    /// As the agent of a node does it.
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

    /// Takes care of it for as long as somebody publishes a status.
    pub fn start(self, status: &watch::Receiver<Status>) -> Problems {
        let (node_problems, problems) = NodeProblems::new();
        if let Some(install) = self.install {
            tokio::spawn(place(install, status.clone(), node_problems.clone()));
        }
        if let Some(client) = self.client {
            let announcer = Announcer::start(client.clone(), "dataplane-agent", &self.node_name);
            let (writer, uid) = node::NodeWriter::new(
                client,
                &self.node_name,
                status.clone(),
                self.grace,
                node_problems.clone(),
            );
            tokio::spawn(writer.run());
            let judge = Judge::new(Instant::now(), self.grace);
            let reporter =
                events::Reporter { announcer, name: self.node_name, status: status.clone(), uid, judge };
            tokio::spawn(reporter.run());
        }
        if let Err(error) =
            proxy_health::start(self.proxy, self.health_checks, status.clone(), node_problems.clone())
        {
            node_problems
                .set("proxy", vec![problem("healthz", format!("its thread does not start: {error}"))]);
        }
        tokio::spawn(look(self.netlink, node_problems));
        problems
    }
}

/// Places the plugin at once, the configuration when the agent is ready for pods; then keeps both as they are to be.
async fn place(install: Install, mut status: watch::Receiver<Status>, node_problems: NodeProblems) {
    loop {
        let placed = put(&install, status.borrow_and_update().is_ready());
        let wait = if placed.is_ok() { FILES } else { FILES_RETRY };
        let problems = match placed {
            Ok(problems) => problems,
            Err(error) => vec![problem("cni", format!("pods cannot be added: {error}"))],
        };
        node_problems.set("install", problems);
        let was_ready = status.borrow().is_ready();
        tokio::select! {
            changed = status.wait_for(|status| status.is_ready() != was_ready) => if changed.is_err() { return },
            () = sleep(wait) => {}
        }
    }
}

fn put(install: &Install, is_ready: bool) -> Result<Vec<crate::api::views::ProblemView>, InstallError> {
    if install.plugin()? {
        tracing::info!(directory = %install.bin_dir.display(), "CNI plugin placed");
    }
    // once there it stays while an agent restarts
    if is_ready && install.conflist()? {
        tracing::info!(directory = %install.conf_dir.display(), "CNI configuration placed");
    }
    let rivals = install.rivals()?.into_iter().map(|path| {
        let message = "the container runtime takes this configuration before ours: remove it, or rename it so that it \
                       comes after 05-dataplane.conflist";
        problem(&path.display().to_string(), message.to_owned())
    });
    Ok(rivals.collect())
}

/// Looks for what others left, now and then.
async fn look(netlink: Netlink, node_problems: NodeProblems) {
    loop {
        node_problems.set("leftovers", leftovers::scan(&netlink).await);
        sleep(SCAN).await;
    }
}
