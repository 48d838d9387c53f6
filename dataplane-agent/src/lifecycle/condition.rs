//! The Node's condition `NetworkUnavailable`: False when pods can be connected, True when they cannot for a while.
//!
//! Pure: what to write, given how the agent is and what the Node says. Conditions of others are not touched: a patch
//! merges by type.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::core::v1::{Node, NodeCondition},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use serde_json::{Value, json};

use crate::api::views::Status;

/// The type of the condition.
pub(super) const TYPE: &str = "NetworkUnavailable";
/// An agent that is away for less is being restarted: pods notice nothing, and the scheduler need not.
pub(super) const GRACE: Duration = Duration::from_secs(30);

/// What the condition should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) unavailable: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// Since when the agent is not ready, and what follows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    /// `None`: it is ready.
    not_ready_since: Option<Instant>,
    grace: Duration,
}

impl Judge {
    /// Of an agent that starts `now`.
    pub(super) const fn new(now: Instant, grace: Duration) -> Self {
        Self { not_ready_since: Some(now), grace }
    }

    /// What the condition should say; `None`: what it says already, until [`Self::due`].
    pub(super) fn judge(&mut self, status: &Status, now: Instant) -> Option<Wanted> {
        let Some(first) = status.not_ready.first() else {
            self.not_ready_since = None;
            return Some(Wanted {
                unavailable: false,
                reason: "DataplaneReady",
                message: "dataplane connects pods and services on this node".to_owned(),
            });
        };
        let since = *self.not_ready_since.get_or_insert(now);
        (now >= since + self.grace).then(|| Wanted {
            unavailable: true,
            reason: "DataplaneNotReady",
            message: format!("{}: {}", first.check, first.reason),
        })
    }

    /// When being not ready becomes serious.
    pub(super) fn due(&self) -> Option<Instant> {
        self.not_ready_since.map(|since| since + self.grace)
    }
}

/// What to patch into the Node's status; `None`: it says so already.
pub(super) fn patch(node: &Node, wanted: &Wanted, clock: Timestamp) -> Option<Value> {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let found = conditions.into_iter().find(|condition| condition.type_ == TYPE);
    let status = if wanted.unavailable { "True" } else { "False" };
    let says = |condition: &NodeCondition| {
        condition.status == status
            && condition.reason.as_deref() == Some(wanted.reason)
            && condition.message.as_deref() == Some(&wanted.message)
    };
    if found.is_some_and(says) {
        return None;
    }
    let same = found.filter(|condition| condition.status == status);
    let since = same.and_then(|condition| condition.last_transition_time.clone());
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
    fn a_restart_is_no_outage_and_an_outage_is_one_after_a_while() {
        let start = Instant::now();
        let mut judge = Judge::new(start, GRACE);
        assert_eq!(judge.judge(&status(Some("wait")), start + GRACE / 2), None);
        let ready = judge.judge(&status(None), start + GRACE / 2).unwrap();
        assert!(!ready.unavailable);
        assert_eq!(judge.due(), None);
        let lost = start + GRACE * 2;
        assert_eq!(judge.judge(&status(Some("gone")), lost), None);
        assert_eq!(judge.due(), Some(lost + GRACE));
        let wanted = judge.judge(&status(Some("gone")), lost + GRACE).unwrap();
        assert!(wanted.unavailable);
        assert_eq!((wanted.reason, wanted.message.as_str()), ("DataplaneNotReady", "source: gone"));
    }

    #[test]
    fn the_time_of_a_transition_is_that_of_a_change_of_status() {
        let clock = |second| Timestamp::from_second(second).unwrap();
        let wanted = |unavailable, message: &str| Wanted {
            unavailable,
            reason: "DataplaneReady",
            message: message.to_owned(),
        };
        let first = patch(&node(&json!([])), &wanted(false, "good"), clock(100)).unwrap();
        let written = node(&first["status"]["conditions"]);
        assert_eq!(patch(&written, &wanted(false, "good"), clock(200)), None, "nothing to say");
        let same = patch(&written, &wanted(false, "better"), clock(200)).unwrap();
        let same = &same["status"]["conditions"][0];
        assert_eq!(same["lastTransitionTime"], "1970-01-01T00:01:40Z");
        assert_eq!(same["lastHeartbeatTime"], "1970-01-01T00:03:20Z");
        let other = patch(&written, &wanted(true, "bad"), clock(200)).unwrap();
        assert_eq!(other["status"]["conditions"][0]["status"], "True");
        assert_eq!(other["status"]["conditions"][0]["lastTransitionTime"], "1970-01-01T00:03:20Z");
    }

    #[test]
    fn conditions_of_others_are_not_in_the_patch() {
        let others = json!([{"type": "Ready", "status": "False", "reason": "KubeletNotReady"}]);
        let wanted = Wanted { unavailable: false, reason: "DataplaneReady", message: String::new() };
        let patch = patch(&node(&others), &wanted, Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(patch["status"]["conditions"].as_array().unwrap().len(), 1);
        assert_eq!(patch["status"]["conditions"][0]["type"], TYPE);
    }
}
