//! Tests of the agent's modules with the kernel, the file system and sockets. Tests that need root
//! are skipped without it, and print that.

mod api;
mod datapath;
mod manifests;
mod netlink;
mod netns;
mod reconcile;
mod uplinks;
