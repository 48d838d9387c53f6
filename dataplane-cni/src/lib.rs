//! The CNI plugin, and the protocol between plugin and agent.
//!
//! A runtime runs the plugin for every ADD and DEL of a pod, so it is a small, blocking client: it
//! reads the environment and stdin, sends one request to the agent over a Unix socket, and writes
//! the result in the requested CNI version. [`spec`] implements CNI and knows nothing of the agent;
//! [`protocol`] and [`client`] know the agent and nothing of CNI; [`plugin`] connects them. Only
//! DEL works without an agent: it queues the deletion ([`pending_deletes`]).
#![forbid(unsafe_code)]

pub mod client;
pub mod pending_deletes;
pub mod plugin;
pub mod protocol;
pub mod spec;
