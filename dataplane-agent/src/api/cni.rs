//! Interface to the CNI server.

use std::fmt;

use futures::future::BoxFuture;
use serde_json::Value;

use super::views::IpamView;
use crate::metrics::RequestResult;

/// Serves the CNI plugin.
pub trait CniServer: fmt::Debug + Send + Sync {
    /// Answers a request of `dataplane_cni::protocol`. An error is an answer, too.
    fn answer(&self, request: Value) -> BoxFuture<'_, CniAnswer>;
    /// Usage of the pod CIDRs.
    fn ranges(&self) -> Vec<IpamView>;
}

/// Answer to the plugin, and the labels of its metrics.
#[derive(Clone, Debug)]
pub struct CniAnswer {
    /// `add`, `del`, ...
    pub verb: &'static str,
    pub result: RequestResult,
    pub response: Value,
}
