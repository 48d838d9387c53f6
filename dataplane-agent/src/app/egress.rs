//! The way of packets between pods and machines outside of the cluster: past the kernel's stack,
//! or through it, because it is configured or because IPsec policies apply to pods.
//!
//! The programs do not know IPsec policies. They are kept by the stack, for packets with a pod's
//! address that it forwards; so the other packets of pods that a policy covers are problems.

use std::net::IpAddr;

use ipnet::IpNet;

use super::datapath::log_new;
use crate::{
    api::views::EgressView,
    config::Egress,
    netlink::{IpsecPolicy, xfrm::Direction},
};

/// The way, and what IPsec policies of the node it cannot keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct EgressPlan {
    /// Packets take the kernel's stack.
    pub stack: bool,
    /// Why, if it is not configured.
    reason: Option<String>,
    pub problems: Vec<String>,
}

/// The addresses whose packets IPsec policies may cover.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses<'a> {
    /// Pod CIDRs of this node.
    pub own_pods: &'a [IpNet],
    /// Pod CIDRs of the other nodes.
    pub other_pods: &'a [IpNet],
    /// InternalIPs of all nodes.
    pub nodes: &'a [IpAddr],
    /// Sources of masqueraded packets; empty: none is masqueraded.
    pub masquerade: &'a [IpAddr],
}

impl EgressPlan {
    pub(super) fn new(configured: Egress, policies: &[IpsecPolicy], addresses: Addresses<'_>) -> Self {
        let of = |covers: fn(&IpsecPolicy, Addresses<'_>) -> bool| {
            list(policies.iter().filter(|policy| covers(policy, addresses)))
        };
        let outside = of(covers_pods_and_outside);
        let pods = of(covers_pods_of_both);
        let masqueraded = of(covers_masqueraded);
        let mut problems = Vec::new();
        problems.extend(pods.map(|policies| {
            format!(
                "packets to pods of other nodes do not take the IPsec policies that cover them: {policies}"
            )
        }));
        problems.extend(masqueraded.map(|policies| {
            format!(
                "masqueraded packets of pods do not take the IPsec policies of this node's address, but those of \
                 the pods' addresses: {policies}"
            )
        }));
        Self {
            stack: configured == Egress::Stack || outside.is_some(),
            reason: outside
                .filter(|_| configured == Egress::Direct)
                .map(|policies| format!("IPsec policies apply to pods: {policies}")),
            problems,
        }
    }

    /// Logs what differs from the plan before.
    pub(super) fn log(&self, before: &Self) {
        if (self.stack, &self.reason) != (before.stack, &before.reason) {
            let EgressView { way, reason } = self.view();
            tracing::info!(reason, "egress of pods to outside of the cluster: {way}");
        }
        log_new(&self.problems, &before.problems);
    }

    pub(super) fn view(&self) -> EgressView {
        EgressView {
            way: if self.stack { "stack" } else { "direct" }.to_owned(),
            reason: self.reason.clone().unwrap_or_default(),
        }
    }
}

/// Between pods of this node and machines outside of the cluster.
fn covers_pods_and_outside(policy: &IpsecPolicy, addresses: Addresses<'_>) -> bool {
    let (pod, peer) = ends(policy);
    overlaps(pod, addresses.own_pods) && !is_in_cluster(peer, addresses)
}

/// Between pods of this node and of others.
fn covers_pods_of_both(policy: &IpsecPolicy, addresses: Addresses<'_>) -> bool {
    let (pod, peer) = ends(policy);
    overlaps(pod, addresses.own_pods) && overlaps(peer, addresses.other_pods)
}

/// From this node's address to outside of the cluster.
fn covers_masqueraded(policy: &IpsecPolicy, addresses: Addresses<'_>) -> bool {
    policy.direction == Direction::Out
        && addresses.masquerade.iter().any(|source| policy.source.contains(source))
        && !addresses.own_pods.iter().any(|pods| policy.source.contains(pods))
        && !is_in_cluster(policy.destination, addresses)
}

/// The prefix of this node's pods, and that of their peers.
const fn ends(policy: &IpsecPolicy) -> (IpNet, IpNet) {
    match policy.direction {
        Direction::Out => (policy.source, policy.destination),
        Direction::Forward => (policy.destination, policy.source),
    }
}

fn overlaps(prefix: IpNet, others: &[IpNet]) -> bool {
    others.iter().any(|other| prefix.contains(other) || other.contains(&prefix))
}

