//! Which servers, and who we are to them.

use std::path::PathBuf;

use http::Uri;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::{ClusterError, FailoverStats};

/// Where kubelet puts a pod's service account. What is in it is read again when it changes.
const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// How the cluster is reached.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The API servers; empty: the one the credentials name. They stand in for it before services work on this node.
    pub servers: Vec<Uri>,
    /// Credentials and CA; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// What becomes of it.
    pub failover_stats: FailoverStats,
}

impl Access {
    pub(super) async fn config(&self) -> Result<kube::Config, ClusterError> {
        if let Some(path) = &self.kubeconfig {
            let wrong = |source| ClusterError::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
            let options = KubeConfigOptions::default();
            return kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(wrong);
        }
        let in_pod = std::fs::exists(SERVICE_ACCOUNT_TOKEN).unwrap_or(false);
        match self.servers.first() {
            // the address in the environment is a service's, which need not work yet: it is not even looked for
            Some(_) if in_pod => kube::Config::incluster_dns(),
            None if in_pod => kube::Config::incluster_env(),
            // without credentials: a proxy of kubectl, a server of a test
            Some(server) => return Ok(kube::Config::new(server.clone())),
            None => return Err(ClusterError::NoWay),
        }
        .map_err(|source| ClusterError::ServiceAccount(Box::new(source)))
    }
}
