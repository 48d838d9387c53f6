//! The agent's modules against the kernel, the file system and sockets. Tests that need root say so and are skipped without.

mod api;
mod datapath;
mod manifests;
mod netlink;
mod netns;
mod reconcile;
