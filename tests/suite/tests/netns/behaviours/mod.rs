//! The behaviours of Kubernetes' network tests (`test/e2e/network`), on nodes with real agents,
//! pods and sockets. Each behaviour that no other test covers completely has a test here with the
//! upstream name. `docs/behaviours.md` lists all of them.

mod affinity;
mod conntrack;
mod endpoints;
mod host_network;
mod host_ports;
mod invalid_packets;
mod list;
mod load_balancers;
mod node_ports;
mod policies;
mod refusals;
mod service_fixture;
mod terminating;
mod testbed;
mod topology;
mod traffic;
mod types;
mod updates;
