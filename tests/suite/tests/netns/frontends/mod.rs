//! Frontends other than the cluster IP, under real traffic: session affinity, health checks, source
//! ranges, node ports at loopback, and live changes. A check that corresponds to a test of
//! Kubernetes (test/e2e/network) begins with its name.

mod addresses;
mod affinity;
mod changes;
mod dsr;
mod health;
mod ping;
mod policies;
mod sizes;
mod source_ranges;
mod xdp;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{
        Cluster, Family, Place, Pod, Process, Protocol, Service, ServicePort, Spec, failures, names,
        service_addresses,
    },
    traffic::{
        ECHO, HTTP,
        report::{Probe, Transport},
    },
};
use serde_json::{Value, json};

const WEB: u16 = 80;
const ECHO_PORT: u16 = 7;
/// Node ports of the HTTP and the echo server.
const NODE_WEB: u16 = 30_080;
const NODE_ECHO: u16 = 30_007;
/// Requests of Kubernetes' own affinity tests.
const TIMES: u32 = 15;
/// Requests that reach each of three backends (one is missed once in 10⁹ runs).
const MANY: u32 = 55;

/// A cluster with a client, backends and one service.
struct Testbed {
    // dropped before the namespaces in which they run
    _servers: Vec<Process>,
    service: Service,
    client: Pod,
    webs: Vec<Pod>,
    external: Place,
    cluster: Cluster,
}

impl Testbed {
    /// Creates a client on the first node and backends on `backends`. Applies the endpoints, but
    /// not yet the service.
    fn create(spec: &Spec, backends: &[usize]) -> Result<Self> {
        let cluster = Cluster::create(spec)?;
        let pods = cluster.explain((|| {
            let web = |(number, node): (usize, &usize)| cluster.pod(*node, &format!("web-{number}"));
            let webs = backends.iter().enumerate().map(web).collect::<Result<Vec<_>>>()?;
            Ok((cluster.pod(0, "client")?, webs))
        })());
        let (client, webs) = pods?;
        let servers = webs.iter().map(Pod::serve).collect::<Result<_>>()?;
        let port = |name, port, protocol, target| ServicePort { name, port, protocol, target };
        let service = Service {
            name: "web".to_owned(),
            addresses: service_addresses(1).to_vec(),
            ports: vec![
                port("http", WEB, Protocol::Tcp, HTTP),
                port("echo", ECHO_PORT, Protocol::Tcp, ECHO),
                port("echo-udp", ECHO_PORT, Protocol::Udp, ECHO),
            ],
            backends: webs.iter().map(Pod::backend).collect(),
        };
        let external = cluster.outside()?;
        let mut testbed = Self { _servers: servers, service, client, webs, external, cluster };
        testbed.apply_endpoints(|_| {})?;
        Ok(testbed)
    }

    /// Applies the service, of type `NodePort`, after `change`. Returns when every node has it.
    fn apply_service(&mut self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut service = self.service.objects().swap_remove(0);
        service["spec"]["type"] = json!("NodePort");
        for (port, number) in [(0, NODE_WEB), (1, NODE_ECHO), (2, NODE_ECHO)] {
            service["spec"]["ports"][port]["nodePort"] = json!(number);
        }
        change(&mut service);
        self.change("service", &[service])
    }

    /// Applies the endpoints after `change`.
    fn apply_endpoints(&mut self, change: impl Fn(&mut Value)) -> Result<()> {
        let mut slices = self.service.objects().split_off(1);
        for endpoint in slices.iter_mut().filter_map(|slice| slice["endpoints"].as_array_mut()).flatten() {
            change(endpoint);
        }
        self.change("slices", &slices)
    }

    fn change(&mut self, name: &str, objects: &[Value]) -> Result<()> {
        self.cluster.change(objects.len(), |cluster| cluster.apply_objects(name, objects))
    }

    fn host(&self) -> &Place {
        self.cluster.nodes()[0].place()
    }

    /// The HTTP node port at a node, by its index.
    fn node_port(&self, node: usize, family: Family) -> SocketAddr {
        SocketAddr::new(self.cluster.nodes()[node].address(family), NODE_WEB)
    }

    fn cluster_ip(&self, family: Family) -> SocketAddr {
        self.service.at(family, WEB)
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([127, 0, 0, 1]),
        Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
    }
}

/// All requests are answered; returns the names of the backends.
fn expect_answers(place: &Place, server: SocketAddr, count: u32) -> Result<Vec<String>> {
    let requests = place.get(server, count)?;
    ensure!(failures(&requests).is_empty(), "{server}: {:?}", failures(&requests));
    Ok(names(&requests).into_keys().collect())
}

/// How a request without an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Immediately, with an error.
    Refused,
    Timeout,
}

/// No request is answered, and all end in this way.
fn expect_no_answer(place: &Place, server: SocketAddr, how: End) -> Result<()> {
    let probe =
        Probe { number: 0, server, transport: Transport::Tcp, servers: 1, timeout_ms: 1_000, ports: None };
    let report = place.probe(&[probe])?;
    let is_expected = report.iter().all(|report| {
        let ends = [(End::Refused, report.refused), (End::Timeout, report.silent)];
        report.answers.is_empty()
            && report.failed.is_empty()
            && ends.iter().all(|(end, times)| (*end == how) == (*times > 0))
    });
    ensure!(is_expected, "{server}: expected {how:?}: {report:?}");
    Ok(())
}
