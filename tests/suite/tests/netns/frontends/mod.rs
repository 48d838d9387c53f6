//! Frontends beside the cluster IP, under real traffic: session affinity, health checks, source ranges, node ports at loopback,
//! and what changes live. Claims begin with the name of Kubernetes' own test (test/e2e/network) where there is one.

mod addresses;
mod affinity;
mod changes;
mod dsr;
mod health;
mod policies;
mod ranges;
mod sizes;

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
/// Node port of the web, and of its echo.
const NODE_WEB: u16 = 30_080;
const NODE_ECHO: u16 = 30_007;
/// As Kubernetes asks for one answer.
const TIMES: u32 = 15;
/// Enough that every one of three backends is chosen (missed once in 10⁹ runs).
const MANY: u32 = 55;

/// A cluster with a client, backends that serve, and one service.
struct Bed {
    // end before what they run on
    _servers: Vec<Process>,
    service: Service,
    client: Pod,
    webs: Vec<Pod>,
    outside: Place,
    cluster: Cluster,
}

impl Bed {
    /// A client on the first node, backends on these. The service is not told of yet, its endpoints are.
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
        let outside = cluster.outside()?;
        let mut bed = Self { _servers: servers, service, client, webs, outside, cluster };
        bed.tell_endpoints(|_| {})?;
        Ok(bed)
    }

    /// Tells of the service: of type `NodePort`, but for what `change` says. Returns when every node goes by it.
    fn tell(&mut self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut service = self.service.objects().swap_remove(0);
        service["spec"]["type"] = json!("NodePort");
        for (port, number) in [(0, NODE_WEB), (1, NODE_ECHO), (2, NODE_ECHO)] {
            service["spec"]["ports"][port]["nodePort"] = json!(number);
        }
        change(&mut service);
        self.change("service", &[service])
    }

    /// Tells of the endpoints, each as `change` makes it.
    fn tell_endpoints(&mut self, change: impl Fn(&mut Value)) -> Result<()> {
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

    /// Of a node, by its index.
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

/// Everyone is answered; by whom.
fn answered(place: &Place, server: SocketAddr, count: u32) -> Result<Vec<String>> {
    let requests = place.get(server, count)?;
    ensure!(failures(&requests).is_empty(), "{server}: {:?}", failures(&requests));
    Ok(names(&requests).into_keys().collect())
}

/// How a question ends that nobody answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// At once.
    Refused,
    Silent,
}

/// Nobody is answered, and this is how it ends.
fn fails(place: &Place, server: SocketAddr, how: End) -> Result<()> {
    let probe =
        Probe { number: 0, server, transport: Transport::Tcp, servers: 1, timeout_ms: 1_000, ports: None };
    let heard = place.probe(&[probe])?;
    let is_it = heard.iter().all(|heard| {
        let ends = [(End::Refused, heard.refused), (End::Silent, heard.silent)];
        heard.answers.is_empty()
            && heard.failed.is_empty()
            && ends.iter().all(|(end, times)| (*end == how) == (*times > 0))
    });
    ensure!(is_it, "{server}: {how:?} is wanted: {heard:?}");
    Ok(())
}
