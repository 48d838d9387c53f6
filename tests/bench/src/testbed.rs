//! All topologies of the benchmark. They exist during the whole run, so that each round measures
//! all of them.

use anyhow::{Context as _, Result};

use super::{
    baselines::{Cluster, Pair, Proxy, Routing, service_backend},
    dataplane::{DataplaneCluster, Translation},
    empty::EmptyCluster,
    forward::Nodes,
    outside::Outside,
    path::Location,
    plan::{self, Baselines, Case, MAX_RULE_SERVICES, SERVICE_COUNTS, Selection, Variant, row},
    program::{Programs, peers::Peers},
    services::ServiceSet,
    workload::Workload,
};
use dataplane_testkit::lab;

/// Rows of the clusters with the fewest Services.
const FEW_SERVICES_ROWS: [&str; 5] =
    [row::SAME_NODE_RR, row::TWO_NODE_RR, row::TWO_NODE_CRR, row::OUTSIDE_CRR, row::BULK];

/// All selected topologies.
#[derive(Debug)]
pub struct Testbed {
    raw: Pair,
    native: Vec<Scenario>,
    vxlan: Option<Scenario>,
    outside: Option<Outside>,
    empty: Option<EmptyCluster>,
    nodes: Option<Nodes>,
    programs: Option<Programs>,
    selection: Selection,
}

/// All variants of one routing mode and one number of Services.
#[derive(Debug)]
struct Scenario {
    count: u16,
    services: ServiceSet,
    plain: Cluster,
    nftables: Cluster,
    iptables: Cluster,
    /// The datapath's clusters, by how Services are translated.
    dataplane: Vec<(Variant, DataplaneCluster)>,
}

impl Scenario {
    /// Creates the baselines always, as they are cheap, and the datapath's clusters if selected.
    fn create(routing: Routing, count: u16, selection: &Selection) -> Result<Self> {
        let services = ServiceSet::new(count, service_backend());
        let (mode, lab_routing) = match routing {
            Routing::Native => ("n", lab::Routing::Native),
            Routing::Vxlan => ("x", lab::Routing::Vxlan),
        };
        let name = |kind: &str| format!("{kind}{mode}{count}");
        let has_rules = |variant| selection.has(variant) && count <= MAX_RULE_SERVICES;
        let proxy = |variant, proxy| if has_rules(variant) { proxy } else { Proxy::None };
        let mut translations = vec![(Variant::Ours, Translation::Connect)];
        if routing == Routing::Native {
            translations.push((Variant::Packet, Translation::Packet));
        }
        let dataplane = translations.into_iter().filter(|(variant, _)| selection.has(*variant));
        let dataplane = dataplane.map(|(variant, translation)| {
            let cluster = DataplaneCluster::create(lab_routing, count, translation);
            Ok((variant, cluster.with_context(|| format!("cannot create variant {variant}"))?))
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
            dataplane: dataplane.collect::<Result<_>>()?,
            services,
        })
    }

    const fn baselines(&self) -> Baselines<'_> {
        Baselines { plain: &self.plain, nftables: &self.nftables, iptables: &self.iptables }
    }

    /// The cluster with default settings.
    fn default(&self) -> Option<&DataplaneCluster> {
        self.dataplane.iter().find(|(variant, _)| *variant == Variant::Ours).map(|(_, dataplane)| dataplane)
    }
}

