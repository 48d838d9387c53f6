//! Traffic policies, topology hints, DSR and source ranges.

use super::*;
use crate::state::Hints;

#[test]
fn frontends_follow_their_traffic_policy() {
    use TrafficPolicy::{Cluster, Local};
    let (service, slice) = service_with_all_frontends(Cluster, Cluster);
    assert_eq!(
        shown(&compiled(&service, std::slice::from_ref(&slice))),
        [
            "0.0.0.0:30080 -> 10.1.0.2 10.1.1.2",
            "10.96.0.1:80 -> 10.1.0.2 10.1.1.2",
            "192.0.2.1:80 -> 10.1.0.2 10.1.1.2",
            "192.0.2.2:80 -> 10.1.0.2 10.1.1.2",
        ]
    );
    let (service, slice) = service_with_all_frontends(Local, Local);
    assert_eq!(
        shown(&compiled(&service, &[slice])),
        [
            "0.0.0.0:30080 outside local -> 10.1.0.2",
            "0.0.0.0:30080 split -> 10.1.0.2 10.1.1.2",
            "10.96.0.1:80 local -> 10.1.0.2",
            "192.0.2.1:80 outside local -> 10.1.0.2",
            "192.0.2.1:80 split -> 10.1.0.2 10.1.1.2",
            "192.0.2.2:80 outside local -> 10.1.0.2",
            "192.0.2.2:80 split -> 10.1.0.2 10.1.1.2",
        ]
    );
}

#[test]
fn local_policy_without_any_endpoint_rejects_instead_of_dropping() {
    let (service, mut slice) = service_with_all_frontends(TrafficPolicy::Local, TrafficPolicy::Cluster);
    slice.endpoints[0].node_name = None;
    let dropped = shown(&compiled(&service, std::slice::from_ref(&slice)));
    assert!(dropped.contains(&"10.96.0.1:80 local -> ".to_owned()), "{dropped:?}");
    for endpoint in &mut slice.endpoints {
        (endpoint.ready, endpoint.serving) = (false, false);
    }
    let refused = shown(&compiled(&service, &[slice]));
    assert!(refused.contains(&"10.96.0.1:80 -> ".to_owned()), "{refused:?}");
}

#[test]
fn frontends_with_host_backends_are_flagged() {
    let (service, mut slice) = service_with_all_frontends(TrafficPolicy::Local, TrafficPolicy::Local);
    slice.endpoints[0].address = "192.168.1.1".parse().unwrap();
    let mut node_context = NodeContext { node: "here".to_owned(), ..NodeContext::default() };
    let elsewhere = compile(&service, [&slice], &node_context);
    assert!(shown(&elsewhere).iter().all(|line| !line.contains("host-backend")));
    node_context.host.insert("192.168.1.1".parse::<IpAddr>().unwrap().into());
    let marked: Vec<_> = shown(&compile(&service, [&slice], &node_context))
        .into_iter()
        .filter(|line| line.contains("host-backend"))
        .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
        .collect();
    // not the rows of external clients, which are never processes of the node
    assert_eq!(marked, ["0.0.0.0:30080", "10.96.0.1:80", "192.0.2.1:80", "192.0.2.2:80"]);
}

#[test]
fn terminating_local_endpoints_are_used_if_no_local_one_is_ready() {
    let (service, mut slice) = service_with_all_frontends(TrafficPolicy::Local, TrafficPolicy::Cluster);
    (slice.endpoints[0].ready, slice.endpoints[0].terminating) = (false, true);
    let both = shown(&compiled(&service, &[slice]));
    assert_eq!(both[0], "0.0.0.0:30080 -> 10.1.1.2");
    assert_eq!(both[1], "10.96.0.1:80 local -> 10.1.0.2");
}

/// Both nodes of a DSR connection must select from the same backends.
#[test]
fn dsr_applies_to_cluster_policy_and_ignores_hints() {
    let (mut service, mut slice) = service_with_all_frontends(TrafficPolicy::Local, TrafficPolicy::Cluster);
    service.forwarding = Some(Forwarding::Dsr);
    let in_scope = Hints { nodes: Box::new([]), zones: Box::new(["west".into()]) };
    slice.endpoints[0].hints = Some(Box::new(in_scope));
    let far = Hints { nodes: Box::new([]), zones: Box::new(["east".into()]) };
    slice.endpoints[1].hints = Some(Box::new(far));
    let entries = compiled(&service, &[slice]);
    assert_eq!(entries.ports[0].flags(), ServiceFlags::HASH);
    let both = shown(&entries);
    assert_eq!(both[0], "0.0.0.0:30080 dsr -> 10.1.0.2 10.1.1.2");
    assert_eq!(both[1], "10.96.0.1:80 local -> 10.1.0.2");
}

