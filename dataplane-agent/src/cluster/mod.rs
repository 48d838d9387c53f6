//! The way to the API server: one client that goes to another server when the one it uses fails.
//!
//! Owns addresses, credentials ([`access`]), the choice between servers ([`failover`]), and the words for what goes
//! wrong ([`explain()`]). Knows no object: what is asked for is up to those who hold the client.

mod access;
mod explain;
mod failover;

use std::path::PathBuf;

use http::Uri;

pub use access::Access;
pub use explain::explain;
pub use failover::{FailoverStats, Unreachable};
pub use kube::Client;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig { path: PathBuf, source: Box<kube::config::KubeconfigError> },
    #[error("service account: {0}")]
    ServiceAccount(#[source] Box<kube::config::InClusterError>),
    #[error(
        "no way to an API server: the agent is not in a pod with a service account; name api_server, and kubeconfig \
         for the credentials"
    )]
    NoWay,
    #[error("API server {url}: {source}")]
    Client { url: Uri, source: Box<kube::Error> },
}

/// A client of the cluster. Answers come from one of the servers, whichever works; nothing is asked here.
pub async fn connect(access: &Access) -> Result<Client, ClusterError> {
    let config = access.config().await?;
    let urls =
        if access.servers.is_empty() { vec![config.cluster_url.clone()] } else { access.servers.clone() };
    failover::client(&config, urls, &access.failover_stats)
}

#[cfg(test)]
mod tests;
