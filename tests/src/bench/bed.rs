//! Everything that takes part, built once and kept for the whole run: only then can a round visit all of it.

use std::collections::BTreeSet;

use anyhow::Result;

use super::{
    ours::{Ours, Translation},
    peers::{Cluster, Pair, Proxy, Routing, service_backend},
    plan::{self, Case, Participants, SERVICE_COUNTS, Variant},
    services::ServiceSet,
    site::Place,
};
use crate::lab;

/// All topologies.
#[derive(Debug)]
pub struct Bed {
    raw: Pair,
    native: Vec<Setting>,
    vxlan: Setting,
    /// By number of services, then by how they are translated.
    ours: Vec<Vec<(Variant, Ours)>>,
    ours_vxlan: Option<Ours>,
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
}

impl Bed {
    /// Peers are cheap and always there; ours only if wanted.
    pub fn create(wanted: &BTreeSet<Variant>) -> Result<Self> {
        let native = SERVICE_COUNTS.into_iter().map(|count| Setting::create(Routing::Native, count));
        let ours_vxlan = wanted
            .contains(&Variant::Ours)
            .then(|| Ours::create(lab::Routing::Vxlan, SERVICE_COUNTS[0], Translation::Connect));
        Ok(Self {
            raw: Pair::create()?,
            native: native.collect::<Result<_>>()?,
            vxlan: Setting::create(Routing::Vxlan, SERVICE_COUNTS[0])?,
            ours: SERVICE_COUNTS.into_iter().map(|count| ours(count, wanted)).collect::<Result<_>>()?,
            ours_vxlan: ours_vxlan.transpose()?,
        })
    }

    /// Every row of the benchmark.
    pub fn cases(&self) -> Vec<Case> {
        let few = self.native[0].participants();
        let default =
            self.ours[0].iter().find(|(variant, _)| *variant == Variant::Ours).map(|(_, ours)| ours);
        let mut cases = plan::same_node(&self.raw, &few, default.map(Ours::same_node).as_ref());
        for (setting, ours) in self.native.iter().zip(&self.ours) {
            let ours = ours.iter().map(|(variant, ours)| (*variant, ours.service())).collect();
            cases.push(plan::cluster_ip(&self.raw, &setting.participants(), &setting.services, ours));
        }
        let vxlan = self.ours_vxlan.as_ref().map(Ours::two_nodes);
        cases.extend(plan::two_nodes("native", &few, default.map(Ours::two_nodes).as_ref()));
        cases.extend(plan::two_nodes("vxlan", &self.vxlan.participants(), vxlan.as_ref()));
        cases
    }

    /// What must be true of the peers after traffic, or the rows compared something else.
    pub fn check(&self, measured: &[Case]) -> Result<()> {
        let took_part = |client: &Place| {
            measured.iter().any(|case| case.sites.iter().any(|(_, site)| site.client == *client))
        };
        for setting in self.native.iter().chain([&self.vxlan]) {
            for cluster in [&setting.plain, &setting.nftables, &setting.iptables] {
                if took_part(&cluster.same_node().client) {
                    cluster.check_connection_tracking()?;
                }
            }
        }
        Ok(())
    }
}

fn ours(count: u16, wanted: &BTreeSet<Variant>) -> Result<Vec<(Variant, Ours)>> {
    let ways = [(Variant::Ours, Translation::Connect), (Variant::Packet, Translation::Packet)];
    ways.into_iter()
        .filter(|(variant, _)| wanted.contains(variant))
        .map(|(variant, way)| Ok((variant, Ours::create(lab::Routing::Native, count, way)?)))
        .collect()
}
