//! What an operator chooses for the allocator, checked once, here; and whether the cluster agrees with it.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use http::Uri;
use ipnet::IpNet;

use super::{
    lease::Terms,
    ledger::{Finding, NodeFacts, RangeLedger, same_family},
    pool::{Pool, PoolError},
};
use crate::{cluster::Access, telemetry::LogFormat};

/// A range of a deleted node rests for so long: the others have forgotten their routes to it by then.
const REST: Duration = Duration::from_secs(60);

/// Arguments of `allocate`.
#[derive(Clone, Debug, Args)]
pub struct AllocateArgs {
    /// Ranges of all pods: one, or one of each family
    #[arg(
        long,
        env = "DATAPLANE_CLUSTER_CIDR",
        value_name = "CIDR,..",
        value_delimiter = ',',
        required = true
    )]
    cluster_cidr: Vec<IpNet>,
    /// Length of a node's IPv4 range
    #[arg(long, env = "DATAPLANE_NODE_MASK_IPV4", value_name = "LENGTH", default_value_t = 24)]
    node_mask_ipv4: u8,
    /// Length of a node's IPv6 range
    #[arg(long, env = "DATAPLANE_NODE_MASK_IPV6", value_name = "LENGTH", default_value_t = 64)]
    node_mask_ipv6: u8,
    /// Ranges of Services, to be sure that pods get none of their addresses
    #[arg(long, env = "DATAPLANE_SERVICE_CIDR", value_name = "CIDR,..", value_delimiter = ',')]
    service_cidr: Vec<IpNet>,
    /// Namespace of the Lease by which allocators agree on one
    #[arg(long, env = "DATAPLANE_LEASE_NAMESPACE", value_name = "NAME", default_value = "kube-system")]
    lease_namespace: String,
    /// Name of that Lease
    #[arg(long, env = "DATAPLANE_LEASE_NAME", value_name = "NAME", default_value = "dataplane-allocator")]
    lease_name: String,
    /// Seconds after which an allocator that is silent is replaced
    #[arg(long, env = "DATAPLANE_LEASE_DURATION", value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u16).range(5..=300))]
    lease_duration: u16,
    /// Name of this allocator among them [default: the host name and a random part]
    #[arg(long, env = "DATAPLANE_IDENTITY", value_name = "NAME")]
    identity: Option<String>,
    /// Credentials of the API server [default: the pod's service account]
    #[arg(long, env = "DATAPLANE_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// API servers [default: the one the credentials name]
    #[arg(long, env = "DATAPLANE_API_SERVER", value_name = "URL,..", value_delimiter = ',')]
    api_server: Vec<Uri>,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, env = "DATAPLANE_HTTP", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9965")]
    http: SocketAddr,
    /// What is logged
    #[arg(long, env = "DATAPLANE_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Form of the log: text or json
    #[arg(long, env = "DATAPLANE_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// What was chosen.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// One per family, empty.
    pub(super) pools: Vec<Pool>,
    pub(super) lease_namespace: String,
    pub(super) lease_name: String,
    pub(super) identity: String,
    pub(super) terms: Terms,
    pub(super) access: Access,
    pub(super) http: SocketAddr,
    pub(super) log: String,
    pub(super) log_format: LogFormat,
}

/// Why nothing is allocated.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettingsError {
    #[error("--cluster-cidr: {one} and {other} are of one family: one of each is meant")]
    OneFamily { one: IpNet, other: IpNet },
    #[error("--node-mask-{family}: {source}")]
    Mask { family: &'static str, source: PoolError },
    #[error(
        "--cluster-cidr: {cluster} overlaps service CIDR {service}: pods and Services would share addresses"
    )]
    Services { cluster: IpNet, service: IpNet },
    #[error("identity: {0}")]
    Identity(#[source] std::io::Error),
    #[error("node {node}: {finding}")]
    Cluster { node: String, finding: Finding },
}

