//! Everything that takes part, built once and kept for the whole run: only then can a round visit all of it.

use anyhow::{Context as _, Result};

use super::{
    forward::Nodes,
    ours::{Ours, Translation},
    peers::{Cluster, Pair, Proxy, Routing, service_backend},
    plan::{self, Case, MOST_RULES, Participants, SERVICE_COUNTS, Variant, Wanted, row},
    services::ServiceSet,
    site::Place,
    work::Work,
};
use dataplane_testkit::lab;

/// Rows between pods of one node and of two.
const RR_ROWS: [&str; 3] = [row::SAME_NODE_RR, row::TWO_NODE_RR, row::TWO_NODE_CRR];

/// All topologies that are wanted.
#[derive(Debug)]
pub struct Bed {
    raw: Pair,
    native: Vec<Setting>,
    vxlan: Option<Setting>,
    nodes: Option<Nodes>,
    wanted: Wanted,
}

/// Everybody of one routing mode with one number of services.
#[derive(Debug)]
struct Setting {
    count: u16,
    services: ServiceSet,
    plain: Cluster,
    nftables: Cluster,
    iptables: Cluster,
    /// By how services are translated.
    ours: Vec<(Variant, Ours)>,
}

impl Setting {
    /// Peers are cheap and always there; ours only if wanted.
    fn create(routing: Routing, count: u16, wanted: &Wanted) -> Result<Self> {
        let services = ServiceSet::new(count, service_backend());
        let (mode, ours_routing) = match routing {
            Routing::Native => ("n", lab::Routing::Native),
            Routing::Vxlan => ("x", lab::Routing::Vxlan),
        };
        let name = |kind: &str| format!("{kind}{mode}{count}");
        let has_rules = |variant| wanted.has(variant) && count <= MOST_RULES;
        let proxy = |variant, proxy| if has_rules(variant) { proxy } else { Proxy::None };
        let mut ways = vec![(Variant::Ours, Translation::Connect)];
        if routing == Routing::Native {
            ways.push((Variant::Packet, Translation::Packet));
        }
        let ours = ways.into_iter().filter(|(variant, _)| wanted.has(*variant)).map(|(variant, way)| {
            Ok((variant, Ours::create(ours_routing, count, way).with_context(|| format!("{variant}"))?))
        });
        Ok(Self {
            count,
            plain: Cluster::create(&name("plain"), routing, Proxy::None)?,
            nftables: Cluster::create(
                &name("nft"),
                routing,
                proxy(Variant::Nftables, Proxy::Nftables(&services)),
            )?,
            iptables: Cluster::create(
                &name("ipt"),
                routing,
                proxy(Variant::Iptables, Proxy::Iptables(&services)),
            )?,
            ours: ours.collect::<Result<_>>()?,
            services,
        })
    }

    const fn participants(&self) -> Participants<'_> {
        Participants { plain: &self.plain, nftables: &self.nftables, iptables: &self.iptables }
    }

    /// As it comes.
    fn default(&self) -> Option<&Ours> {
        self.ours.iter().find(|(variant, _)| *variant == Variant::Ours).map(|(_, ours)| ours)
    }
}

impl Bed {
    pub fn create(wanted: &Wanted) -> Result<Self> {
        let [fewest, ..] = SERVICE_COUNTS;
        let mut counts = wanted.service_counts();
        if wanted.has_any(&RR_ROWS) && !counts.contains(&fewest) {
            counts.insert(0, fewest);
        }
        let setting = |routing, count| {
            Setting::create(routing, count, wanted).with_context(|| format!("{count} services, {routing:?}"))
        };
        let vxlan = wanted.has_any(&[row::TWO_NODE_RR, row::TWO_NODE_CRR]);
        let nodes = wanted.has_any(&[row::NODEPORT_UDP]);
        Ok(Self {
            raw: Pair::create()?,
            native: counts.into_iter().map(|count| setting(Routing::Native, count)).collect::<Result<_>>()?,
            vxlan: vxlan.then(|| setting(Routing::Vxlan, fewest)).transpose()?,
            nodes: nodes.then(|| Nodes::create(wanted)).transpose()?,
            wanted: wanted.clone(),
        })
    }

    /// Every row of the benchmark that is wanted.
    pub fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        if let Some(few) = self.native.first() {
            let ours = few.default().map(Ours::same_node);
            cases.extend(plan::same_node(&self.raw, &few.participants(), ours.as_ref()));
        }
        let counts = self.wanted.service_counts();
        for setting in self.native.iter().filter(|setting| counts.contains(&setting.count)) {
            let ours = setting.ours.iter().map(|(variant, ours)| (*variant, ours.service())).collect();
            cases.push(plan::cluster_ip(&self.raw, &setting.participants(), &setting.services, ours));
        }
        for (name, setting) in [("native", self.native.first()), ("vxlan", self.vxlan.as_ref())] {
            let Some(setting) = setting else { continue };
            let ours = setting.default().map(Ours::two_nodes);
            cases.extend(plan::two_nodes(name, &setting.participants(), ours.as_ref()));
        }
        cases.extend(self.nodes.as_ref().map(|nodes| plan::node_port(nodes.iter())));
        cases.into_iter().filter_map(|case| case.keep(&self.wanted)).collect()
    }

    /// What must be true of the peers after traffic, or the rows compared something else.
    pub fn check(&self, measured: &[Case]) -> Result<()> {
        let is_of =
            |work: &Work, client: &Place| matches!(work, Work::Ask(site, _) if site.client == *client);
        let took_part = |client: &Place| {
            measured.iter().any(|case| case.work.iter().any(|(_, work)| is_of(work, client)))
        };
        for setting in self.native.iter().chain(&self.vxlan) {
            for cluster in [&setting.plain, &setting.nftables, &setting.iptables] {
                if took_part(&cluster.same_node().client) {
                    cluster.check_connection_tracking()?;
                }
            }
        }
        Ok(())
    }
}
