//! The local API: a Unix socket for root that serves the CNI plugin and the CLI.
//!
//! [`server`] owns connections and limits, [`answer`] the requests, [`instance`] the files in the
//! run directory. The data comes from others: the node task publishes [`views::Status`] and answers
//! each [`query`], [`datapath`] reads the eBPF maps, and [`cni`] passes the plugin's requests on.

pub mod answer;
pub mod cni;
pub mod datapath;
mod events;
mod history;
pub mod instance;
mod names;
pub mod pinned;
pub mod query;
pub mod request;
pub mod server;
pub mod views;
