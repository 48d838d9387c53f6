//! Queries of the API to the node task.
//!
//! [`super::views::Status`] is published at every change. Lists grow with the cluster, so the node
//! task makes them only on request.

use tokio::sync::oneshot;

use super::views::{EndpointView, RouteView, ServiceView};

/// A query to the node task, with the channel for its answer. A dropped channel means that the
/// agent is stopping.
#[derive(Debug)]
pub enum Query {
    /// Liveness check.
    Ping(oneshot::Sender<()>),
    /// Every service port in the tables.
    Services(oneshot::Sender<Vec<ServiceView>>),
    /// Every address of this node in the tables.
    Endpoints(oneshot::Sender<Vec<EndpointView>>),
    /// Every prefix in the tables.
    Routes(oneshot::Sender<Vec<RouteView>>),
}
