//! The client of the API server, which switches to another server when one fails.
//!
//! Owns addresses and credentials ([`access`]), the choice of the server ([`failover`]), and the
//! description of errors ([`explain()`]). Knows no object type.

mod access;
mod explain;
mod failover;

use std::path::PathBuf;

use http::Uri;

pub use access::Access;
pub use explain::explain;
pub use failover::{FailoverStats, Unreachable};
pub use kube::Client;

/// Why a client cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("cannot read kubeconfig {path}: {source}")]
    Kubeconfig { path: PathBuf, source: Box<kube::config::KubeconfigError> },
    #[error("cannot use service account: {0}")]
    ServiceAccount(#[source] Box<kube::config::InClusterError>),
    #[error(
        "no API server configured: outside of a pod with a service account, set api_server, and kubeconfig \
         for the credentials"
    )]
    NoServer,
    #[error("cannot create client of API server {url}: {source}")]
    Client { url: Uri, source: Box<kube::Error> },
}

/// Creates a client of the cluster. Sends no request.
pub async fn connect(access: &Access) -> Result<Client, ClusterError> {
    let config = access.config().await?;
    let urls =
        if access.servers.is_empty() { vec![config.cluster_url.clone()] } else { access.servers.clone() };
    failover::client(&config, urls, &access.failover_stats)
}

#[cfg(test)]
mod tests;
