//! The CNI plugin, and the words it shares with the agent.
//!
//! A runtime starts the plugin once for every pod that comes or goes, so it is a thin, blocking client: read the
//! environment and stdin, ask the agent one question over its Unix socket, write the answer in the form of the CNI
//! version asked for. [`spec`] knows the CNI and no agent, [`protocol`] and [`client`] the agent and no CNI;
//! [`plugin`] joins them. Only DEL does without an agent: what it has to say is left for the next one ([`gone`]).
#![forbid(unsafe_code)]

pub mod client;
pub mod pending_deletes;
pub mod plugin;
pub mod protocol;
pub mod spec;