impl Settings {
    pub(super) fn new(args: &AllocateArgs) -> Result<Self, SettingsError> {
        let mut pools: Vec<Pool> = Vec::new();
        for &cluster in &args.cluster_cidr {
            if let Some(other) = pools.iter().find(|pool| same_family(&pool.cluster(), &cluster)) {
                return Err(SettingsError::OneFamily { one: other.cluster(), other: cluster });
            }
            let (family, mask) = match cluster {
                IpNet::V4(_) => ("ipv4", args.node_mask_ipv4),
                IpNet::V6(_) => ("ipv6", args.node_mask_ipv6),
            };
            let pool =
                Pool::new(cluster, mask, REST).map_err(|source| SettingsError::Mask { family, source })?;
            let overlaps = |service: &&IpNet| cluster.contains(*service) || service.contains(&cluster);
            if let Some(&service) = args.service_cidr.iter().find(overlaps) {
                return Err(SettingsError::Services { cluster, service });
            }
            pools.push(pool);
        }
        Ok(Self {
            pools,
            lease_namespace: args.lease_namespace.clone(),
            lease_name: args.lease_name.clone(),
            identity: args.identity.clone().map_or_else(identity, Ok).map_err(SettingsError::Identity)?,
            terms: Terms::new(Duration::from_secs(args.lease_duration.into())),
            access: Access {
                servers: args.api_server.clone(),
                kubeconfig: args.kubeconfig.clone(),
                ..Access::default()
            },
            http: args.http,
            log: args.log.clone(),
            log_format: args.log_format,
        })
    }

    /// Whether the nodes that are there fit what was chosen.
    ///
    /// # Errors
    ///
    /// A node's range outside of the cluster CIDRs, or its address inside of one: whoever chose meant another cluster,
    /// and every range given would make it worse. Nodes at odds with one another are no reason not to serve the rest.
    pub(super) fn check(&self, nodes: &[NodeFacts]) -> Result<(), SettingsError> {
        let now = std::time::Instant::now();
        let mut ledger = RangeLedger::new(self.pools.clone());
        for node in nodes {
            ledger.observe(node, now);
        }
        for node in nodes {
            let refused = |finding: &Finding| {
                matches!(finding, Finding::Outside { .. } | Finding::AddressInside { .. })
            };
            if let Some(finding) = ledger.findings(&node.name).into_iter().find(refused) {
                return Err(SettingsError::Cluster { node: node.name.clone(), finding });
            }
        }
        Ok(())
    }
}

/// Two allocators of one host, or one that was started again, are not the same.
fn identity() -> std::io::Result<String> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let random = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(format!("{}_{}", host.trim(), random.trim()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: AllocateArgs,
    }

    fn settings(arguments: &str) -> Result<Settings, SettingsError> {
        let line = Line::try_parse_from(std::iter::once("allocate").chain(arguments.split(' '))).unwrap();
        Settings::new(&line.args)
    }

    fn refused(arguments: &str) -> String {
        settings(arguments).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_is_refused_with_both_values() {
        assert_eq!(
            refused("--cluster-cidr 10.1.0.0/16,10.2.0.0/16"),
            "--cluster-cidr: 10.1.0.0/16 and 10.2.0.0/16 are of one family: one of each is meant"
        );
        assert_eq!(
            refused("--cluster-cidr 10.1.0.0/16 --node-mask-ipv4 12"),
            "--node-mask-ipv4: node mask /12 is shorter than cluster CIDR 10.1.0.0/16: not one node would fit"
        );
        assert_eq!(
            refused("--cluster-cidr 10.1.0.0/16 --service-cidr fd00::/108,10.1.128.0/20"),
            "--cluster-cidr: 10.1.0.0/16 overlaps service CIDR 10.1.128.0/20: pods and Services would share addresses"
        );
    }

    #[test]
    fn identities_differ_where_nobody_chose_them() {
        let one = settings("--cluster-cidr 10.1.0.0/16,fd00::/48").unwrap();
        let other = settings("--cluster-cidr 10.1.0.0/16,fd00::/48").unwrap();
        assert_ne!(one.identity, other.identity);
        assert_eq!(one.pools.len(), 2);
    }

    #[test]
    fn nodes_of_another_cluster_cidr_are_named_with_both_values() {
        let settings = settings("--cluster-cidr 10.1.0.0/16").unwrap();
        let node = |pod_cidr: &str, address: &str| NodeFacts {
            name: "n1".to_owned(),
            uid: "1".to_owned(),
            resource_version: "1".to_owned(),
            pod_cidrs: vec![pod_cidr.parse().unwrap()],
            internal_ips: vec![address.parse().unwrap()],
        };
        settings.check(&[node("10.1.4.0/24", "192.168.0.1")]).unwrap();
        let outside = settings.check(&[node("10.244.0.0/24", "192.168.0.1")]).unwrap_err().to_string();
        assert!(
            outside.starts_with("node n1: pod CIDR 10.244.0.0/24 is outside of cluster CIDR 10.1.0.0/16"),
            "{outside}"
        );
        let inside = settings.check(&[node("10.1.4.0/24", "10.1.0.7")]).unwrap_err().to_string();
        assert!(
            inside.starts_with("node n1: node address 10.1.0.7 is inside of cluster CIDR 10.1.0.0/16"),
            "{inside}"
        );
    }
}
