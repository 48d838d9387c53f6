//! Clusters of network namespaces: what traffic of pods, nodes and clients outside becomes. Needs root.
//!
//! Tests measure time: `cargo xtask test` runs one module after the other and nothing beside them.

mod behaviours;
mod changes;
mod frontends;
mod host_ports;
mod lab;
mod outside;
mod path_table;
mod pod_wishes;
mod pods;
mod services;
mod udp;
