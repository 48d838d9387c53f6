//! The Node's condition `NetworkUnavailable`: False when the agent is ready, True when it is not
//! for a while.
//!
//! Pure: computes the patch from the agent's status and the Node. Other conditions are not touched,
//! because a strategic merge patch merges conditions by type.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::core::v1::{Node, NodeCondition},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use serde_json::{Value, json};

use crate::api::views::Status;

/// Type of the condition.
pub(super) const TYPE: &str = "NetworkUnavailable";
/// Time for which the agent may be not ready: a restart does not affect pods, so the scheduler need
/// not know.
pub(super) const GRACE: Duration = Duration::from_secs(30);

/// Desired content of the condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) unavailable: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// Tracks since when the agent is not ready.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadinessTracker {
    /// `None`: ready.
    not_ready_since: Option<Instant>,
    grace: Duration,
}

impl ReadinessTracker {
    /// For an agent that starts `now`.
    pub(super) const fn new(now: Instant, grace: Duration) -> Self {
        Self { not_ready_since: Some(now), grace }
    }

    /// The desired condition; `None`: leave it unchanged until [`Self::deadline`].
    pub(super) fn update(&mut self, status: &Status, now: Instant) -> Option<Wanted> {
        let Some(first) = status.not_ready.first() else {
            self.not_ready_since = None;
            return Some(Wanted {
                unavailable: false,
                reason: "DataplaneReady",
                message: "dataplane-agent is ready: pods and Services are connected".to_owned(),
            });
        };
        let since = *self.not_ready_since.get_or_insert(now);
        (now >= since + self.grace).then(|| Wanted {
            unavailable: true,
            reason: "DataplaneNotReady",
            message: format!("{}: {}", first.check, first.reason),
        })
    }

    /// When the grace period ends; `None` while the agent is ready.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.not_ready_since.map(|since| since + self.grace)
    }
}

/// The patch of the Node's status; `None`: nothing to change.
pub(super) fn patch(node: &Node, wanted: &Wanted, clock: Timestamp) -> Option<Value> {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let found = conditions.into_iter().find(|condition| condition.type_ == TYPE);
    let status = if wanted.unavailable { "True" } else { "False" };
    let is_equal = |condition: &NodeCondition| {
        condition.status == status
            && condition.reason.as_deref() == Some(wanted.reason)
            && condition.message.as_deref() == Some(&wanted.message)
    };
    if found.is_some_and(is_equal) {
        return None;
    }
    let unchanged = found.filter(|condition| condition.status == status);
    let since = unchanged.and_then(|condition| condition.last_transition_time.clone());
    let condition = NodeCondition {
        type_: TYPE.to_owned(),
        status: status.to_owned(),
        reason: Some(wanted.reason.to_owned()),
        message: Some(wanted.message.clone()),
        last_heartbeat_time: Some(Time(clock)),
        last_transition_time: Some(since.unwrap_or(Time(clock))),
    };
    Some(json!({ "status": { "conditions": [condition] } }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::views::NotReady;

    fn status(reason: Option<&str>) -> Status {
        let not_ready = |reason: &str| NotReady { check: "source".to_owned(), reason: reason.to_owned() };
        Status { not_ready: reason.map(not_ready).into_iter().collect(), ..Status::starting("n1") }
    }

    fn node(conditions: &Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "status": {"conditions": conditions}}))
            .unwrap()
    }

    #[test]
    fn agent_that_is_not_ready_is_reported_after_the_grace_period() {
        let start = Instant::now();
        let mut readiness = ReadinessTracker::new(start, GRACE);
        assert_eq!(readiness.update(&status(Some("wait")), start + GRACE / 2), None);
        let ready = readiness.update(&status(None), start + GRACE / 2).unwrap();
        assert!(!ready.unavailable);
        assert_eq!(readiness.deadline(), None);
        let lost = start + GRACE * 2;
        assert_eq!(readiness.update(&status(Some("gone")), lost), None);
        assert_eq!(readiness.deadline(), Some(lost + GRACE));
        let wanted = readiness.update(&status(Some("gone")), lost + GRACE).unwrap();
        assert!(wanted.unavailable);
        assert_eq!((wanted.reason, wanted.message.as_str()), ("DataplaneNotReady", "source: gone"));
    }

    #[test]
    fn last_transition_time_changes_only_with_the_status() {
        let clock = |second| Timestamp::from_second(second).unwrap();
        let wanted = |unavailable, message: &str| Wanted {
            unavailable,
            reason: "DataplaneReady",
            message: message.to_owned(),
        };
        let first = patch(&node(&json!([])), &wanted(false, "good"), clock(100)).unwrap();
        let written = node(&first["status"]["conditions"]);
        assert_eq!(patch(&written, &wanted(false, "good"), clock(200)), None, "unchanged");
        let same = patch(&written, &wanted(false, "better"), clock(200)).unwrap();
        let same = &same["status"]["conditions"][0];
        assert_eq!(same["lastTransitionTime"], "1970-01-01T00:01:40Z");
        assert_eq!(same["lastHeartbeatTime"], "1970-01-01T00:03:20Z");
        let other = patch(&written, &wanted(true, "bad"), clock(200)).unwrap();
        assert_eq!(other["status"]["conditions"][0]["status"], "True");
        assert_eq!(other["status"]["conditions"][0]["lastTransitionTime"], "1970-01-01T00:03:20Z");
    }

    #[test]
    fn patch_contains_no_other_conditions() {
        let others = json!([{"type": "Ready", "status": "False", "reason": "KubeletNotReady"}]);
        let wanted = Wanted { unavailable: false, reason: "DataplaneReady", message: String::new() };
        let patch = patch(&node(&others), &wanted, Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(patch["status"]["conditions"].as_array().unwrap().len(), 1);
        assert_eq!(patch["status"]["conditions"][0]["type"], TYPE);
    }
}
