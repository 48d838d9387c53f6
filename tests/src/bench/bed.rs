//! Everything that takes part, built once and kept for the whole run: only then can a round visit all of it.

use std::collections::BTreeSet;

use anyhow::Result;

use super::{
    peers::{Cluster, Pair, Proxy, Routing, service_backend},
    plan::{self, Case, Participants, SERVICE_COUNTS, Variant},
    services::ServiceSet,
};

/// All topologies.
#[derive(Debug)]
pub struct Bed {
    raw: Pair,
    native: Vec<Setting>,
    vxlan: Setting,
}

/// The peers of one routing mode with one number of services.
#[derive(Debug)]
struct Setting {
    services: ServiceSet,
    plain: Cluster,
    nftables: Cluster,
    iptables: Cluster,
}

impl Setting {
    fn create(routing: Routing, count: u16) -> Result<Self> {
        let services = ServiceSet::new(count, service_backend());
        let mode = if routing == Routing::Native { "n" } else { "x" };
        let name = |kind: &str| format!("{kind}{mode}{count}");
        Ok(Self {
            plain: Cluster::create(&name("plain"), routing, Proxy::None)?,
            nftables: Cluster::create(&name("nft"), routing, Proxy::Nftables(&services))?,
            iptables: Cluster::create(&name("ipt"), routing, Proxy::Iptables(&services))?,
            services,
        })
    }

    const fn participants(&self) -> Participants<'_> {
        Participants { plain: &self.plain, nftables: &self.nftables, iptables: &self.iptables }
    }

    fn clusters(&self) -> [(Variant, &Cluster); 3] {
        [
            (Variant::Plain, &self.plain),
            (Variant::Nftables, &self.nftables),
            (Variant::Iptables, &self.iptables),
        ]
    }
}

impl Bed {
    pub fn create(_wanted: &BTreeSet<Variant>) -> Result<Self> {
        let native = SERVICE_COUNTS.into_iter().map(|count| Setting::create(Routing::Native, count));
        Ok(Self {
            raw: Pair::create()?,
            native: native.collect::<Result<_>>()?,
            vxlan: Setting::create(Routing::Vxlan, SERVICE_COUNTS[0])?,
        })
    }

    /// Every row of the benchmark.
    pub fn cases(&self) -> Vec<Case> {
        let few = self.native[0].participants();
        let mut cases = plan::same_node(&self.raw, &few, None);
        for setting in &self.native {
            cases.push(plan::cluster_ip(&self.raw, &setting.participants(), &setting.services, Vec::new()));
        }
        cases.extend(plan::two_nodes("native", &few, None));
        cases.extend(plan::two_nodes("vxlan", &self.vxlan.participants(), None));
        cases
    }

    /// What must be true of the peers after traffic, or the rows compared something else.
    pub fn check(&self) -> Result<()> {
        for setting in &self.native {
            for (_, cluster) in setting.clusters() {
                cluster.check_connection_tracking()?;
            }
        }
        Ok(())
    }
}
