//! The setting `routing` changes while pods and host processes use a pod of another node, directly
//! and by a Service: no datagram is lost.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_testkit::lab::{Checks, Cluster, ECHO_PORT, Family, Routing, Service, Spec};

/// Changes of each node's agent.
const CHANGES: usize = 4;
const INTERVAL: Duration = Duration::from_millis(1);

#[test]
fn switched_routing_loses_no_datagram() -> Result<()> {
    let spec = Spec { routing: Routing::Vxlan, connect_tcp: false, connect_udp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let pods = (|| Ok((cluster.pod(1, "web")?, cluster.pod(1, "direct")?, cluster.pod(0, "client")?)))();
    let (web, direct, client) = cluster.explain(pods)?;
    let _servers = [web.serve()?, direct.serve()?];
    let service = Service::of(&[&web]);
    cluster.apply(&service)?;
    let host = cluster.nodes()[0].place().clone();
    let mut clients = Vec::new();
    for family in Family::BOTH {
        let at_service = service.at(family, ECHO_PORT);
        for (what, place, server) in [
            ("host, Service", &host, at_service),
            ("host, pod", &host, direct.echo(family)),
            ("pod, Service", client.place(), at_service),
            ("pod, pod", client.place(), direct.echo(family)),
        ] {
            clients.push((format!("{what} ({family})"), place.keep_sending(server, INTERVAL, &[])?));
        }
    }
    for change in 0..CHANGES {
        let routing = if change % 2 == 0 { Routing::Native } else { Routing::Vxlan };
        for node in cluster.nodes_mut() {
            let agent = node.agent_mut();
            agent.set_wrapper(vec!["env".to_owned(), format!("DATAPLANE_ROUTING={}", routing.name())]);
            agent.terminate()?;
            agent.start()?;
            agent.await_ready()?;
        }
    }
    let mut checks = Checks::of(spec.describe());
    for (what, client) in clients {
        checks.that(what, || {
            let datagrams = client.finish()?;
            ensure!(datagrams.sent > 1_000, "{datagrams:?}");
            datagrams.check()
        });
    }
    checks.finish(&cluster)
}
