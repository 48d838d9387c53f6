//! Clusters whose nodes, agents, endpoints or API server come and go. Needs root.
//!
//! Tests measure time: `cargo xtask test` runs one module after the other and nothing beside them.

mod away;
mod churn;
mod nodes;
mod objects;
mod restart;
mod upgrade;
