//! Traffic of pods, nodes and external clients in clusters of network namespaces. Needs root.
//!
//! The tests measure time: `cargo xtask test` runs one module after the other, and no other tests
//! at the same time.

mod attacks;
mod behaviours;
mod changes;
mod devices;
mod egress;
mod events;
mod frontends;
mod host_ports;
mod host_routes;
mod l3_devices;
mod lab;
mod masquerade;
mod path_table;
mod pod_annotations;
mod pods;
mod services;
mod udp;
