//! The benchmark: compares the datapath with kube-proxy's rules and with the limit of the kernel,
//! in one interleaved run. Only ratios within one run are comparable.
//!
//! - [`load`] generates traffic between the client and server of a [`path`], [`forward`] traffic
//!   through a node, [`program`] runs of one program; a [`workload`] is one of them.
//! - [`dataplane`], [`baselines`] (with [`rules`]) and [`empty`] create the compared clusters,
//!   [`outside`] servers beside them, [`testbed`] all.
//! - [`plan`] defines the rows, [`measure`] runs them in random order, [`stats`] computes ratios
//!   with confidence intervals, [`report`] and [`markdown`] format them,
//!   [`plots`] draws them.
//! - [`scale`] is separate: it measures one agent in a large cluster.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "counts and positive ratios, small enough to be exact in a float"
)]

pub mod baselines;
mod bpf;
pub mod dataplane;
pub mod empty;
pub mod forward;
pub mod load;
pub mod machine;
pub mod markdown;
pub mod measure;
pub mod network;
pub mod outside;
pub mod path;
pub mod plan;
pub mod plots;
pub mod program;
pub mod report;
pub mod rules;
pub mod scale;
pub mod services;
pub mod stats;
pub mod testbed;
pub mod workload;