impl Testbed {
    pub fn create(selection: &Selection, peers: &Peers) -> Result<Self> {
        let [fewest, ..] = SERVICE_COUNTS;
        let mut counts = selection.service_counts();
        if selection.has_any(&FEW_SERVICES_ROWS) && !counts.contains(&fewest) {
            counts.insert(0, fewest);
        }
        let scenario = |routing, count| {
            Scenario::create(routing, count, selection)
                .with_context(|| format!("cannot create clusters with {count} Services, {routing:?}"))
        };
        let vxlan = selection.has_any(&[row::TWO_NODE_RR, row::TWO_NODE_CRR]);
        let empty = vxlan && selection.has(Variant::Empty);
        let nodes = selection.has_any(&[row::NODEPORT_UDP]);
        let programs = selection.has_any(&row::PROGRAM_RUNS);
        let native: Vec<Scenario> =
            counts.into_iter().map(|count| scenario(Routing::Native, count)).collect::<Result<_>>()?;
        let few = native.first().filter(|_| selection.has_any(&[row::OUTSIDE_CRR]));
        let outside = few.map(|few| {
            let dataplane = few.default().map(DataplaneCluster::outside).transpose()?;
            Outside::create(selection, &few.services, dataplane)
        });
        Ok(Self {
            raw: Pair::create()?,
            outside: outside.transpose()?,
            empty: empty.then(EmptyCluster::create).transpose()?,
            native,
            vxlan: vxlan.then(|| scenario(Routing::Vxlan, fewest)).transpose()?,
            nodes: nodes.then(|| Nodes::create(selection)).transpose()?,
            programs: programs.then(|| Programs::create(selection, peers)).transpose()?,
            selection: selection.clone(),
        })
    }

    /// Returns the cases of all selected rows.
    pub fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        if let Some(few) = self.native.first() {
            let dataplane = few.default().map(DataplaneCluster::same_node);
            cases.extend(plan::same_node(&self.raw, &few.baselines(), dataplane.as_ref()));
            let (raw, baselines) = (&self.raw, few.baselines());
            cases.extend(plan::bulk(1, raw, &baselines, Cluster::same_node, dataplane.as_ref()));
            let dataplane = few.default().map(DataplaneCluster::two_nodes);
            cases.extend(plan::bulk(2, raw, &baselines, Cluster::two_nodes, dataplane.as_ref()));
        }
        let counts = self.selection.service_counts();
        for scenario in self.native.iter().filter(|scenario| counts.contains(&scenario.count)) {
            let dataplane = scenario
                .dataplane
                .iter()
                .map(|(variant, dataplane)| (*variant, dataplane.service()))
                .collect();
            cases.push(plan::cluster_ip(&self.raw, &scenario.baselines(), &scenario.services, dataplane));
        }
        let empty = self.empty.as_ref().map(EmptyCluster::two_nodes);
        for (name, scenario, empty) in
            [("native", self.native.first(), empty), ("vxlan", self.vxlan.as_ref(), None)]
        {
            let Some(scenario) = scenario else { continue };
            let dataplane = scenario.default().map(DataplaneCluster::two_nodes);
            cases.extend(plan::two_nodes(name, &scenario.baselines(), empty.as_ref(), dataplane.as_ref()));
        }
        cases.extend(self.outside.as_ref().map(|outside| plan::outside(outside.paths())));
        cases.extend(self.nodes.as_ref().map(|nodes| plan::node_port(nodes.iter())));
        cases.extend(self.programs.iter().flat_map(Programs::cases));
        cases.into_iter().filter_map(|case| case.keep(&self.selection)).collect()
    }

    /// Checks after the measurement that the baselines used connection tracking as intended.
    pub fn check(&self, measured: &[Case]) -> Result<()> {
        let is_of = |workload: &Workload, client: &Location| match workload {
            Workload::ClientServer(path, _) | Workload::Segmented(path) => path.client == *client,
            Workload::Forward(_) | Workload::Program(_) => false,
        };
        let took_part = |client: &Location| {
            measured.iter().any(|case| case.workloads.iter().any(|(_, workload)| is_of(workload, client)))
        };
        for scenario in self.native.iter().chain(&self.vxlan) {
            for cluster in [&scenario.plain, &scenario.nftables, &scenario.iptables] {
                if took_part(&cluster.same_node().client) {
                    cluster.check_connection_tracking()?;
                }
            }
        }
        self.outside.as_ref().map_or(Ok(()), Outside::check)
    }
}
