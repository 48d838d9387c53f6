//! Faults that a test injects into requests and open watches.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::body::Bytes;
use tokio::sync::broadcast;

use super::{failure::Failure, paths::Target};

/// Selects requests; `None` matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// A verb of RBAC: `list`, `watch`, `patch`, ...
    pub verb: Option<&'static str>,
    /// A plural resource name: `nodes`, `leases`, ...
    pub resource: Option<&'static str>,
    /// The name of the user.
    pub user: Option<String>,
}

impl Requests {
    pub fn all() -> Self {
        Self::default()
    }

    /// Selects one verb on one resource.
    pub fn to(verb: &'static str, resource: &'static str) -> Self {
        Self { verb: Some(verb), resource: Some(resource), user: None }
    }

    fn matches(&self, user: &str, target: &Target) -> bool {
        self.verb.is_none_or(|verb| verb == target.verb)
            && self.resource.is_none_or(|resource| resource == target.resource.plural)
            && self.user.as_ref().is_none_or(|wanted| wanted == user)
    }
}

/// A fault of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The response is delayed by this time.
    Delay(Duration),
    /// The server responds with this error and changes nothing.
    Refuse(Failure),
    /// The server executes the request, then responds with this error.
    ExecuteThenRefuse(Failure),
    /// The connection resets in the middle of a response body, or of the first event of a watch.
    Truncate,
    /// `metadata` of every object in the response is a number.
    WrongTypes,
    /// The response is sent in chunks of this many bytes, with this pause before each.
    Trickle(usize, Duration),
}

impl Fault {
    /// Responds 500.
    pub fn internal() -> Self {
        Self::Refuse(Failure::new(500, "InternalError", "etcdserver: request timed out"))
    }

    /// Responds 429 with `Retry-After` in seconds.
    pub fn too_many_requests(retry_after: u32) -> Self {
        let mut failure = Failure::new(429, "TooManyRequests", "Too many requests, please try again later.");
        failure.retry_after = Some(retry_after);
        Self::Refuse(failure)
    }

    /// Responds 410 to the request itself, not as a watch event.
    pub fn gone() -> Self {
        Self::Refuse(Failure::new(410, "Expired", "too old resource version"))
    }
}

/// How the server ends a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchEnd {
    /// The response ends normally, as on a timeout.
    Closed,
    /// The connection is reset.
    Reset,
}

/// A command to the open watches.
#[derive(Clone, Debug)]
pub(super) enum WatchCommand {
    End(WatchEnd),
    /// Send these bytes to all watches of a resource.
    Send(&'static str, Bytes),
}

/// The faults to inject.
#[derive(Debug)]
pub struct Faults {
    planned: Mutex<Vec<PlannedFault>>,
    commands: broadcast::Sender<WatchCommand>,
}

#[derive(Debug)]
struct PlannedFault {
    requests: Requests,
    fault: Fault,
    /// Remaining requests; `None`: all until cleared.
    remaining: Option<u32>,
    hits: u32,
}

impl Default for Faults {
    fn default() -> Self {
        Self { planned: Mutex::default(), commands: broadcast::channel(64).0 }
    }
}

impl Faults {
    /// Injects a fault into the next `count` matching requests.
    pub fn next(&self, count: u32, requests: Requests, fault: Fault) {
        self.plan(requests, fault, Some(count));
    }

    /// Injects a fault into all matching requests until [`Self::clear`].
    pub fn always(&self, requests: Requests, fault: Fault) {
        self.plan(requests, fault, None);
    }

    /// Removes all faults. Returns how many requests each has hit, in planned order.
    pub fn clear(&self) -> Vec<u32> {
        self.lock().drain(..).map(|planned| planned.hits).collect()
    }

    /// Returns how many requests each fault has hit, in planned order.
    pub fn hits(&self) -> Vec<u32> {
        self.lock().iter().map(|planned| planned.hits).collect()
    }

    /// Ends all open watches. Returns their number.
    pub fn drop_watches(&self, how: WatchEnd) -> usize {
        self.commands.send(WatchCommand::End(how)).unwrap_or(0)
    }

    /// Sends a line to all open watches of a resource. Returns the number of watches of all
    /// resources.
    pub fn send_to_watches(&self, resource: &'static str, line: &str) -> usize {
        let line = Bytes::from(format!("{line}\n"));
        self.commands.send(WatchCommand::Send(resource, line)).unwrap_or(0)
    }

    /// Returns the number of open watches.
    pub fn open_watches(&self) -> usize {
        self.commands.receiver_count()
    }

    pub(super) fn commands(&self) -> broadcast::Receiver<WatchCommand> {
        self.commands.subscribe()
    }

    /// Returns the faults of this request and counts them as hit.
    pub(super) fn take(&self, user: &str, target: &Target) -> Vec<Fault> {
        let mut hit = Vec::new();
        for planned in self.lock().iter_mut() {
            if planned.remaining != Some(0) && planned.requests.matches(user, target) {
                planned.remaining = planned.remaining.map(|remaining| remaining - 1);
                planned.hits += 1;
                hit.push(planned.fault.clone());
            }
        }
        hit
    }

    fn plan(&self, requests: Requests, fault: Fault, remaining: Option<u32>) {
        self.lock().push(PlannedFault { requests, fault, remaining, hits: 0 });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<PlannedFault>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
