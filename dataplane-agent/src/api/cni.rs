//! The seam to the CNI server: the verbs of the plugin, handed over as they came.

use std::fmt;

use futures::future::BoxFuture;
use serde_json::Value;

use super::views::IpamView;
use crate::metrics::RequestResult;

/// Who answers the plugin and hands out addresses.
pub trait CniServer: fmt::Debug + Send + Sync {
    /// Answers a request of `dataplane_cni::protocol`. Never fails: a failure is an answer.
    fn answer(&self, request: Value) -> BoxFuture<'_, CniAnswer>;
    /// The ranges pods get their addresses from.
    fn ranges(&self) -> Vec<IpamView>;
}

/// What the plugin gets, and what is counted.
#[derive(Clone, Debug)]
pub struct CniAnswer {
    /// `add`, `del`, ..., for the metrics.
    pub verb: &'static str,
    pub result: RequestResult,
    pub response: Value,
}
