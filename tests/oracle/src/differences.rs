//! All intended differences from kube-proxy, with reasons.
//!
//! Most are about the source address that a backend sees. Eligible backends and rejections are
//! those of kube-proxy, except for a limit with SCTP.
//!
//! One difference is between versions of kube-proxy: a Service with the label
//! `service.kubernetes.io/headless` has no frontends here, as in kube-proxy up to 1.35. Since 1.36
//! kube-proxy ignores only its slices, and so rejects connections to its addresses.

use super::Protocol;

/// The rules that the expected verdicts follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the rules are independent of each other")]
pub struct Rules {
    /// A pod keeps its source address at all frontends of its own node. kube-proxy masquerades it
    /// at node ports, load balancer IPs and external IPs with policy Cluster. The datapath
    /// translates on the pod's node, and the reply returns there, so masquerading is not needed.
    /// Location another node's node port the pod is an outside client.
    pub keeps_pod_source: bool,
    /// An outside client keeps its source address towards backends on the node it came through,
    /// whose replies pass that node anyway. kube-proxy masquerades before it selects the backend.
    /// Backends on other nodes see the translating node, as their replies must return to it.
    pub keeps_outside_source_on_node: bool,
    /// The source address in a hairpin connection.
    pub hairpin_source: HairpinSource,
    /// A host process can use SCTP to reach its own node through a frontend: a node port or host
    /// port at an address of the node, or a host process behind a Service. In the datapath the
    /// first is not translated and the second is dropped (`host_loop`), as SCTP has no connect-time
    /// translation.
    pub sctp_from_host_to_own_node: bool,
    /// Host processes reach host ports at `::1`, too. The `portmap` plugin supports only 127.0.0.1,
    /// as the kernel does not route `::1`.
    pub host_ports_at_ipv6_loopback: bool,
}

/// The source address that a pod sees when it reaches itself through a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HairpinSource {
    /// The translating node: a kernel drops received packets with an own address as source.
    Node,
    /// The pod's own, if its own node translates at connect time: no packet leaves the pod.
    Pod,
}

impl Rules {
    pub const KUBE_PROXY: Self = Self {
        keeps_pod_source: false,
        keeps_outside_source_on_node: false,
        hairpin_source: HairpinSource::Node,
        sctp_from_host_to_own_node: true,
        host_ports_at_ipv6_loopback: false,
    };

    /// Not modelled: a host process is translated at connect time, so a backend sees the node
    /// address of a direct connection; kube-proxy masquerades it with the address of the output
    /// device. Both are equal on a node with one address per family.
    pub const DATAPATH: Self = Self {
        keeps_pod_source: true,
        keeps_outside_source_on_node: true,
        hairpin_source: HairpinSource::Node,
        sctp_from_host_to_own_node: false,
        host_ports_at_ipv6_loopback: true,
    };

    /// The datapath with connect-time translation.
    pub const DATAPATH_AT_CONNECT: Self = Self { hairpin_source: HairpinSource::Pod, ..Self::DATAPATH };

    /// Returns the hairpin source for a protocol; SCTP has no connect-time translation.
    pub(super) fn hairpin_source(self, protocol: Protocol) -> HairpinSource {
        if protocol == Protocol::Sctp { HairpinSource::Node } else { self.hairpin_source }
    }
}
