//! The loaded programs and their maps: the only place that knows aya.
//!
//! [`loader`] puts the object into the kernel, adopting what an earlier agent pinned ([`pins`]); [`attach`] hooks
//! programs to devices, [`cgroup`] to sockets; [`maps`] gives the reconciler its tables; [`events`], [`counters`] and [`mod@flows`]
//! read what the datapath writes. Nothing here knows a Kubernetes object or decides what an entry says.

pub mod attach;
pub mod cgroup;
pub mod counters;
pub mod events;
pub mod flows;
pub mod loader;
pub mod log;
pub mod maps;
pub mod pins;
pub mod table;
mod tc;
#[cfg(test)]
pub mod testing;
mod xdp;

pub use attach::{AttachError, Attachment, TcHooks, cleanup};
pub use cgroup::{CgroupError, default_cgroup};
pub use counters::{Count, Counters};
pub use events::{Events, PacketEvent};
pub use flows::{FlowRow, FlowsError, flows};
pub use loader::{Capacity, Datapath, DatapathConfig, LoadError, OBJECT, ProgramReport};
pub use log::EbpfLog;
pub use maps::{OpenError, Tables};
pub use pins::Pins;
pub use xdp::{XdpState, XdpUse};
