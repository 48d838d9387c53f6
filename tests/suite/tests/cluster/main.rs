//! Clusters whose nodes, agents, endpoints or API server are added, changed, stopped and restarted.
//! Needs root.
//!
//! Tests measure time: `cargo xtask test` runs them one at a time, with nothing in parallel.

mod api_outage;
mod churn;
mod nodes;
mod objects;
mod restart;
mod routing;
mod upgrade;
