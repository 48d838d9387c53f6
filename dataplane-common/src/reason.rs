//! Outcomes of a packet: verdicts and drop reasons, in one space of numbers.
//!
//! The number indexes the counters and stands in the event; the name labels the metric. Operators
//! see names and numbers, so they stay: a retired number is not used again.

/// Declares a fieldless enum with a number, a name and a sentence for each variant.
macro_rules! numbered {
    (
        $(#[$meta:meta])*
        pub enum $name:ident { $( $variant:ident = $number:literal, $label:literal, $text:literal; )+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $( #[doc = $text] $variant = $number ),+ }

        impl $name {
            /// Every variant, by number.
            pub const ALL: &[Self] = &[$( Self::$variant ),+];

            /// Its number.
            #[inline(always)]
            pub const fn number(self) -> u8 {
                self as u8
            }

            /// Its name in metrics, events and tables.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $label ),+ }
            }

            /// Its meaning, in one sentence.
            pub const fn text(self) -> &'static str {
                match self { $( Self::$variant => $text ),+ }
            }

            /// The variant with this number.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $( $number => Some(Self::$variant), )+ _ => None }
            }
        }
    };
}

numbered! {
    /// The packet goes on.
    #[must_use]
    pub enum Verdict {
        ToPod = 1, "to_pod", "Delivered to a pod on this node.";
        ToWire = 2, "to_wire", "Forwarded to another node through the uplink, bypassing the host's network stack.";
        ToOverlay = 3, "to_overlay", "Forwarded to another node through the VXLAN tunnel.";
        StackHost = 4, "stack_host", "Addressed to this node: passed to the host's network stack.";
        StackOutside = 5, "stack_outside", "Leaves the cluster: passed to the host's network stack, which routes it.";
        StackNotIp = 6, "stack_not_ip", "Not IP (ARP, LLDP): passed to the kernel.";
        StackTtlExpired = 8, "stack_ttl_expired", "TTL or hop limit expired: passed to the kernel, which sends the ICMP error.";
        StackLinkLocal = 9, "stack_link_local", "Link-local, loopback or multicast (neighbour discovery): passed to the kernel.";
        StackUnmanaged = 10, "stack_unmanaged", "Neither source nor destination belongs to the pod network: passed to the kernel.";
        StackTooBig = 11, "stack_too_big", "Larger than the MTU of its route: passed to the kernel, which sends the ICMP error.";
        Forwarded = 12, "forwarded", "Already handled by another program of this datapath: passed on unchanged.";
        Masqueraded = 13, "masqueraded", "From a pod to outside of the cluster: source translated to the node's address.";
        Delivered = 14, "delivered", "From the host's network stack or a pod, by the kernel's routes: passed on unchanged.";
        Restored = 15, "restored", "Reply of a host process that was reached through a service: source translated back to the frontend.";
        SocketTranslated = 16, "socket_translated", "A socket that named a service's frontend was given a backend.";
        SocketRestored = 17, "socket_restored", "A socket was shown the service's frontend in place of its backend.";
        SocketUntouched = 18, "socket_untouched", "The socket's address needs no translation: left unchanged.";
        ToOutside = 19, "to_outside", "Forwarded out of the cluster by the kernel's routing tables, bypassing the host's network stack.";
        LeftToTc = 20, "left_to_tc", "Not handled by XDP: passed on to tc.";
        FragmentHeld = 21, "fragment_held", "A fragment that arrived before the first one, which has the ports: buffered until that arrives.";
        FragmentAgain = 22, "fragment_again", "A first fragment, or one that arrived before it: re-injected in order.";
        StackOtherHost = 23, "stack_other_host", "The frame is addressed to another link address: passed to the kernel, which drops it.";
        StackVlan = 24, "stack_vlan", "The frame has a VLAN tag: passed to the kernel, which hands it to the VLAN device.";
        NeighbourAnswered = 25, "neighbour_answered", "An ARP request or neighbour solicitation of a pod for its gateway: answered.";
        NeighbourIgnored = 26, "neighbour_ignored", "ARP, neighbour discovery or a group report of a pod that needs no answer: discarded, because a pod's neighbours are fixed.";
        EchoAnswered = 27, "echo_answered", "A ping to a service address with a ready backend: answered.";
        StackPod = 28, "stack_pod", "From outside of the cluster to a pod whose own packets take the kernel's stack: passed to the kernel, which delivers it.";
    }
}

