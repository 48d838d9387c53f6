//! Watches: what changed, in the order it did, from a revision on.

use std::{future, io, sync::Arc, time::Duration};

use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{
    failure::Failure,
    faults::{Drop, Order},
    paths::Target,
    read::number,
    select::Selector,
    state::State,
    store::Change,
};

/// Longest watch, if its client does not say.
const TIMEOUT: Duration = Duration::from_secs(1_800);

/// Parameters of a watch.
#[derive(Clone, Debug, Default)]
pub(super) struct Options {
    pub(super) selector: Selector,
    pub(super) version: String,
    pub(super) version_match: String,
    pub(super) bookmarks: bool,
    pub(super) initial_events: Option<bool>,
    pub(super) timeout: Option<u64>,
}

/// Where lines go; the far end is the body of the answer.
pub(super) type Sink = mpsc::Sender<Result<Bytes, io::Error>>;

/// The client is gone, or has been sent away.
struct Ended;

impl Options {
    /// What is refused before a watch begins.
    pub(super) fn check(&self, streaming_lists: bool) -> Result<(), Failure> {
        if self.initial_events.is_some() && !streaming_lists {
            return Err(Failure::invalid_options(
                "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature \
                 gate is enabled",
            ));
        }
        match (self.initial_events.is_some(), self.version_match.as_str()) {
            (true, "NotOlderThan") | (false, "") => {}
            (true, _) => {
                return Err(Failure::invalid_options(
                    "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to \
                     NotOlderThan",
                ));
            }
            (false, _) => {
                return Err(Failure::invalid_options(
                    "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless \
                     sendInitialEvents is provided",
                ));
            }
        }
        number(&self.version).map(drop)
    }
}

/// One watch.
pub(super) struct Watch {
    pub(super) state: Arc<State>,
    pub(super) target: Target,
    pub(super) options: Options,
    /// What an object looks like to this client.
    pub(super) show: fn(Value) -> Value,
    pub(super) sink: Sink,
    /// Told so before it began: nothing is missed in between.
    pub(super) orders: broadcast::Receiver<Order>,
}

impl Watch {
    /// Runs until its time is over, the client leaves, or it is dropped.
    pub(super) async fn run(mut self) {
        let _ended = self.try_run().await;
    }

    async fn try_run(&mut self) -> Result<(), Ended> {
        let mut revisions = self.state.revisions();
        revisions.mark_unchanged();
        let mut known = self.begin().await?;
        let end = Instant::now() + self.options.timeout.map_or(TIMEOUT, Duration::from_secs);
        let pause = self.state.behaviour().bookmarks;
        let mut bookmark = Instant::now() + pause;
        loop {
            known = self.catch_up(known).await?;
            tokio::select! {
                () = next(&mut revisions) => {}
                () = self.sink.closed() => return Err(Ended),
                order = self.orders.recv() => self.obey(order).await?,
                () = sleep_until(end) => {
                    if self.options.bookmarks {
                        self.bookmark(known, false).await?;
                    }
                    return Ok(());
                }
                () = sleep_until(bookmark), if self.options.bookmarks => {
                    known = self.catch_up(known).await?;
                    self.bookmark(known, false).await?;
                    bookmark = Instant::now() + pause;
                }
            }
        }
    }

    /// Tells what there is, if that was asked for; the revision to go on from.
    async fn begin(&mut self) -> Result<u64, Ended> {
        // checked before
        let asked = number(&self.options.version).unwrap_or_default();
        let current = self.state.store().revision();
        let streams = self.options.initial_events == Some(true);
        if asked > 0 && !streams {
            return Ok(asked);
        }
        if asked > current {
            self.fail(&Failure::too_large(asked, current)).await?;
            return Err(Ended);
        }
        if self.options.initial_events == Some(false) {
            return Ok(current);
        }
        let (known, lines) = {
            let store = self.state.store();
            let revision = store.revision();
            let all = store.list(self.target.resource, revision);
            let all = all.expect("the current revision is never compacted");
            let wanted = all.into_iter().filter(|(key, object)| {
                self.is_here(&key.namespace) && self.options.selector.matches(object)
            });
            let lines: Vec<Bytes> =
                wanted.map(|(_, object)| line("ADDED", &(self.show)((**object).clone()))).collect();
            (revision, lines)
        };
        for line in lines {
            self.send(line).await?;
        }
        if streams && self.options.bookmarks {
            self.bookmark(known, true).await?;
        }
        Ok(known)
    }

    /// Tells what has changed since; how far that is.
    async fn catch_up(&mut self, known: u64) -> Result<u64, Ended> {
        let found = {
            let store = self.state.store();
            store.since(known).map(|changes| {
                let lines: Vec<Bytes> = changes.filter_map(|change| self.event(change)).collect();
                (store.revision(), lines)
            })
        };
        match found {
            Ok((revision, lines)) => {
                for line in lines {
                    self.send(line).await?;
                }
                Ok(revision)
            }
            Err(failure) => {
                self.fail(&failure).await?;
                Err(Ended)
            }
        }
    }

    fn is_here(&self, namespace: &str) -> bool {
        self.target.namespace.is_empty() || self.target.namespace == namespace
    }

    fn event(&self, change: &Change) -> Option<Bytes> {
        if change.key.resource != self.target.resource || !self.is_here(&change.key.namespace) {
            return None;
        }
        let wanted = |object: &&Arc<Value>| self.options.selector.matches(object);
        let (before, after) = (change.before.as_ref().filter(wanted), change.after.as_ref().filter(wanted));
        let (kind, object) = match (before, after) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", (**after).clone()),
            (Some(_), Some(after)) => ("MODIFIED", (**after).clone()),
            (Some(before), None) => {
                // the last state that was wanted, at the revision that ended it
                let mut last = (**before).clone();
                last["metadata"]["resourceVersion"] = json!(change.revision.to_string());
                ("DELETED", last)
            }
        };
        Some(line(kind, &(self.show)(object)))
    }

    async fn bookmark(&mut self, revision: u64, ends_initial: bool) -> Result<(), Ended> {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if ends_initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let resource = self.target.resource;
        let object = (self.show)(
            json!({"apiVersion": resource.api_version(), "kind": resource.kind, "metadata": metadata}),
        );
        self.send(line("BOOKMARK", &object)).await
    }

    async fn fail(&mut self, failure: &Failure) -> Result<(), Ended> {
        self.send(line("ERROR", &failure.status())).await
    }

    async fn obey(&mut self, order: Result<Order, broadcast::error::RecvError>) -> Result<(), Ended> {
        match order {
            Ok(Order::Send(resource, bytes)) if resource == self.target.resource.plural => {
                self.send(bytes).await
            }
            Ok(Order::Send(..)) | Err(broadcast::error::RecvError::Lagged(_)) => Ok(()),
            Ok(Order::Drop(Drop::Broken)) => {
                let broken = io::Error::new(io::ErrorKind::ConnectionReset, "dropped on demand");
                let _gone = self.sink.send(Err(broken)).await;
                Err(Ended)
            }
            Ok(Order::Drop(Drop::Orderly)) | Err(broadcast::error::RecvError::Closed) => Err(Ended),
        }
    }

    async fn send(&mut self, line: Bytes) -> Result<(), Ended> {
        self.sink.send(Ok(line)).await.map_err(|_gone| Ended)
    }
}

async fn next(revisions: &mut watch::Receiver<u64>) {
    if revisions.changed().await.is_err() {
        future::pending::<()>().await;
    }
}

fn line(kind: &str, object: &Value) -> Bytes {
    Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
}
