//! What can go wrong between a client and its API server, on demand.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::body::Bytes;
use tokio::sync::broadcast;

use super::{failure::Failure, paths::Target};

/// Which requests. Nothing given: all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// As in a rule of a role: `list`, `watch`, `patch`, ..
    pub verb: Option<&'static str>,
    /// `nodes`, `leases`, ..
    pub resource: Option<&'static str>,
    /// By name of the user.
    pub user: Option<String>,
}

impl Requests {
    pub fn all() -> Self {
        Self::default()
    }

    /// Of one verb on one resource.
    pub fn to(verb: &'static str, resource: &'static str) -> Self {
        Self { verb: Some(verb), resource: Some(resource), user: None }
    }

    fn include(&self, user: &str, target: &Target) -> bool {
        self.verb.is_none_or(|verb| verb == target.verb)
            && self.resource.is_none_or(|resource| resource == target.resource.plural)
            && self.user.as_ref().is_none_or(|wanted| wanted == user)
    }
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered so much later.
    Delay(Duration),
    /// It is refused, and nothing is done.
    Refuse(Failure),
    /// It is done, and then answered with this: the client cannot know.
    DoneButRefuse(Failure),
    /// The answer breaks off in the middle: of a list its bytes, of a watch its first event.
    Break,
    /// In every object of the answer, metadata is a number.
    WrongTypes,
    /// The answer comes in pieces of so many bytes, with a pause after each.
    Trickle(usize, Duration),
}

impl Fault {
    /// 500.
    pub fn internal() -> Self {
        Self::Refuse(Failure::new(500, "InternalError", "etcdserver: request timed out"))
    }

    /// 429: come back after so many seconds.
    pub fn too_many_requests(retry_after: u32) -> Self {
        let mut failure = Failure::new(429, "TooManyRequests", "Too many requests, please try again later.");
        failure.retry_after = Some(retry_after);
        Self::Refuse(failure)
    }

    /// 410, as an answer rather than as an event of a watch.
    pub fn gone() -> Self {
        Self::Refuse(Failure::new(410, "Expired", "too old resource version"))
    }
}

/// How a watch that is dropped ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// As one whose time is over.
    Orderly,
    /// Its connection breaks.
    Broken,
}

/// What watches that are open are told besides changes.
#[derive(Clone, Debug)]
pub(super) enum Order {
    Drop(Drop),
    /// These bytes, to watches of a resource.
    Send(&'static str, Bytes),
}

/// What is to happen, and to how many.
#[derive(Debug)]
pub struct Faults {
    planned: Mutex<Vec<Planned>>,
    orders: broadcast::Sender<Order>,
}

#[derive(Debug)]
struct Planned {
    requests: Requests,
    fault: Fault,
    /// `None`: until cleared.
    left: Option<u32>,
    hits: u32,
}

impl Default for Faults {
    fn default() -> Self {
        Self { planned: Mutex::default(), orders: broadcast::channel(64).0 }
    }
}

impl Faults {
    /// The next `count` of these requests.
    pub fn next(&self, count: u32, requests: Requests, fault: Fault) {
        self.plan(requests, fault, Some(count));
    }

    /// All of these requests until [`Self::clear`].
    pub fn always(&self, requests: Requests, fault: Fault) {
        self.plan(requests, fault, None);
    }

    /// Ends all; how many requests each has hit, in the order they were planned.
    pub fn clear(&self) -> Vec<u32> {
        self.lock().drain(..).map(|planned| planned.hits).collect()
    }

    /// How many requests each of those planned has hit.
    pub fn hits(&self) -> Vec<u32> {
        self.lock().iter().map(|planned| planned.hits).collect()
    }

    /// Ends all watches that are open; how many there were.
    pub fn drop_watches(&self, how: Drop) -> usize {
        self.orders.send(Order::Drop(how)).unwrap_or(0)
    }

    /// Sends a line to all watches of a resource that are open, whatever it is; how many watches there are of anything.
    pub fn send_to_watches(&self, resource: &'static str, line: &str) -> usize {
        let line = Bytes::from(format!("{line}\n"));
        self.orders.send(Order::Send(resource, line)).unwrap_or(0)
    }

    /// How many watches are open.
    pub fn open_watches(&self) -> usize {
        self.orders.receiver_count()
    }

    pub(super) fn orders(&self) -> broadcast::Receiver<Order> {
        self.orders.subscribe()
    }

    /// What happens to this request.
    pub(super) fn of(&self, user: &str, target: &Target) -> Vec<Fault> {
        let mut hit = Vec::new();
        for planned in self.lock().iter_mut() {
            if planned.left != Some(0) && planned.requests.include(user, target) {
                planned.left = planned.left.map(|left| left - 1);
                planned.hits += 1;
                hit.push(planned.fault.clone());
            }
        }
        hit
    }

    fn plan(&self, requests: Requests, fault: Fault, left: Option<u32>) {
        self.lock().push(Planned { requests, fault, left, hits: 0 });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Planned>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
