//! The settings of the allocator: validated once, and checked against the cluster.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use http::Uri;
use ipnet::IpNet;

use super::{
    lease::LeaseTiming,
    ledger::{Finding, NodeFacts, RangeLedger, same_family},
    pool::{Pool, PoolError},
};
use crate::{cluster::Access, telemetry::LogFormat};

/// Reuse delay of a deleted node's range: other nodes have removed their routes to it by then.
const REUSE_DELAY: Duration = Duration::from_secs(60);

/// Arguments of `allocate`.
#[derive(Clone, Debug, Args)]
pub struct AllocateArgs {
    /// CIDRs of all pods: one, or one per address family
    #[arg(
        long,
        env = "DATAPLANE_CLUSTER_CIDR",
        value_name = "CIDR,..",
        value_delimiter = ',',
        required = true
    )]
    cluster_cidr: Vec<IpNet>,
    /// Prefix length of a node's IPv4 range
    #[arg(long, env = "DATAPLANE_NODE_MASK_IPV4", value_name = "LENGTH", default_value_t = 24)]
    node_mask_ipv4: u8,
    /// Prefix length of a node's IPv6 range
    #[arg(long, env = "DATAPLANE_NODE_MASK_IPV6", value_name = "LENGTH", default_value_t = 64)]
    node_mask_ipv6: u8,
    /// CIDRs of Services, to check that pod CIDRs do not overlap them
    #[arg(long, env = "DATAPLANE_SERVICE_CIDR", value_name = "CIDR,..", value_delimiter = ',')]
    service_cidr: Vec<IpNet>,
    /// Namespace of the Lease for leader election
    #[arg(long, env = "DATAPLANE_LEASE_NAMESPACE", value_name = "NAME", default_value = "kube-system")]
    lease_namespace: String,
    /// Name of the Lease for leader election
    #[arg(long, env = "DATAPLANE_LEASE_NAME", value_name = "NAME", default_value = "dataplane-allocator")]
    lease_name: String,
    /// Seconds after which a leader that does not renew the Lease is replaced
    #[arg(long, env = "DATAPLANE_LEASE_DURATION", value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u16).range(5..=300))]
    lease_duration: u16,
    /// Identity of this allocator in the Lease [default: host name and a random UUID]
    #[arg(long, env = "DATAPLANE_IDENTITY", value_name = "NAME")]
    identity: Option<String>,
    /// Kubeconfig with the credentials for the API server [default: the pod's service account]
    #[arg(long, env = "DATAPLANE_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// URLs of the API servers [default: the server the credentials name]
    #[arg(long, env = "DATAPLANE_API_SERVER", value_name = "URL,..", value_delimiter = ',')]
    api_server: Vec<Uri>,
    /// Address of /metrics, /healthz and /readyz
    #[arg(
        long,
        env = "DATAPLANE_HTTP_BIND_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:9965"
    )]
    http_bind_address: SocketAddr,
    /// Log filter, as of the tracing crate
    #[arg(long, env = "DATAPLANE_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Log format: text or json
    #[arg(long, env = "DATAPLANE_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// The validated settings.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// One per family, with nothing in use.
    pub(super) pools: Vec<Pool>,
    pub(super) lease_namespace: String,
    pub(super) lease_name: String,
    pub(super) identity: String,
    pub(super) lease_timing: LeaseTiming,
    pub(super) access: Access,
    pub(super) http: SocketAddr,
    pub(super) log: String,
    pub(super) log_format: LogFormat,
}

/// Why the settings are invalid.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettingsError {
    #[error("--cluster-cidr: {one} and {other} are of the same family: at most one per family is allowed")]
    OneFamily { one: IpNet, other: IpNet },
    #[error("--node-mask-{family}: {source}")]
    Mask { family: &'static str, source: PoolError },
    #[error("--cluster-cidr: {cluster} overlaps service CIDR {service}: choose disjoint ranges")]
    Services { cluster: IpNet, service: IpNet },
    #[error("cannot determine identity: {0}; set --identity")]
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
            let pool = Pool::new(cluster, mask, REUSE_DELAY)
                .map_err(|source| SettingsError::Mask { family, source })?;
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
            lease_timing: LeaseTiming::new(Duration::from_secs(args.lease_duration.into())),
            access: Access {
                servers: args.api_server.clone(),
                kubeconfig: args.kubeconfig.clone(),
                ..Access::default()
            },
            http: args.http_bind_address,
            log: args.log.clone(),
            log_format: args.log_format,
        })
    }

    /// Checks the settings against the existing nodes.
    ///
    /// # Errors
    ///
    /// A node's range is outside of the cluster CIDRs, or its address inside of one: the settings
    /// are of another cluster, and every assignment would make it worse. Conflicts between nodes do
    /// not prevent the start.
    pub(super) fn check(&self, nodes: &[NodeFacts]) -> Result<(), SettingsError> {
        let now = std::time::Instant::now();
        let mut ledger = RangeLedger::new(self.pools.clone());
        for node in nodes {
            ledger.observe(node, now);
        }
        for node in nodes {
            let is_fatal = |finding: &Finding| {
                matches!(finding, Finding::Outside { .. } | Finding::AddressInside { .. })
            };
            if let Some(finding) = ledger.findings(&node.name).into_iter().find(is_fatal) {
                return Err(SettingsError::Cluster { node: node.name.clone(), finding });
            }
        }
        Ok(())
    }
}

/// A unique identity: differs between allocators on one host, and after a restart.
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

    fn is_fatal(arguments: &str) -> String {
        settings(arguments).unwrap_err().to_string()
    }

    #[test]
    fn invalid_settings_are_rejected_with_both_values() {
        assert_eq!(
            is_fatal("--cluster-cidr 10.1.0.0/16,10.2.0.0/16"),
            "--cluster-cidr: 10.1.0.0/16 and 10.2.0.0/16 are of the same family: at most one per family is allowed"
        );
        assert_eq!(
            is_fatal("--cluster-cidr 10.1.0.0/16 --node-mask-ipv4 12"),
            "--node-mask-ipv4: node mask /12 is shorter than cluster CIDR 10.1.0.0/16: no node range fits"
        );
        assert_eq!(
            is_fatal("--cluster-cidr 10.1.0.0/16 --service-cidr fd00::/108,10.1.128.0/20"),
            "--cluster-cidr: 10.1.0.0/16 overlaps service CIDR 10.1.128.0/20: choose disjoint ranges"
        );
    }

    #[test]
    fn default_identities_are_unique() {
        let one = settings("--cluster-cidr 10.1.0.0/16,fd00::/48").unwrap();
        let other = settings("--cluster-cidr 10.1.0.0/16,fd00::/48").unwrap();
        assert_ne!(one.identity, other.identity);
        assert_eq!(one.pools.len(), 2);
    }

    #[test]
    fn nodes_outside_of_cluster_cidr_are_reported() {
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
