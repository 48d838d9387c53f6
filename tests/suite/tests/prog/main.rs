//! The loaded programs on packets, without devices: packet in; packet, verdict and counters out. Needs root.
//!
//! Tests share nothing, so they run beside each other and beside other binaries.

mod budget;
mod flows;
mod forward;
mod fragments;
mod frontends;
mod icmp_errors;
mod malformed;
mod masquerade;
mod random;
mod sctp;
mod service_range;
mod services;
mod sockets;
mod summed_up;
mod too_big;
mod xdp;
