//! Why a list or watch ended.

use super::Step;
use crate::cluster;

/// Why a list or watch ended.
#[derive(Debug)]
pub(super) enum Failure {
    /// The receiver of events is gone.
    Closed,
    /// The resourceVersion or `continue` token expired (410).
    Expired,
    /// The server does not serve the kind.
    KindUnavailable,
    /// The server does not support streaming lists.
    StreamingUnsupported,
    Other {
        reason: String,
        denied: bool,
        next_step: Step,
    },
}

pub(super) fn is_expired(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410 || status.reason == "Expired")
}

pub(super) fn failure(error: &kube::Error, next_step: Step) -> Failure {
    // a failing server may recover at once; a denial (401, 403) lasts
    let denied = matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403));
    Failure::Other { reason: cluster::explain(error), denied, next_step }
}

pub(super) fn other(reason: String, next_step: Step) -> Failure {
    Failure::Other { reason, denied: false, next_step }
}
