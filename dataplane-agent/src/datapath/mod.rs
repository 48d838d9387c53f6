//! The eBPF programs and maps: the only module that uses aya.
//!
//! [`loader`] loads the object ([`programs`]) and adopts maps that an earlier agent pinned
//! ([`pins`]); [`attach`] attaches programs to devices, [`cgroup`] to sockets; [`maps`] are the
//! reconciler's tables; [`events`], [`counters`] and [`mod@flows`] read what the datapath writes.
//! Nothing here knows Kubernetes objects or the meaning of entries.

pub mod attach;
pub mod capacity;
pub mod cgroup;
pub mod counters;
pub mod events;
pub mod flows;
mod generation;
pub mod kernel_features;
pub mod loader;
pub mod log;
pub mod maps;
pub mod pins;
pub mod ports;
pub mod programs;
pub mod table;
mod tc;
#[cfg(test)]
pub mod testing;
mod xdp;

pub use attach::{AttachError, Attachment, TcHooks, cleanup};
pub use capacity::Capacity;
pub use cgroup::{CgroupError, default_cgroup};
pub use counters::{Count, Counters};
pub use events::{Events, PacketEvent};
pub use flows::{FlowRow, FlowsError, flows};
pub use generation::ForwardingGeneration;
pub use loader::{Datapath, DatapathConfig, LoadError, OBJECT, ProgramReport};
pub use log::EbpfLog;
pub use maps::{OpenError, Tables};
pub use pins::Pins;
pub use xdp::{XdpState, XdpUse};
