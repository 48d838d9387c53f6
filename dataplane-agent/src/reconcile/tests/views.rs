//! The reconciler's views for the API.

use super::*;
use crate::state::TrafficPolicy;

#[test]
fn service_view_lists_every_frontend() {
    let mut fixture = Fixture::new(LARGE);
    let mut all_frontends = service("everywhere", &["10.96.0.9", "fd96::9"]);
    all_frontends.ports.truncate(1);
    all_frontends.ports[0].node_port = Some(30_053);
    all_frontends.external_ips = vec!["203.0.113.1".parse().unwrap()];
    all_frontends.load_balancer_ips = vec!["192.0.2.9".parse().unwrap()];
    all_frontends.source_ranges = vec!["198.51.100.0/24".parse().unwrap()];
    all_frontends.external_policy = TrafficPolicy::Local;
    fixture.apply([
        upsert(all_frontends),
        upsert(slice("everywhere", ["10.1.0.2".to_owned()])),
        SourceEvent::Synced,
    ]);
    fixture.settle();
    let views = fixture.reconciler.services(&fixture.store);
    let view = views.iter().find(|view| view.name == "everywhere").unwrap();
    let shown: Vec<_> = view
        .frontends
        .iter()
        .map(|it| {
            let marks = [(it.local_only, " local"), (it.has_source_ranges, " has_source_ranges")];
            let marks: String = marks.into_iter().filter(|(is, _)| *is).map(|(_, mark)| mark).collect();
            format!("{:?} {}:{} {:?}{marks} {}", it.kind, it.address, it.port, it.clients, it.backends)
        })
        .collect();
    assert_eq!(
        shown,
        [
            "ClusterIp 10.96.0.9:53 All 1",
            "ClusterIp fd96::9:53 All 0",
            "ExternalIp 203.0.113.1:53 Internal 1",
            "ExternalIp 203.0.113.1:53 External local 0",
            "LoadBalancer 192.0.2.9:53 Internal has_source_ranges 1",
            "LoadBalancer 192.0.2.9:53 External local has_source_ranges 0",
            "NodePort 0.0.0.0:30053 Internal 1",
            "NodePort 0.0.0.0:30053 External local 0",
            // no endpoint of the family on any node: rejected, not dropped
            "NodePort :::30053 Internal 0",
            "NodePort :::30053 External 0",
        ]
    );
    let of_cluster: Vec<_> = view.cluster_ips.iter().map(ToString::to_string).collect();
    assert_eq!(of_cluster, ["10.96.0.9", "fd96::9"], "only cluster IPs");
}
