//! The reconciler's state for the API: table rows with the names of the objects they came from.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    time::Instant,
};

use dataplane_common::{
    abi::{Addr, Endpoint, FlowHints, Route, RouteKind, Scope, Service, ServiceFlags, ServiceKey},
    net::Protocol,
};

use super::{Reconciler, services::ServiceWork};
use crate::{
    api::views::{
        BackendView, ClientsView, EndpointView, FrontendKind, FrontendView, NodeView, Origin, PodView,
        ProblemView, ReconcileView, RouteKindView, RouteView, ServiceView, TableView,
    },
    compile::{routes, services::PortEntries},
    datapath::table::{RoutePrefix, TableError},
    state::{self, Forwarding, LoadBalancing, Node, Store},
};

impl Reconciler {
    /// Service ports with a frontend in the tables.
    pub fn services(&self, store: &Store) -> Vec<ServiceView> {
        let ports = self.services.desired().flat_map(|entries| &entries.ports);
        let ports = ports.filter(|port| port.is_port());
        ports.filter_map(|port| self.service(port, store.service(&port.key.service))).collect()
    }

    /// `object` is `None` for the host ports of a pod.
    fn service(&self, port: &PortEntries, object: Option<&state::Service>) -> Option<ServiceView> {
        let rows: Vec<_> = port.frontends().filter_map(|key| Some((key, self.services.row(key)?))).collect();
        let id = self.services.id(&port.key)?;
        let own_rows = rows.iter().filter(|(_, (row, _))| row.id == id);
        let generation = own_rows.clone().map(|(_, (row, _))| row.generation).max()?;
        let backends: BTreeSet<_> = own_rows
            .clone()
            .flat_map(|(_, (_, backends))| backends)
            .map(|backend| BackendView { address: backend.addr.to_ip(), port: backend.port.get() })
            .collect();
        let affinity = port.affinity_timeout;
        let mut frontends: Vec<_> =
            own_rows.map(|(key, (row, backends))| frontend_view(key, row, backends.len(), object)).collect();
        frontends.sort_by_key(|it| (it.kind, !it.address.is_ipv4(), it.address, it.clients));
        let of_cluster =
            frontends.iter().filter(|it| matches!(it.kind, FrontendKind::ClusterIp | FrontendKind::HostPort));
        Some(ServiceView {
            namespace: port.key.service.namespace.to_string(),
            name: port.key.service.name.to_string(),
            port_name: port.name.to_string(),
            cluster_ips: of_cluster.map(|it| it.address).collect(),
            frontends,
            port: port.key.port,
            protocol: port.key.protocol.to_string(),
            id,
            generation,
            load_balancing: match port.load_balancing {
                LoadBalancing::Random => "random",
                LoadBalancing::Maglev => "maglev",
            }
            .to_owned(),
            forwarding: match port.forwarding {
                Forwarding::Snat => "snat",
                Forwarding::Dsr => "dsr",
            }
            .to_owned(),
            affinity_timeout: (affinity != 0).then_some(affinity),
            backends: backends.into_iter().collect(),
        })
    }

    /// All entries of `ENDPOINTS`.
    pub fn endpoints(&self) -> Result<Vec<EndpointView>, TableError> {
        let mut entries = self.endpoints.table.entries()?;
        entries.sort_by_key(|(addr, _)| addr.to_ip());
        Ok(entries.into_iter().map(|(addr, endpoint)| self.endpoint(addr, &endpoint)).collect())
    }

    fn endpoint(&self, addr: Addr, endpoint: &Endpoint) -> EndpointView {
        let pod = self.endpoints.pod_of(&addr);
        EndpointView {
            address: addr.to_ip(),
            pod: pod.map(|pod| PodView { namespace: pod.namespace.clone(), name: pod.name.clone() }),
            device: pod.map(|pod| pod.device_name.clone()),
            ifindex: endpoint.ifindex,
            mac: (!endpoint.is_host()).then(|| endpoint.mac.to_string()),
            flow_hints: hinted_protocols(endpoint.flow_hints),
            accepts_node_ports: endpoint.is_host() && endpoint.has_node_ports(),
            device_down: endpoint.is_down(),
        }
    }

