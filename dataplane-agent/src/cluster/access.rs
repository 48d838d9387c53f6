//! API server addresses and credentials.

use std::path::PathBuf;

use http::Uri;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::{ClusterError, FailoverStats};

/// Where kubelet mounts a pod's service account token. The client rereads it when it changes.
const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// How to reach the API server.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// URLs of the API servers; empty: the one the credentials name. They are used instead of the
    /// Service address, which may not work yet on this node.
    pub servers: Vec<Uri>,
    /// Credentials and CA; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Counters of the client.
    pub failover_stats: FailoverStats,
}

impl Access {
    pub(super) async fn config(&self) -> Result<kube::Config, ClusterError> {
        if let Some(path) = &self.kubeconfig {
            let invalid = |source| ClusterError::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(invalid)?;
            let options = KubeConfigOptions::default();
            return kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(invalid);
        }
        let in_pod = std::fs::exists(SERVICE_ACCOUNT_TOKEN).unwrap_or(false);
        match self.servers.first() {
            // do not even read the Service address from the environment
            Some(_) if in_pod => kube::Config::incluster_dns(),
            None if in_pod => kube::Config::incluster_env(),
            // without credentials: `kubectl proxy`, or a server of a test
            Some(server) => return Ok(kube::Config::new(server.clone())),
            None => return Err(ClusterError::NoServer),
        }
        .map_err(|source| ClusterError::ServiceAccount(Box::new(source)))
    }
}
