//! The local API: one Unix socket, root only, that serves the CNI plugin and the CLI.

pub mod live;
pub mod query;
pub mod views;
