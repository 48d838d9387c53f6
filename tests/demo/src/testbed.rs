//! The demo's cluster: nodes, pods, Services, servers.
//!
//! One client on every node; three web servers, on different nodes if there are enough; a DNS
//! server and an iperf3 server on the last node. The web pods are the backends of one Service, the
//! DNS pod is the backend of another.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};

use super::{CLUSTER, Options, show::Show};
use dataplane_testkit::{
    lab::{
        Backend, Cluster, Family, Pod, Process, Protocol, Segment, Service, ServicePort, Spec,
        service_addresses, wait,
    },
    traffic::{ECHO, HTTP},
};

/// Port of the web Service and of the filler Services.
pub(super) const WEB_PORT: u16 = 80;
/// Port of the web Service's echo server, TCP and UDP.
pub(super) const ECHO_PORT: u16 = 7;
pub(super) const DNS_PORT: u16 = 53;
/// The name that the DNS server resolves.
pub(super) const WEB_NAME: &str = "web.demo";
const WEB_PODS: usize = 3;

pub(super) struct Testbed {
    /// One client on each node.
    pub(super) clients: Vec<Pod>,
    pub(super) webs: Vec<Pod>,
    pub(super) iperf: Pod,
    pub(super) web: Service,
    pub(super) dns: Service,
    /// The last of the Services that only fill the tables.
    pub(super) filler: Option<Service>,
    pub(super) web_servers: Vec<Option<Process>>,
    others: Vec<Process>,
    pub(super) cluster: Cluster,
}

impl Testbed {
    pub(super) fn build(options: &Options, show: &mut Show) -> Result<Self> {
        let nodes = usize::from(options.nodes);
        let spec = Spec {
            name: CLUSTER.to_owned(),
            nodes: vec![Segment::FIRST; nodes],
            routing: options.routing.into(),
            ..Spec::new(nodes)
        };
        let mut cluster = show.build("start an agent on every node", || {
            let cluster = Cluster::create(&spec)?;
            Ok((cluster, format!("{nodes} nodes ready, {} routing", spec.routing.name())))
        })?;
        let built = show.build("create pods through the CNI plugin", || {
            let pods = make_pods(&cluster, nodes);
            let pods = cluster.explain(pods)?;
            let seen = format!("{} pods with IPv4 and IPv6", pods.0.len() + pods.1.len() + 2);
            Ok((pods, seen))
        });
        let (clients, webs, dns_pod, iperf) = built?;
        let (web_servers, others) = show.build("start web, DNS and iperf3 servers", || {
            let webs = webs.iter().map(|pod| pod.serve().map(Some)).collect::<Result<Vec<_>>>()?;
            let others = vec![start_dns(&dns_pod)?, start_iperf(&iperf)?];
            Ok(((webs, others), "all of them listen".to_owned()))
        })?;
        let backends: Vec<Backend> = webs.iter().map(Pod::backend).collect();
        let web = service("web", 1, web_ports(), backends.clone());
        let dns = service("dns", 10, dns_ports(), vec![dns_pod.backend()]);
        let filler = show.build("create Services", || {
            let filler = fill(&mut cluster, options.services, &backends)?;
            for service in [&web, &dns] {
                cluster.apply(service)?;
            }
            let seen = format!("{} Services in the tables of every node", options.services.max(2));
            Ok((filler, seen))
        })?;
        Ok(Self { clients, webs, iperf, web, dns, filler, web_servers, others, cluster })
    }

    pub(super) fn evidence(&self) -> String {
        self.cluster.diagnostics()
    }

    /// A web server on the first client's node.
    pub(super) fn near(&self) -> &Pod {
        &self.webs[0]
    }

    /// A web server on another node, if there is one.
    pub(super) fn far(&self) -> Option<&Pod> {
        self.webs.iter().find(|pod| pod.node() != self.clients[0].node())
    }

