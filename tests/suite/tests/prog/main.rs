//! Runs the loaded programs on packets, without devices: packet in; packet, verdict and counters
//! out. Needs root.
//!
//! Tests share nothing and run in parallel.

mod budget;
mod checksum_complete;
mod connect_time;
mod egress;
mod flow_model;
mod flow_races;
mod flow_states;
mod flow_table;
mod flows;
mod forward;
mod fragments;
mod frontends;
mod host_ports;
mod icmp_errors;
mod malformed;
mod marks;
mod masquerade;
mod neighbours;
mod next_hops;
mod ping;
mod random;
mod replies;
mod sctp;
mod service_range;
mod services;
mod sockets;
mod spoofing;
mod stack;
mod too_big;
mod xdp;
