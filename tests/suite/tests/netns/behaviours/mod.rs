//! What Kubernetes' own tests of its network ask for (`test/e2e/network`), on nodes with real agents, pods and sockets: a
//! test for each that no other of ours shows whole, under its name. `docs/behaviours.md` has the list of all.

mod affinity;
mod balancers;
mod bed;
mod conntrack;
mod endpoints;
mod host_network;
mod host_ports;
mod invalid_packets;
mod list;
mod live;
mod node_ports;
mod policies;
mod refusals;
mod terminating;
mod told;
mod topology;
mod traffic;
mod types;