numbered! {
    /// The packet is dropped.
    pub enum DropReason {
        Truncated = 64, "truncated", "The packet is shorter than its headers say.";
        BadHeader = 65, "bad_header", "The IP header is invalid (version or length).";
        NoBackend = 66, "no_backend", "The service has no ready endpoint: rejected with ICMP port unreachable.";
        FlowTableFull = 67, "flow_table_full", "No slot for a new flow: every slot that was examined is in use.";
        PortsExhausted = 68, "ports_exhausted", "No free source port for translation to this destination.";
        NoEndpoint = 69, "no_endpoint", "An address of this node's pod CIDR that no pod has, or of an unknown node in the tunnel.";
        FragmentUnknown = 70, "fragment_unknown", "A fragment whose first fragment was not seen, and that could not be buffered: its ports are unknown.";
        ExtensionHeaders = 71, "extension_headers", "Too many or too long IPv6 extension headers.";
        WriteFailed = 72, "write_failed", "The kernel refused to change the packet.";
        TunnelFailed = 73, "tunnel_failed", "The kernel refused to set the tunnel key.";
        ServiceProtocol = 74, "service_protocol", "To a cluster IP, with a protocol that no service has (a ping).";
        BadRoute = 75, "bad_route", "The row in ROUTES is of an unknown kind, or the kernel refused to redirect the packet.";
        NoSourceAddress = 76, "no_source_address", "The node has no address of this IP family to translate the source to.";
        BadService = 77, "bad_service", "The row in SERVICES is corrupt, or points to a backend slot that does not exist.";
        HostLoop = 79, "host_loop", "A host process connected to its own node through a service, and was not translated at connection time.";
        NoLocalBackend = 80, "no_local_backend", "The service's traffic policy is Local, and this node has no ready endpoint of it.";
        SourceRange = 81, "source_range", "The client is not in the service's loadBalancerSourceRanges.";
        NoPort = 82, "no_port", "A cluster IP whose service does not have this port: rejected with ICMP port unreachable.";
        FragmentChecksum = 83, "fragment_checksum", "A fragmented SCTP packet whose ports must change: its checksum covers the other fragments.";
        NoService = 84, "no_service", "An address of the service CIDR that no service has.";
        TooBig = 85, "too_big", "Translated, and larger than the path MTU: rejected with ICMP fragmentation needed or packet too big.";
        FragmentOvertaken = 86, "fragment_overtaken", "A buffered fragment was lost before it could be re-injected behind the first one.";
        SourceNotOwned = 87, "source_not_owned", "A pod sent a packet from an address that is not its own.";
        SourceIsLocal = 88, "source_is_local", "A packet from another machine has an address of this node or of one of its pods as its source.";
        LoopbackAddress = 89, "loopback_address", "A packet from a pod or another machine has a loopback address as its source or destination.";
        MappedAddress = 90, "mapped_address", "An IPv6 packet has an IPv4-mapped address as its source or destination.";
        TunnelSource = 91, "tunnel_source", "A packet from the tunnel with another VNI, from an address that no node has, or with a source that does not belong to the node that sent it.";
        TunnelPort = 92, "tunnel_port", "A packet of a pod or a client to the tunnel port of a node, or one that would leave for such a port with the node's address.";
        VlanTag = 93, "vlan_tag", "A frame from a pod or from the tunnel has a VLAN tag.";
        ConfiguresOthers = 94, "configures_others", "A pod sent a router advertisement, a redirect or a DHCP answer.";
        DeviceDown = 95, "device_down", "The device of the pod is down, at the host's side or at the pod's.";
        TtlExpired = 96, "ttl_expired", "A translated packet from another machine whose TTL or hop limit expires here: rejected with ICMP time exceeded.";
    }
}

numbered! {
    /// An attach point. Directions are seen from the host.
    pub enum HookId {
        FromPod = 0, "from_pod", "tc ingress of a pod's host-side device.";
        ToPod = 1, "to_pod", "tc egress of a pod's host-side device.";
        FromWire = 2, "from_wire", "tc ingress of an uplink.";
        ToWire = 3, "to_wire", "tc egress of an uplink.";
        FromOverlay = 4, "from_overlay", "tc ingress of the overlay device.";
        ToOverlay = 5, "to_overlay", "tc egress of the overlay device.";
        Connect = 6, "connect", "cgroup connect4 and connect6.";
        Sendmsg = 7, "sendmsg", "cgroup sendmsg4 and sendmsg6.";
        Recvmsg = 8, "recvmsg", "cgroup recvmsg4 and recvmsg6.";
        Getpeername = 9, "getpeername", "cgroup getpeername4 and getpeername6.";
        XdpWire = 10, "xdp_wire", "XDP of an uplink, before tc ingress.";
    }
}

/// Outcomes of one hook: verdicts have numbers below 64, drop reasons from 64 on.
pub const OUTCOMES: u32 = 128;
/// Entries of `COUNTERS`.
pub const COUNTERS: u32 = 11 * OUTCOMES;

/// Index into `COUNTERS` of the packets of `hook` with this `outcome` (number of a verdict or drop
/// reason).
#[inline(always)]
pub const fn counter_index(hook: HookId, outcome: u8) -> u32 {
    hook as u32 * OUTCOMES + outcome as u32 % OUTCOMES
}

/// A verdict or a drop reason, read back from its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The packet went on.
    Passed(Verdict),
    /// The packet was dropped.
    Dropped(DropReason),
}

impl Outcome {
    /// The outcome with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        if let Some(verdict) = Verdict::from_number(number) {
            return Some(Self::Passed(verdict));
        }
        match DropReason::from_number(number) {
            Some(reason) => Some(Self::Dropped(reason)),
            None => None,
        }
    }

    /// Its name in metrics, events and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed(verdict) => verdict.name(),
            Self::Dropped(reason) => reason.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_below_64_and_drop_reasons_above() {
        assert!(Verdict::ALL.iter().all(|verdict| verdict.number() > 0 && verdict.number() < 64));
        assert!(DropReason::ALL.iter().all(|reason| reason.number() >= 64 && reason.number() < 128));
        assert_eq!(HookId::ALL.len() as u32 * OUTCOMES, COUNTERS);
    }

    #[test]
    fn every_number_converts_back_to_its_outcome() {
        for verdict in Verdict::ALL {
            assert_eq!(Outcome::from_number(verdict.number()), Some(Outcome::Passed(*verdict)));
        }
        for reason in DropReason::ALL {
            assert_eq!(Outcome::from_number(reason.number()), Some(Outcome::Dropped(*reason)));
        }
        assert_eq!(Outcome::from_number(0), None);
    }

    #[test]
    fn counter_indices_are_unique() {
        let mut seen = std::collections::HashSet::new();
        for hook in HookId::ALL {
            for outcome in 0..128 {
                assert!(seen.insert(counter_index(*hook, outcome)));
            }
        }
    }
}
