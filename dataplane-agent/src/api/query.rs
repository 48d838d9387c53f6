//! What the API asks the task that owns the state.
//!
//! [`super::views::Status`] is published; lists grow with the cluster, so they are made when somebody asks and not at
//! every change: the task that owns the state receives a [`Query`] and answers.

use tokio::sync::oneshot;

use super::views::{EndpointView, RouteView, ServiceView};

/// Asked of the task that owns the state, which answers into the channel. Dropping it unanswered is an answer too:
/// the asker is told that the agent is stopping.
#[derive(Debug)]
pub enum Query {
    /// Are you alive?
    Ping(oneshot::Sender<()>),
    /// Every service port that is in the tables.
    Services(oneshot::Sender<Vec<ServiceView>>),
    /// Every address of this node that is in the tables.
    Endpoints(oneshot::Sender<Vec<EndpointView>>),
    /// Every prefix that is in the tables.
    Routes(oneshot::Sender<Vec<RouteView>>),
}
