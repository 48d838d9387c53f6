//! Where we mean to differ from kube-proxy, each with its reason; all of them in one place.
//!
//! Most are about the address a backend sees. Who may answer, and who is refused, is kube-proxy's to say, but where a protocol
//! sets us a limit.
//!
//! One more is no rule of ours but of versions: a Service labelled `service.kubernetes.io/headless` has no frontends here, as
//! in every kube-proxy up to 1.35. From 1.36 on kube-proxy leaves out its slices only, and so refuses at its addresses.

use super::Protocol;

/// Which answers to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a rule of its own: that another holds says nothing of it"
)]
pub struct Rules {
    /// A pod is seen under its own address wherever it asks on its node. kube-proxy masquerades it at `NodePort`, load
    /// balancer and external addresses of policy Cluster. We translate where the pod is, and the answer comes back there:
    /// there is no need to. To another node's `NodePort` it is somebody from outside.
    pub pods_keep_their_source: bool,
    /// Whoever asks from outside is seen under its own address by backends on the node it came through. kube-proxy
    /// masquerades before it knows which backend it will be. Answers of those backends pass the node in any case. Backends
    /// elsewhere must see the node that translated, or their answers would miss it.
    pub outside_keeps_its_source_on_the_node: bool,
    /// Whom a pod sees that reaches itself.
    pub itself: Itself,
    /// A process of a node reaches over SCTP what leads back to its own node: a node port or host port at an address of the
    /// node, another process behind a service. Of ours the first never leaves the kernel, and the second is dropped
    /// (`host_loop`): sockets of SCTP cannot be translated.
    pub sctp_leads_back_to_its_own_host: bool,
    /// A port of the node that is a pod's is at `::1` too, for processes of the node. The `portmap` plugin knows 127.0.0.1 only:
    /// the kernel routes no other loopback address.
    pub host_ports_are_at_ipv6_loopback: bool,
}

/// Whom a pod sees that reaches itself through a service. Nobody takes packets from the network that claim to be its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Itself {
    /// The node that translates: its own, or the one whose `NodePort` it asked.
    Node,
    /// Itself, where its own node translates: its socket was translated when it connected, and nothing leaves the pod.
    Pod,
}

impl Rules {
    pub const KUBE_PROXY: Self = Self {
        pods_keep_their_source: false,
        outside_keeps_its_source_on_the_node: false,
        itself: Itself::Node,
        sctp_leads_back_to_its_own_host: true,
        host_ports_are_at_ipv6_loopback: false,
    };

    /// Beside these: a host process is translated when it connects, so a backend sees the address its node has without
    /// any service. kube-proxy masquerades it behind the device it leaves by. On a node with one address per family that is
    /// the same, and the oracle knows no other.
    pub const OURS: Self = Self {
        pods_keep_their_source: true,
        outside_keeps_its_source_on_the_node: true,
        itself: Itself::Node,
        sctp_leads_back_to_its_own_host: false,
        host_ports_are_at_ipv6_loopback: true,
    };

    /// Ours, where sockets are translated when they connect.
    pub const OURS_AT_CONNECT: Self = Self { itself: Itself::Pod, ..Self::OURS };

    /// Sockets of SCTP are never translated.
    pub(super) fn itself(self, protocol: Protocol) -> Itself {
        if protocol == Protocol::Sctp { Itself::Node } else { self.itself }
    }
}