    pub(super) fn keep(self) -> Result<()> {
        for process in self.web_servers.into_iter().flatten().chain(self.others) {
            process.detach();
        }
        self.cluster.keep()
    }
}

type Pods = (Vec<Pod>, Vec<Pod>, Pod, Pod);

fn make_pods(cluster: &Cluster, nodes: usize) -> Result<Pods> {
    let clients = (0..nodes).map(|node| cluster.pod(node, &format!("client-{}", node + 1)));
    let webs = (0..WEB_PODS).map(|number| cluster.pod(number % nodes, &format!("web-{}", number + 1)));
    Ok((
        clients.collect::<Result<_>>()?,
        webs.collect::<Result<_>>()?,
        cluster.pod(nodes - 1, "dns")?,
        cluster.pod(nodes - 1, "iperf")?,
    ))
}

fn service(name: &str, number: u16, ports: Vec<ServicePort>, backends: Vec<Backend>) -> Service {
    Service { name: name.to_owned(), addresses: service_addresses(number).to_vec(), ports, backends }
}

fn web_ports() -> Vec<ServicePort> {
    vec![
        ServicePort { name: "http", port: WEB_PORT, protocol: Protocol::Tcp, target: HTTP },
        ServicePort { name: "echo-tcp", port: ECHO_PORT, protocol: Protocol::Tcp, target: ECHO },
        ServicePort { name: "echo-udp", port: ECHO_PORT, protocol: Protocol::Udp, target: ECHO },
    ]
}

fn dns_ports() -> Vec<ServicePort> {
    vec![
        ServicePort { name: "dns", port: DNS_PORT, protocol: Protocol::Udp, target: DNS_PORT },
        ServicePort { name: "dns-tcp", port: DNS_PORT, protocol: Protocol::Tcp, target: DNS_PORT },
    ]
}

/// Creates Services until there are `count` with the two that the demo uses. Returns the last one.
fn fill(cluster: &mut Cluster, count: u16, backends: &[Backend]) -> Result<Option<Service>> {
    let ports = || vec![ServicePort { name: "http", port: WEB_PORT, protocol: Protocol::Tcp, target: HTTP }];
    // the demo's own Services have numbers below 100
    let services: Vec<Service> = (0..count.saturating_sub(2))
        .map(|number| service(&format!("filler-{number}"), 100 + number, ports(), backends.to_vec()))
        .collect();
    let objects: Vec<_> = services.iter().flat_map(Service::objects).collect();
    let Some(last) = services.last() else { return Ok(None) };
    for node in cluster.nodes() {
        node.apply("fillers", &objects)?;
    }
    for node in cluster.nodes_mut() {
        node.await_services(&services)?;
    }
    Ok(Some(last.clone()))
}

/// Starts dnsmasq, which resolves one name to the addresses of the web Service.
fn start_dns(pod: &Pod) -> Result<Process> {
    let [v4, v6] = service_addresses(1);
    let record = format!("--host-record={WEB_NAME},{v4},{v6}");
    let process = pod.place().start(
        "dnsmasq",
        &[
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
            "--pid-file",
            "--log-facility=-",
            &record,
        ],
    )?;
    let server = (pod.v4(), DNS_PORT).into();
    let resolved = wait::until("an answer of dnsmasq", Duration::from_secs(10), || {
        pod.place().resolve(server, WEB_NAME, &["--timeout-ms", "500"]).map(Some)
    });
    let resolved: Vec<IpAddr> = resolved.with_context(|| dataplane_testkit::lab::tail(process.log(), 10))?;
    anyhow::ensure!(resolved == [v4], "dnsmasq answered {resolved:?}, not {v4}");
    Ok(process)
}

fn start_iperf(pod: &Pod) -> Result<Process> {
    let process = pod.place().start("iperf3", &["--server", "--forceflush"])?;
    process.wait_line(Duration::from_secs(10), |line| line.contains("listening").then_some(()))?;
    Ok(process)
}

/// Both address families.
pub(super) const FAMILIES: [Family; 2] = Family::BOTH;
