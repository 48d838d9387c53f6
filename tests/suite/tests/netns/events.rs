//! Events of dropped packets name the device and its pod.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::api::{
    request::{EventFilter, EventLine, View},
    views::EventView,
};
use dataplane_testkit::{
    bins,
    lab::{Cluster, Family, Node, Service, Spec, WEB_PORT, wait},
};

const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn event_of_a_dropped_packet_names_device_pod_and_service() -> Result<()> {
    let mut cluster = Cluster::create(&Spec { connect_tcp: false, ..Spec::new(1) })?;
    let pods = (|| Ok((cluster.pod(0, "client")?, cluster.pod(0, "other")?)))();
    let (client, _other) = cluster.explain(pods)?;
    let service = Service::of(&[]);
    cluster.apply(&service)?;
    let _refused = client.place().get(service.at(Family::V4, WEB_PORT), 1)?;
    let node = &cluster.nodes()[0];
    let event = wait::until("the event", TIMEOUT, || {
        Ok(drops(node)?.into_iter().find(|event| event.outcome == "no_backend"))
    })?;
    let device = event.device.as_deref().context("the device has no name")?;
    ensure!(device.starts_with("dp"), "{event:?}");
    ensure!(event.device_pod.as_deref() == Some("default/client"), "{event:?}");
    ensure!(event.source_name.as_deref() == Some("Pod default/client"), "{event:?}");
    ensure!(event.source.is_some_and(|peer| peer.address == client.address(Family::V4)), "{event:?}");
    ensure!(event.destination_name.as_deref() == Some("Service default/web"), "{event:?}");

    let socket = node.agent().socket().to_str().context("a path that is not UTF-8")?;
    let shown = node.place().run(bins::agent()?, &["events", "--dropped", "--socket", socket])?;
    let expected = format!("drop no_backend at from_pod ({device} of Pod default/client): ");
    ensure!(shown.contains(&expected), "{expected} in {shown}");
    Ok(())
}

fn drops(node: &Node) -> Result<Vec<EventView>> {
    let view = View::Events(EventFilter { dropped: true, ..EventFilter::default() });
    let lines = node.agent().stream(&view)?.into_iter();
    Ok(lines
        .filter_map(|line| match line {
            EventLine::Event(event) => Some(event),
            EventLine::Lost(_) | EventLine::End => None,
        })
        .collect())
}
