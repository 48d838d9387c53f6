//! What became of a packet: one number space for verdicts and drop reasons.
//!
//! The number indexes the counters, tags the event and, through its name, labels the metric: one list, nothing to keep
//! in step. Numbers are never re-used; a retired one stays as a gap.

/// Declares a fieldless enum with explicit numbers, a name and a sentence for each.
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
            /// Every one of them, by number.
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

            /// What it means, in a sentence.
            pub const fn text(self) -> &'static str {
                match self { $( Self::$variant => $text ),+ }
            }

            /// The one with this number.
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
        ToPod = 1, "to_pod", "Delivered into a pod of this node.";
        ToWire = 2, "to_wire", "Sent to another node through the uplink, past the host's stack.";
        ToOverlay = 3, "to_overlay", "Sent to another node through the overlay.";
        StackHost = 4, "stack_host", "Addressed to this node: given to the host's stack.";
        StackOutside = 5, "stack_outside", "Leaves the cluster: given to the kernel's routes.";
        StackNotIp = 6, "stack_not_ip", "Neither IPv4 nor IPv6 (ARP, LLDP): given to the kernel.";
        StackTtlExpired = 8, "stack_ttl_expired", "Hop limit reached: given to the kernel, which answers.";
        StackLinkLocal = 9, "stack_link_local", "Of one link or host, or of a group (neighbour discovery, multicast): given to the kernel.";
        StackUnmanaged = 10, "stack_unmanaged", "Neither end is ours: left to the kernel.";
        StackTooBig = 11, "stack_too_big", "Larger than the path takes: given to the kernel, which answers.";
        Forwarded = 12, "forwarded", "Already decided by another program of ours: passed on.";
        Masqueraded = 13, "masqueraded", "Source rewritten to the node's address, sent out.";
        Delivered = 14, "delivered", "From the host's stack to the pod or the wire, unchanged.";
        Restored = 15, "restored", "From the host's stack, a service's reply restored to its frontend.";
        SocketTranslated = 16, "socket_translated", "Socket connected to a backend in place of a service.";
        SocketRestored = 17, "socket_restored", "Socket shown the service in place of the backend.";
        SocketUntouched = 18, "socket_untouched", "Socket address is no service: left alone.";
        ToOutside = 19, "to_outside", "Sent out of the cluster by the kernel's routes, past the host's stack.";
        LeftToTc = 20, "left_to_tc", "Nothing to be done in the driver: goes on to tc.";
        FragmentHeld = 21, "fragment_held", "A fragment that came before its first, whose ports it needs: held until that comes.";
        FragmentAgain = 22, "fragment_again", "A first fragment that others came before, or one of those: begins anew, in order.";
    }
}

numbered! {
    /// The packet ends here.
    pub enum DropReason {
        Truncated = 64, "truncated", "Shorter than its headers say.";
        BadHeader = 65, "bad_header", "A header contradicts itself (version, length).";
        NoBackend = 66, "no_backend", "The service has no backend anywhere: refused (ICMP port unreachable).";
        FlowTableFull = 67, "flow_table_full", "No slot for a new flow: all examined ones are in use.";
        PortsExhausted = 68, "ports_exhausted", "No free source port for this destination.";
        NoEndpoint = 69, "no_endpoint", "An address of this node's pod CIDR that no pod has.";
        FragmentUnknown = 70, "fragment_unknown", "A fragment whose first was not seen, and that cannot be held: its ports are unknown.";
        ExtensionHeaders = 71, "extension_headers", "Too many IPv6 extension headers, or one that cannot be skipped.";
        WriteFailed = 72, "write_failed", "The kernel refused to change the packet.";
        TunnelFailed = 73, "tunnel_failed", "The kernel refused the tunnel key.";
        ServiceProtocol = 74, "service_protocol", "To a cluster IP, with a protocol that no service has (a ping).";
        BadRoute = 75, "bad_route", "The route is of a kind this program does not know.";
        NoSourceAddress = 76, "no_source_address", "The node has no address of this family to translate to.";
        BadService = 77, "bad_service", "The row of the service is broken, or points at a backend slot that does not exist.";
        HostLoop = 79, "host_loop", "A host process reached its own node through a service without connect-time translation.";
        NoLocalBackend = 80, "no_local_backend", "The service's policy is Local, and no backend is on this node.";
        SourceRange = 81, "source_range", "The client is not in the service's loadBalancerSourceRanges.";
        NoPort = 82, "no_port", "A cluster IP, but its service has no such port: refused (ICMP port unreachable).";
        FragmentChecksum = 83, "fragment_checksum", "An SCTP packet in fragments whose ports must change: its checksum covers what is not here.";
        NoService = 84, "no_service", "An address of the service range that no service has.";
        TooBig = 85, "too_big", "Translated, and larger than its path takes: its sender is told (ICMP packet too big).";
        FragmentOvertaken = 86, "fragment_overtaken", "A fragment that was held is gone before it could follow its first.";
    }
}

numbered! {
    /// Where a program is attached. Direction as seen from the host.
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
        XdpWire = 10, "xdp_wire", "XDP of an uplink, before tc.";
    }
}

/// Numbers of outcomes a hook can count: verdicts below 64, drop reasons from there.
pub const OUTCOMES: u32 = 128;
/// Entries of `COUNTERS`.
pub const COUNTERS: u32 = 11 * OUTCOMES;

/// Where `COUNTERS` keeps the packets of `hook` that ended as `outcome` (a verdict's or a drop reason's number).
#[inline(always)]
pub const fn counter_index(hook: HookId, outcome: u8) -> u32 {
    hook as u32 * OUTCOMES + outcome as u32 % OUTCOMES
}

/// Either of the two, as read back from a number.
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
    fn numbers_stay_in_their_halves() {
        assert!(Verdict::ALL.iter().all(|verdict| verdict.number() > 0 && verdict.number() < 64));
        assert!(DropReason::ALL.iter().all(|reason| reason.number() >= 64 && reason.number() < 128));
        assert_eq!(HookId::ALL.len() as u32 * OUTCOMES, COUNTERS);
    }

    #[test]
    fn every_number_reads_back() {
        for verdict in Verdict::ALL {
            assert_eq!(Outcome::from_number(verdict.number()), Some(Outcome::Passed(*verdict)));
        }
        for reason in DropReason::ALL {
            assert_eq!(Outcome::from_number(reason.number()), Some(Outcome::Dropped(*reason)));
        }
        assert_eq!(Outcome::from_number(0), None);
    }

    #[test]
    fn no_two_counters_share_a_place() {
        let mut seen = std::collections::HashSet::new();
        for hook in HookId::ALL {
            for outcome in 0..128 {
                assert!(seen.insert(counter_index(*hook, outcome)));
            }
        }
    }
}
