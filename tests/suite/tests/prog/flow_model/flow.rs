//! A flow of the model.

use dataplane_common::abi::FlowFlags;

use super::{
    connection::{Connection, Side, Sign, Tuple, UDP},
    table::Hook,
};

/// What a flow is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To a backend of the service with this number, which may have been removed.
    Service {
        service: usize,
        is_removed: bool,
    },
    Masquerade,
    /// A client outside of the cluster addressed the pod.
    Inbound,
}

#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "the flags of a record")]
pub(crate) struct Flow {
    pub(crate) forward: Tuple,
    pub(crate) reply: Tuple,
    pub(crate) purpose: Purpose,
    /// Direct server return.
    pub(crate) is_direct: bool,
    pub(crate) is_source_translated: bool,
    pub(crate) from_outside: bool,
    /// The pod's last packet took the kernel's stack.
    pub(crate) via_stack: bool,
    pub(crate) connection: Connection,
    pub(crate) last_seen: u32,
    pub(crate) created: u32,
}

impl Flow {
    /// What a packet of one side leaves as.
    pub(crate) fn translated(&self, side: Side) -> Tuple {
        match side {
            Side::Client => self.reply.reversed(),
            Side::Server => self.forward.reversed(),
        }
    }

    fn is_service(&self) -> bool {
        matches!(self.purpose, Purpose::Service { .. })
    }

    /// Bits of [`FlowFlags`].
    pub(crate) fn flags(&self) -> u32 {
        let purpose = match self.purpose {
            Purpose::Service { .. } => FlowFlags::SERVICE,
            Purpose::Masquerade => 0,
            Purpose::Inbound => FlowFlags::INBOUND,
        };
        [
            (self.is_source_translated, FlowFlags::SOURCE),
            (self.is_direct, FlowFlags::DIRECT),
            (self.via_stack, FlowFlags::STACK),
            (self.from_outside, FlowFlags::OUTSIDE),
        ]
        .into_iter()
        .fold(purpose, |flags, (is_set, flag)| if is_set { flags | flag } else { flags })
    }

    /// Whether a hook translates its forward packets.
    pub(crate) fn is_translated_at(&self, hook: Hook) -> bool {
        if self.is_service() { hook.services } else { hook.masquerade }
    }

    /// Whether the client's packet begins another connection with the same ports, or, without
    /// connections, must get another backend.
    pub(crate) fn begins_anew(&self, sign: Sign) -> bool {
        let is_removed = matches!(self.purpose, Purpose::Service { is_removed: true, .. });
        let has_connections = ![UDP, 1, 58].contains(&self.forward.protocol);
        match sign {
            // nodes that disagree on the backend of a direct flow select it again
            Sign::Open => {
                is_removed || self.connection.is_ending() || self.is_direct && self.connection.is_half_open()
            }
            _ => is_removed && !has_connections,
        }
    }
}
