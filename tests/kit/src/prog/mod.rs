//! Runs loaded programs on packets without a device (`BPF_PROG_TEST_RUN`): packet in; packet,
//! verdict and counters out.
//!
//! [`Rig`] is a separate datapath: no pins, small maps, nothing attached. [`frame`] builds packets
//! and parses them, with a check of every checksum.

pub mod frame;
mod rig;
mod uplink;
mod world;

pub(crate) use frame::pseudo_sum;
pub use frame::{Frame, HOST_MAC, OVERLAY_MAC, Parsed};
pub use rig::race::stay_on_one_cpu;
pub use rig::{
    Action, FLOWS, MARK, Metadata, OVERLAY_NODE, OVERLAY_VNI, Rig, Run, SocketPrograms, devices, node_config,
    per_packet_udp,
};
pub use uplink::{GATEWAY_MAC, NODE_MAC, ip, uplink};
pub use world::{Family, OTHER_POD_MAC, POD_MAC, World, at, rig, rig_with};
