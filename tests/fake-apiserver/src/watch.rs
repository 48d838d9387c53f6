//! Watches: sends changes in order, starting at a revision.

use std::{future, io, sync::Arc, time::Duration};

use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{
    failure::Failure,
    faults::{WatchCommand, WatchEnd},
    paths::Target,
    read::parse_revision,
    select::Selector,
    state::State,
    store::Change,
};

/// Timeout of a watch if the client sets none.
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

/// Sends lines to the response body.
pub(super) type LineSender = mpsc::Sender<Result<Bytes, io::Error>>;

/// The client disconnected, or the server ended the watch.
struct Ended;

impl Options {
    /// Rejects invalid options before the watch begins.
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
        parse_revision(&self.version).map(drop)
    }
}

/// A watch of one client.
pub(super) struct Watch {
    pub(super) state: Arc<State>,
    pub(super) target: Target,
    pub(super) options: Options,
    /// Converts objects to the form that the client accepts.
    pub(super) convert: fn(Value) -> Value,
    pub(super) sender: LineSender,
    /// Subscribed before the watch starts, so that no command is missed.
    pub(super) commands: broadcast::Receiver<WatchCommand>,
}

impl Watch {
    /// Runs until the timeout, a disconnect, or a command to end.
    pub(super) async fn run(mut self) {
        let _ended = self.try_run().await;
    }

    async fn try_run(&mut self) -> Result<(), Ended> {
        let mut revisions = self.state.revisions();
        revisions.mark_unchanged();
        let mut sent = self.send_initial().await?;
        let end = Instant::now() + self.options.timeout.map_or(TIMEOUT, Duration::from_secs);
        let pause = self.state.behaviour().bookmarks;
        let mut bookmark = Instant::now() + pause;
        loop {
            sent = self.catch_up(sent).await?;
            tokio::select! {
                () = next(&mut revisions) => {}
                () = self.sender.closed() => return Err(Ended),
                command = self.commands.recv() => self.execute(command).await?,
                () = sleep_until(end) => {
                    if self.options.bookmarks {
                        self.bookmark(sent, false).await?;
                    }
                    return Ok(());
                }
                () = sleep_until(bookmark), if self.options.bookmarks => {
                    sent = self.catch_up(sent).await?;
                    self.bookmark(sent, false).await?;
                    bookmark = Instant::now() + pause;
                }
            }
        }
    }

    /// Sends the initial events if requested. Returns the revision to continue from.
    async fn send_initial(&mut self) -> Result<u64, Ended> {
        // `Options::check` has validated it
        let requested = parse_revision(&self.options.version).unwrap_or_default();
        let current = self.state.store().revision();
        let streams = self.options.initial_events == Some(true);
        if requested > 0 && !streams {
            return Ok(requested);
        }
        if requested > current {
            self.fail(&Failure::too_large(requested, current)).await?;
            return Err(Ended);
        }
        if self.options.initial_events == Some(false) {
            return Ok(current);
        }
        let (sent, lines) = {
            let store = self.state.store();
            let revision = store.revision();
            let all = store.list(self.target.resource, revision);
            let all = all.expect("the current revision is never compacted");
            let matching = all.into_iter().filter(|(key, object)| {
                self.is_in_scope(&key.namespace) && self.options.selector.matches(object)
            });
            let lines: Vec<Bytes> =
                matching.map(|(_, object)| line("ADDED", &(self.convert)((**object).clone()))).collect();
            (revision, lines)
        };
        for line in lines {
            self.send(line).await?;
        }
        if streams && self.options.bookmarks {
            self.bookmark(sent, true).await?;
        }
        Ok(sent)
    }

    /// Sends the changes after a revision. Returns the last revision sent.
    async fn catch_up(&mut self, sent: u64) -> Result<u64, Ended> {
        let found = {
            let store = self.state.store();
            store.since(sent).map(|changes| {
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

    fn is_in_scope(&self, namespace: &str) -> bool {
        self.target.namespace.is_empty() || self.target.namespace == namespace
    }

    fn event(&self, change: &Change) -> Option<Bytes> {
        if change.key.resource != self.target.resource || !self.is_in_scope(&change.key.namespace) {
            return None;
        }
        let matching = |object: &&Arc<Value>| self.options.selector.matches(object);
        let (before, after) =
            (change.before.as_ref().filter(matching), change.after.as_ref().filter(matching));
        let (kind, object) = match (before, after) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", (**after).clone()),
            (Some(_), Some(after)) => ("MODIFIED", (**after).clone()),
            (Some(before), None) => {
                // the last matching state, with the revision of this change
                let mut last = (**before).clone();
                last["metadata"]["resourceVersion"] = json!(change.revision.to_string());
                ("DELETED", last)
            }
        };
        Some(line(kind, &(self.convert)(object)))
    }

    async fn bookmark(&mut self, revision: u64, ends_initial: bool) -> Result<(), Ended> {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if ends_initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let resource = self.target.resource;
        let object = (self.convert)(
            json!({"apiVersion": resource.api_version(), "kind": resource.kind, "metadata": metadata}),
        );
        self.send(line("BOOKMARK", &object)).await
    }

    async fn fail(&mut self, failure: &Failure) -> Result<(), Ended> {
        self.send(line("ERROR", &failure.status())).await
    }

    async fn execute(
        &mut self,
        command: Result<WatchCommand, broadcast::error::RecvError>,
    ) -> Result<(), Ended> {
        match command {
            Ok(WatchCommand::Send(resource, bytes)) if resource == self.target.resource.plural => {
                self.send(bytes).await
            }
            Ok(WatchCommand::Send(..)) | Err(broadcast::error::RecvError::Lagged(_)) => Ok(()),
            Ok(WatchCommand::End(WatchEnd::Reset)) => {
                let reset =
                    io::Error::new(io::ErrorKind::ConnectionReset, "connection reset by an injected fault");
                let _gone = self.sender.send(Err(reset)).await;
                Err(Ended)
            }
            Ok(WatchCommand::End(WatchEnd::Closed)) | Err(broadcast::error::RecvError::Closed) => Err(Ended),
        }
    }

    async fn send(&mut self, line: Bytes) -> Result<(), Ended> {
        self.sender.send(Ok(line)).await.map_err(|_gone| Ended)
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
