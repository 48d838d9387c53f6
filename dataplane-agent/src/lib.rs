//! The agent of a node.
//!
//! Data flow: [`source`] → [`state`] (one writer, plain types) → [`compile`] (pure: state → desired
//! rows) → [`reconcile`] (desired against actual rows) → [`datapath`] tables. `aya::` is used only
//! under `datapath/`, `rtnetlink::` only under `netlink/`, Kubernetes types only by clients of the
//! API server: `source/`, `cluster/`, `lifecycle/`, `allocate/` and `event_recorder.rs`.
#![forbid(unsafe_code)]

pub mod allocate;
pub mod api;
pub mod app;
pub mod cli;
pub mod cluster;
pub mod cni;
pub mod compile;
pub mod config;
pub mod datapath;
pub mod event_recorder;
pub mod health;
pub mod http;
pub mod lifecycle;
pub mod metrics;
pub mod netlink;
pub mod panics;
pub mod reconcile;
pub mod source;
pub mod state;
pub mod telemetry;