/// Whether every address of the prefix is a pod's or a node's.
fn is_in_cluster(prefix: IpNet, addresses: Addresses<'_>) -> bool {
    let pods = addresses.own_pods.iter().chain(addresses.other_pods);
    let is_node = |node: &IpAddr| prefix == IpNet::from(*node);
    pods.into_iter().any(|pods| pods.contains(&prefix)) || addresses.nodes.iter().any(is_node)
}

/// The first policy, and how many there are.
fn list<'a>(mut policies: impl Iterator<Item = &'a IpsecPolicy>) -> Option<String> {
    let first = policies.next()?;
    Some(match policies.count() {
        0 => first.to_string(),
        more => format!("{first}, and {more} more"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(configured: Egress, policies: &[(Direction, &str, &str)]) -> EgressPlan {
        let prefix = |text: &str| text.parse::<IpNet>().unwrap();
        let policies: Vec<_> = policies
            .iter()
            .map(|(direction, source, destination)| IpsecPolicy {
                direction: *direction,
                source: prefix(source),
                destination: prefix(destination),
            })
            .collect();
        let addresses = Addresses {
            own_pods: &[prefix("10.244.1.0/24"), prefix("fd00:10:1::/64")],
            other_pods: &[prefix("10.244.2.0/24")],
            nodes: &["172.18.0.2".parse().unwrap(), "172.18.0.3".parse().unwrap()],
            masquerade: &["172.18.0.2".parse().unwrap()],
        };
        EgressPlan::new(configured, &policies, addresses)
    }

    const OFFICE: &str = "203.0.113.0/24";

    #[test]
    fn without_policies_the_way_is_the_configured_one() {
        for (configured, way) in [(Egress::Direct, "direct"), (Egress::Stack, "stack")] {
            let view = plan(configured, &[]).view();
            assert_eq!((view.way.as_str(), view.reason.as_str()), (way, ""));
        }
    }

    #[test]
    fn policy_of_pods_and_outside_takes_the_stack() {
        for (direction, source, destination) in [
            (Direction::Out, "10.244.1.0/24", OFFICE),
            (Direction::Out, "10.244.1.7/32", OFFICE),
            (Direction::Out, "10.244.0.0/16", OFFICE),
            (Direction::Out, "0.0.0.0/0", "0.0.0.0/0"),
            (Direction::Out, "fd00:10:1::/64", "2001:db8::/32"),
            (Direction::Forward, OFFICE, "10.244.1.0/24"),
        ] {
            let plan = plan(Egress::Direct, &[(direction, source, destination)]);
            assert!(plan.stack, "{direction:?} {source} {destination}");
            let reason = plan.view().reason;
            assert!(reason.contains(source) && reason.contains(destination), "{reason}");
        }
    }

    #[test]
    fn policy_of_others_changes_nothing() {
        for (direction, source, destination) in [
            (Direction::Out, "192.168.0.0/16", OFFICE),
            (Direction::Out, "10.244.2.0/24", OFFICE),
            (Direction::Forward, "10.244.1.0/24", OFFICE),
            // between nodes, as for an encrypted tunnel
            (Direction::Out, "172.18.0.2/32", "172.18.0.3/32"),
        ] {
            let plan = plan(Egress::Direct, &[(direction, source, destination)]);
            assert_eq!(plan, EgressPlan::default(), "{direction:?} {source} {destination}");
        }
    }

    #[test]
    fn what_the_stack_does_not_keep_is_a_problem() {
        let pods = plan(Egress::Direct, &[(Direction::Out, "10.244.1.0/24", "10.244.2.0/24")]);
        assert!(!pods.stack);
        assert!(pods.problems[0].starts_with("packets to pods of other nodes"), "{:?}", pods.problems);
        let host = plan(Egress::Stack, &[(Direction::Out, "172.18.0.2/32", OFFICE)]);
        assert!(host.problems[0].starts_with("masqueraded packets"), "{:?}", host.problems);
        let both = plan(Egress::Direct, &[(Direction::Out, "10.244.0.0/16", "0.0.0.0/0")]);
        assert!(both.stack && both.problems.len() == 1, "{both:?}");
    }

    #[test]
    fn reason_names_one_policy_of_many() {
        let policies =
            [(Direction::Out, "10.244.1.0/24", OFFICE), (Direction::Forward, OFFICE, "10.244.1.0/24")];
        let reason = plan(Egress::Direct, &policies).view().reason;
        assert!(reason.ends_with("dir out, and 1 more"), "{reason}");
    }
}