    /// All entries of `ROUTES`.
    pub fn routes(&self) -> Vec<RouteView> {
        let devices = self.devices();
        let mut views: Vec<_> = self
            .routes
            .actual
            .iter()
            .filter_map(|(prefix, route)| self.route(prefix, route, &devices))
            .collect();
        views.sort_by_key(|view| view.prefix);
        views
    }

    fn route(
        &self,
        prefix: &RoutePrefix,
        route: &Route,
        devices: &HashMap<u32, String>,
    ) -> Option<RouteView> {
        Some(RouteView {
            prefix: routes::network(prefix)?,
            kind: match route.kind()? {
                RouteKind::Native => RouteKindView::Native,
                RouteKind::Overlay => RouteKindView::Overlay,
                RouteKind::NoMasquerade => RouteKindView::NoMasquerade,
                RouteKind::Local => RouteKindView::Local,
                RouteKind::Services => RouteKindView::Services,
            },
            next_hop: (!route.next_hop.is_zero()).then(|| route.next_hop.to_ip()),
            device: devices.get(&route.ifindex).cloned(),
            node: self.routes.node_of(prefix).map(ToOwned::to_owned),
            mtu: route.mtu,
        })
    }

    fn devices(&self) -> HashMap<u32, String> {
        let Some(network) = &self.routes.network else { return HashMap::new() };
        let uplinks = network.uplinks.iter().map(|uplink| (uplink.ifindex, uplink.name.clone()));
        let overlay = network.overlay.map(|overlay| (overlay.ifindex, network.overlay_device.clone()));
        uplinks.chain(overlay).collect()
    }

    /// Other nodes, and how their pods are routed.
    pub fn nodes(&self, store: &Store) -> Vec<NodeView> {
        let own = self.routes.network.as_ref().map(|network| network.own.as_str());
        let others = store.nodes().filter(|node| Some(node.name.as_str()) != own);
        others
            .map(|node| NodeView {
                name: node.name.clone(),
                routing: self.routing(node),
                internal_ips: node.internal_ips.clone(),
                pod_cidrs: node.pod_cidrs.clone(),
            })
            .collect()
    }

    fn routing(&self, node: &Node) -> String {
        let kinds = node.pod_cidrs.iter().flat_map(routes::keys).filter_map(|key| {
            let route = self.routes.actual.get(&key)?;
            match route.kind()? {
                RouteKind::Native => Some("native"),
                RouteKind::Overlay => Some("vxlan"),
                RouteKind::NoMasquerade | RouteKind::Local | RouteKind::Services => None,
            }
        });
        let kinds: BTreeSet<_> = kinds.collect();
        let why = self.routes.problems.get(&node.name).and_then(|problems| problems.first());
        match (kinds.is_empty(), why) {
            (false, _) => kinds.into_iter().collect::<Vec<_>>().join(", "),
            (true, Some(problem)) => format!("none: {}", problem.message),
            (true, None) if node.pod_cidrs.is_empty() => "none: node has no pod CIDR".to_owned(),
            (true, None) => "none: route not written yet".to_owned(),
        }
    }

    /// Fill level of the tables.
    pub fn tables(&self) -> Vec<TableView> {
        let services = &self.services;
        vec![
            self.endpoints.table.view(self.endpoints.used()),
            self.endpoints.sources.table.view(self.endpoints.sources.used()),
            self.routes.table.view(self.routes.actual.len()),
            services.table.view(services.used()),
            services.ranges.table.view(services.ranges.slots.used() as usize),
            services.backends.table.view(services.backends.used()),
            services.source_ranges.table.view(services.source_ranges.used()),
        ]
    }

    /// Counters since the agent started.
    pub fn statistics(&self) -> ReconcileView {
        let services = &self.services;
        ReconcileView {
            errors: self.endpoints.table.errors()
                + self.endpoints.sources.table.errors()
                + self.routes.table.errors()
                + services.table.errors()
                + services.ranges.table.errors()
                + services.backends.table.errors()
                + services.source_ranges.table.errors(),
            retries: self.endpoints.queue.retries()
                + self.routes.queue.retries()
                + services.queue.retries()
                + services.backends.queue.retries(),
            drift: self.drift,
            pending: self.endpoints.queue.pending()
                + self.routes.queue.pending()
                + services.queue.pending()
                + services.backends.queue.pending(),
        }
    }

