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
            let marks = [(it.local_only, " local"), (it.has_source_ranges, " guarded")];
            let marks: String = marks.into_iter().filter(|(is, _)| *is).map(|(_, mark)| mark).collect();
            format!("{:?} {}:{} {:?}{marks} {}", it.kind, it.address, it.port, it.clients, it.backends)
        })
        .collect();
    assert_eq!(
        shown,
        [
            "Cluster 10.96.0.9:53 All 1",
            "Cluster fd96::9:53 All 0",
            "External 203.0.113.1:53 Here 1",
            "External 203.0.113.1:53 Outside local 0",
            "LoadBalancer 192.0.2.9:53 Here guarded 1",
            "LoadBalancer 192.0.2.9:53 Outside local guarded 0",
            "Node 0.0.0.0:30053 Here 1",
            "Node 0.0.0.0:30053 Outside local 0",
            // no endpoint of the family on any node: rejected, not dropped
            "Node :::30053 Here 0",
            "Node :::30053 Outside 0",
        ]
    );
    let of_cluster: Vec<_> = view.cluster_ips.iter().map(ToString::to_string).collect();
    assert_eq!(of_cluster, ["10.96.0.9", "fd96::9"], "only cluster IPs");
}
