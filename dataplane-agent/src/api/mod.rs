//! The local API: one Unix socket, root only, that serves the CNI plugin and the CLI.
//!
//! [`server`] owns connections and limits, [`answer`] what a line means; [`instance`] the files in the run directory.
//! Those who know are behind seams: the task that owns the state publishes [`views::Status`] and answers [`query`]s,
//! the datapath is read through [`live`], and the verbs of the plugin go to [`cni`].

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