    /// Current problems, sorted by subject.
    pub fn problems(&self) -> Vec<ProblemView> {
        let mut problems: Vec<ProblemView> = Vec::new();
        let mut add = |subject: String, message: &str| {
            problems.push(ProblemView { origin: Origin::Reconcile, subject, message: message.to_owned() });
        };
        for (addr, message) in self.endpoints.queue.problems() {
            add(format!("endpoint {addr}"), message);
        }
        for (prefix, message) in self.routes.queue.problems() {
            let prefix =
                routes::network(prefix).map_or_else(|| prefix.addr.to_string(), |net| net.to_string());
            add(format!("route {prefix}"), message);
        }
        for problem in self.routes.problems.values().flatten() {
            add(format!("Node {}", problem.node), &format!("{}: {}", problem.field, problem.message));
        }
        if let Some(own) = self.routes.missing_own() {
            add(
                format!("Node {own}"),
                "Node object of this node not found: routes to other nodes cannot be computed; check --node-name",
            );
        }
        for (work, message) in self.services.queue.problems() {
            match work {
                ServiceWork::Service(name) => add(format!("Service {name}"), message),
                ServiceWork::Frontend(key) => add(format!("frontend {}", frontend(key)), message),
            }
        }
        for (key, owner, waiting) in self.services.conflicts() {
            add(
                format!("Service {waiting}"),
                &format!("{} is already used by Service {owner}", frontend(key)),
            );
        }
        for (id, message) in self.services.backends.queue.problems() {
            add(format!("backend ID {id}"), message);
        }
        problems.sort_by(|a, b| a.subject.cmp(&b.subject));
        problems
    }

    /// Number of pods of this node.
    pub fn pods(&self) -> usize {
        self.endpoints.pods.len()
    }

    /// When work is due again, as returned by [`Self::work`].
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = [self.endpoints.next_due(now), self.routes.next_due(now), self.services.next_due(now)];
        due.into_iter().flatten().min()
    }
}

fn frontend_view(
    key: &ServiceKey,
    row: &Service,
    backends: usize,
    object: Option<&state::Service>,
) -> FrontendView {
    let address = key.addr.to_ip();
    let is_one_of = |list: fn(&state::Service) -> &Vec<IpAddr>| {
        object.is_some_and(|object| list(object).contains(&address))
    };
    // in the precedence of `compile`
    let kind = if row.flags & ServiceFlags::HOST_PORT != 0 {
        FrontendKind::HostPort
    } else if *key == key.at_node() {
        FrontendKind::NodePort
    } else if is_one_of(|object| &object.cluster_ips) {
        FrontendKind::ClusterIp
    } else if is_one_of(|object| &object.external_ips) {
        FrontendKind::ExternalIp
    } else {
        FrontendKind::LoadBalancer
    };
    let clients = if key.scope == Scope::Outside as u8 {
        ClientsView::External
    } else if row.flags & ServiceFlags::OUTSIDE != 0 {
        ClientsView::Internal
    } else {
        ClientsView::All
    };
    FrontendView {
        kind,
        address,
        port: key.port.get(),
        clients,
        local_only: row.flags & ServiceFlags::LOCAL != 0,
        has_source_ranges: row.flags & ServiceFlags::SOURCE_RANGES != 0,
        backends: backends as u32,
    }
}

fn hinted_protocols(flow_hints: FlowHints) -> Vec<String> {
    let FlowHints { tcp, udp, icmp, other } = flow_hints;
    let named = [(tcp, "tcp"), (udp, "udp"), (icmp, "icmp"), (other, "other")];
    named.into_iter().filter(|(hint, _)| *hint != 0).map(|(_, name)| name.to_owned()).collect()
}

fn frontend(key: &ServiceKey) -> String {
    let protocol = Protocol::name(key.protocol);
    if *key == key.at_node() {
        let family = if key.addr.is_v4() { "IPv4" } else { "IPv6" };
        return format!("node port {}/{protocol} ({family})", key.port);
    }
    format!("{} port {}/{protocol}", key.addr, key.port)
}