#[test]
fn node_defaults_apply_without_annotations() {
    use Forwarding::{Dsr, Snat};
    use LoadBalancing::{Maglev, Random};
    let chosen = |node: (LoadBalancing, Forwarding), load_balancing, forwarding| {
        let node_context =
            NodeContext { load_balancing: node.0, forwarding: node.1, ..NodeContext::default() };
        node_context.options_of(&Service { load_balancing, forwarding, ..Service::default() })
    };
    assert_eq!(chosen((Random, Snat), None, None), (Random, Snat));
    assert_eq!(chosen((Random, Snat), None, Some(Dsr)), (Maglev, Dsr));
    assert_eq!(chosen((Maglev, Snat), None, None), (Maglev, Snat));
    assert_eq!(chosen((Maglev, Snat), Some(Random), None), (Random, Snat));
    assert_eq!(chosen((Random, Dsr), None, None), (Maglev, Dsr));
    assert_eq!(chosen((Random, Dsr), Some(Random), None), (Random, Snat));
    assert_eq!(chosen((Random, Dsr), None, Some(Snat)), (Random, Snat));
}

#[test]
fn hints_apply_if_all_ready_endpoints_have_them_and_one_matches() {
    let hints = |nodes: &[&str], zones: &[&str]| {
        let names = |texts: &[&str]| texts.iter().map(|text| Name::from(*text)).collect();
        Some(Box::new(Hints { nodes: names(nodes), zones: names(zones) }))
    };
    let (service, mut slice) = service_with_all_frontends(TrafficPolicy::Cluster, TrafficPolicy::Cluster);
    let cases = [
        (hints(&["here"], &["west"]), hints(&["there"], &["west"]), "10.1.0.2"),
        (hints(&["other"], &["east"]), hints(&["there"], &["west"]), "10.1.1.2"),
        (hints(&[], &["west"]), hints(&["here"], &["west"]), "10.1.0.2 10.1.1.2"),
        (hints(&["here"], &["west"]), None, "10.1.0.2 10.1.1.2"),
        (hints(&["other"], &["east"]), hints(&["there"], &["south"]), "10.1.0.2 10.1.1.2"),
    ];
    for (here, there, expected) in cases {
        slice.endpoints[0].hints = here;
        slice.endpoints[1].hints = there;
        let shown = shown(&compiled(&service, std::slice::from_ref(&slice)));
        assert_eq!(shown[1], format!("10.96.0.1:80 -> {expected}"), "{slice:?}");
    }
    // hints of endpoints that are not ready do not count
    slice.endpoints[0].hints = hints(&[], &["west"]);
    slice.endpoints[1].hints = None;
    slice.endpoints[1].ready = false;
    assert_eq!(shown(&compiled(&service, &[slice]))[1], "10.96.0.1:80 -> 10.1.0.2");
}

#[test]
fn local_ready_endpoints_are_counted_once() {
    let node_context = NodeContext { node: "here".to_owned(), ..NodeContext::default() };
    let mut ipv4 = slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", false, true)]);
    let mut ipv6 = slice(80, &[("fd01::2", true, false), ("fd01::9", true, false)]);
    ipv4.endpoints.iter_mut().for_each(|endpoint| endpoint.node_name = Some("here".into()));
    ipv6.endpoints[0].node_name = Some("here".into());
    // one dual-stack endpoint, twice in IPv4; the others terminate or are on another node
    assert_eq!(count_local_ready([&ipv4, &ipv4, &ipv6], &node_context), 1);
    ipv4.endpoints[1].ready = true;
    assert_eq!(count_local_ready([&ipv4, &ipv6], &node_context), 2);
    assert_eq!(
        count_local_ready([&ipv6], &NodeContext { node: "there".to_owned(), ..NodeContext::default() }),
        0
    );
}

#[test]
fn source_ranges_apply_to_load_balancer_addresses() {
    let (mut service, slice) = service_with_all_frontends(TrafficPolicy::Cluster, TrafficPolicy::Cluster);
    service.source_ranges = vec!["198.51.100.0/24".parse().unwrap()];
    let entries = compiled(&service, std::slice::from_ref(&slice));
    let has_source_ranges: Vec<_> =
        shown(&entries).into_iter().filter(|line| line.contains("source-ranges")).collect();
    assert_eq!(has_source_ranges, ["192.0.2.2:80 source-ranges -> 10.1.0.2 10.1.1.2"]);
    service.source_ranges = vec!["2001:db8::/32".parse().unwrap()];
    let other_family = shown(&compiled(&service, &[slice]));
    assert!(other_family.iter().all(|line| !line.contains("source-ranges")), "{other_family:?}");
}
