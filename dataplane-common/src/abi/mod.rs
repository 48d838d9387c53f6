//! Map keys and values. One file per map family.

mod addr;
mod allowed_source;
mod config;
mod device;
mod endpoint;
mod event;
mod flow;
mod flow_hints;
mod fragment;
pub mod names;
mod next_hop;
mod pod_source;
mod port_set;
mod route;
mod service;
mod socket;

pub use addr::{Addr, MacAddr, Port};
pub use allowed_source::AllowedSource;
pub use config::{ClusterRange, NodeConfig, NodeFlags, NodeVariables};
pub use device::{Device, DeviceFlags};
pub use endpoint::{Endpoint, EndpointFlags};
pub use event::Event;
pub use flow::{Flow, FlowBlock, FlowFlags, FlowKey, FlowRef};
pub use flow_hints::FlowHints;
pub use fragment::{FRAGMENT_TIMEOUT_SECS, FragmentKey, FragmentedPacket, ReorderKey};
pub use next_hop::CachedNextHop;
pub use pod_source::PodSource;
pub use port_set::{PortPlace, PortSet};
pub use route::{Route, RouteKind};
pub use service::{
    Affinity, AffinityKey, BackendSlot, Scope, Service, ServiceFlags, ServiceKey, SourceRange,
};
pub use socket::{ConnectedPeer, OriginKey, SocketOrigin};

/// Declares a type that user space and the datapath exchange through a map.
///
/// Emits `#[repr(C)]`, the derives a key needs, an assertion that the size is the stated one *and*
/// the sum of the fields (no implicit padding), and `aya::Pod` for user space. Fields must be
/// integers, arrays of integers or other `abi!` types: every bit pattern must be a valid value,
/// because a map may hold any bytes.
#[macro_export]
macro_rules! abi {
    ($(
        $(#[$meta:meta])*
        pub struct $name:ident: $size:literal {
            $( $(#[$field_meta:meta])* $vis:vis $field:ident: $ty:ty ),+ $(,)?
        }
    )+) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name { $( $(#[$field_meta])* $vis $field: $ty ),+ }

        const _: () = assert!(size_of::<$name>() == $size, "size differs from the stated one");
        const _: () = assert!(size_of::<$name>() == 0 $( + size_of::<$ty>() )+, "implicit padding");

        #[cfg(feature = "user")]
        impl $name {
            /// The value in these bytes (of a ring buffer record); `None` if there are too few.
            pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
                let bytes = bytes.get(..size_of::<Self>())?;
                // SAFETY: `bytes` is exactly as long as the type, the read is unaligned, and every
                // bit pattern is a valid value (the rule of this macro).
                Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
            }
        }

        // SAFETY: repr(C), no padding (asserted above), and only fields for which every bit pattern
        // is valid (the rule of this macro), so that the value may be read from and written to a
        // map as plain bytes.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    )+ };
}
