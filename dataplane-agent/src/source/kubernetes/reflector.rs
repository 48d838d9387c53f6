//! Lists and watches one kind, without gaps.
//!
//! The initial list is a streaming list where the server supports it, otherwise a paged list. A
//! watch that ends is resumed from its last resourceVersion; when the server has expired that
//! version (410), everything is listed again. Events are sent in order: after
//! [`WatchEvent::ListDone`], objects not seen since [`WatchEvent::ListStarted`] do not exist.

mod failure;
mod lines;

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use kube::core::Status;
use serde_json::value::RawValue;
use tokio::{sync::mpsc, time::Instant};

use self::{
    failure::{Failure, failure, is_expired, other},
    lines::Lines,
};
use super::{
    Progress,
    backoff::Backoff,
    request::{Bookmark, ObjectHead, Page, Requests, WatchLine, WatchStart},
};
use crate::{
    cluster,
    source::objects::{Converted, FieldError, Kind},
    state::{ObjectKey, Owner},
};

/// Watch timeout requested from the server, plus up to the same time of jitter, so that clients
/// spread over servers.
const WATCH_SECONDS: u64 = 300;
/// A server that sends nothing this long after the watch timeout is considered dead.
const WATCH_GRACE: Duration = Duration::from_secs(30);
/// A server that supports streaming lists starts to stream at once; one that does not may stay
/// silent.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);
/// A watch that lasted this long was healthy, even without events.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);
/// Delay before a kind the server does not know is tried again: the server may have been upgraded.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(60);
/// Delay before a new list after an object could not be identified.
const RELIST_DELAY: Duration = Duration::from_secs(30);

/// An event of a reflector.
#[derive(Debug)]
pub(super) enum WatchEvent {
    /// A list of all objects of the kind starts.
    ListStarted(Kind),
    /// The object exists: its converted form, or why it is invalid.
    Applied(ObjectKey, Result<Converted, FieldError>),
    Deleted(ObjectKey, Owner),
    /// The list is done. `complete`: every object of it was identified.
    ListDone {
        kind: Kind,
        complete: bool,
    },
    /// The error of the kind's list or watch; `None`: it works.
    LastError(Kind, Option<String>),
}

/// The next request.
#[derive(Debug)]
enum Step {
    List,
    Watch(String),
}

/// How objects are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListMode {
    /// As the start of a watch (`sendInitialEvents`, KEP-3157).
    Streaming,
    /// In pages, for servers without streaming lists.
    Paged,
    /// In one response, after a `continue` token expired.
    Unpaged,
}

/// Lists and watches one kind.
pub(super) struct Reflector {
    kind: Kind,
    client: kube::Client,
    requests: Requests,
    events: mpsc::Sender<WatchEvent>,
    progress: Progress,
    backoff: Backoff,
    list_mode: ListMode,
    /// A list was completed before.
    listed: bool,
    /// An object could not be identified: list again at this time.
    relist_at: Option<Instant>,
    error_published: bool,
}

impl Reflector {
    pub(super) fn new(
        kind: Kind,
        client: kube::Client,
        node: &str,
        events: mpsc::Sender<WatchEvent>,
        progress: Progress,
    ) -> Self {
        Self {
            kind,
            client,
            requests: Requests::new(kind, node),
            events,
            progress,
            backoff: Backoff::default(),
            list_mode: ListMode::Streaming,
            listed: false,
            relist_at: None,
            error_published: false,
        }
    }

    /// Runs until the receiver is gone.
    pub(super) async fn run(mut self) {
        let mut step = Step::List;
        loop {
            let result = match &step {
                Step::List if self.list_mode == ListMode::Streaming => {
                    self.watch(WatchStart::InitialEvents).await
                }
                Step::List => self.list().await,
                Step::Watch(version) => self.watch(WatchStart::After(version)).await,
            };
            step = match result {
                Ok(next) => next,
                Err(Failure::Closed) => return,
                Err(Failure::KindUnavailable) => {
                    if self.on_kind_unavailable().await.is_err() {
                        return;
                    }
                    tokio::time::sleep(UNAVAILABLE_RETRY).await;
                    Step::List
                }
                Err(Failure::StreamingUnsupported) => {
                    tracing::info!(
                        resource = self.requests.resource,
                        "API server does not support streaming lists; using paged lists"
                    );
                    self.list_mode = ListMode::Paged;
                    Step::List
                }
                Err(Failure::Expired) => {
                    tracing::info!(
                        resource = self.requests.resource,
                        "resourceVersion expired; listing again"
                    );
                    self.progress.on_watch_lost(self.kind);
                    // the first retry is almost immediate
                    tokio::time::sleep(self.backoff.next()).await;
                    Step::List
                }
                Err(Failure::Other { reason, denied, next_step }) => {
                    self.progress.on_watch_lost(self.kind);
                    tracing::debug!(
                        resource = self.requests.resource,
                        reason,
                        "list or watch failed; retrying"
                    );
                    // a single broken connection is not reported
                    if (denied || self.backoff.failures() > 0)
                        && self.publish_error(Some(reason)).await.is_err()
                    {
                        return;
                    }
                    tokio::time::sleep(self.backoff.next()).await;
                    next_step
                }
            };
        }
    }

    /// Lists all objects in pages.
    async fn list(&mut self) -> Result<Step, Failure> {
        self.start_list().await?;
        let (mut next, mut complete) = (None::<String>, true);
        loop {
            let request = self.requests.list(next.as_deref(), self.list_mode == ListMode::Paged);
            let request = request.map_err(|error| other(error.to_string(), Step::List))?;
            let text = match self.client.request_text(request).await {
                Ok(text) => text,
                Err(error) if is_expired(&error) => {
                    self.list_mode = ListMode::Unpaged;
                    return Err(Failure::Expired);
                }
                Err(error) if self.is_kind_unavailable(&error) => return Err(Failure::KindUnavailable),
                Err(error) => return Err(failure(&error, Step::List)),
            };
            let page: Page<'_> = serde_json::from_str(&text)
                .map_err(|error| other(format!("cannot decode list response: {error}"), Step::List))?;
            for item in page.items.into_iter().flatten() {
                complete &= self.publish_object(item, false).await?.is_some();
            }
            next = page.metadata.r#continue.filter(|next| !next.is_empty());
            if next.is_none() {
                if page.metadata.resource_version.is_empty() {
                    return Err(other("list response has no resourceVersion".to_owned(), Step::List));
                }
                self.list_mode = ListMode::Paged;
                self.finish_list(complete).await?;
                return Ok(Step::Watch(page.metadata.resource_version));
            }
        }
    }

    /// Watches from a version, or from a streaming list, until the watch ends.
    async fn watch(&mut self, begin: WatchStart<'_>) -> Result<Step, Failure> {
        let (mut listing, mut version) = match begin {
            WatchStart::InitialEvents => (true, String::new()),
            WatchStart::After(version) => (false, version.to_owned()),
        };
        // where to resume; an incomplete list is started again
        let resume = |listing: bool, version: &str| {
            if listing || version.is_empty() { Step::List } else { Step::Watch(version.to_owned()) }
        };
        let seconds = WATCH_SECONDS + RandomState::new().hash_one(self.kind as u8) % WATCH_SECONDS;
        let request = self.requests.watch(begin, seconds);
        let request = request.map_err(|error| other(error.to_string(), Step::List))?;
        let mut lines = match self.client.request_stream(request).await {
            Ok(stream) => Lines::new(Box::pin(stream)),
            Err(kube::Error::Api(status)) if listing && matches!(status.code, 400 | 422) => {
                return Err(Failure::StreamingUnsupported);
            }
            Err(error) if is_expired(&error) => return Err(Failure::Expired),
            Err(error) if self.is_kind_unavailable(&error) => return Err(Failure::KindUnavailable),
            Err(error) => return Err(failure(&error, resume(listing, &version))),
        };
        if listing {
            self.start_list().await?;
        } else {
            self.on_watching().await?;
        }
        let (started, mut complete) = (Instant::now(), true);
        let end = started + Duration::from_secs(seconds) + WATCH_GRACE;
        loop {
            let until = if listing { end.min(Instant::now() + STREAM_TIMEOUT) } else { end };
            let until =
                self.relist_at.map_or(until, |relist_at| if listing { until } else { until.min(relist_at) });
            let line = match tokio::time::timeout_at(until, lines.next()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => {
                    if started.elapsed() >= HEALTHY_AFTER {
                        self.backoff.reset();
                    } else {
                        // the watch ended at once: back off
                        tokio::time::sleep(self.backoff.next()).await;
                    }
                    return Ok(resume(listing, &version));
                }
                Ok(Err(error)) => {
                    if started.elapsed() >= HEALTHY_AFTER {
                        self.backoff.reset();
                    }
                    let reason = cluster::explain(&kube::Error::ReadEvents(error));
                    return Err(other(reason, resume(listing, &version)));
                }
                Err(_elapsed) if listing => return Err(Failure::StreamingUnsupported),
                Err(_elapsed) if self.relist_at.take().is_some() => return Ok(Step::List),
                Err(_elapsed) => return Ok(resume(listing, &version)),
            };
            let Ok(line) = serde_json::from_slice::<WatchLine<'_>>(line) else {
                return Err(other("cannot decode watch event".to_owned(), resume(listing, &version)));
            };
            match &*line.r#type {
                "ADDED" | "MODIFIED" | "DELETED" => {
                    match self.publish_object(line.object, line.r#type == "DELETED").await? {
                        Some(now) if !now.is_empty() => version = now,
                        Some(_) => {}
                        None => complete = false,
                    }
                }
                "BOOKMARK" => {
                    let Ok(bookmark) = serde_json::from_str::<Bookmark>(line.object.get()) else { continue };
                    version = bookmark.metadata.resource_version.clone();
                    if listing && bookmark.metadata.ends_initial_events() {
                        listing = false;
                        self.finish_list(complete).await?;
                        self.on_watching().await?;
                        continue;
                    }
                }
                "ERROR" => {
                    let status = serde_json::from_str::<Status>(line.object.get()).unwrap_or_default();
                    let error = kube::Error::Api(status.boxed());
                    if is_expired(&error) {
                        return Err(Failure::Expired);
                    }
                    return Err(failure(&error, resume(listing, &version)));
                }
                other => tracing::debug!(event = other, "unknown watch event type ignored"),
            }
            if !listing {
                self.backoff.reset();
                if !complete && self.relist_at.is_none() {
                    self.relist_at = Some(Instant::now() + RELIST_DELAY);
                }
            }
        }
    }

    /// Whether the server is older than the kind.
    fn is_kind_unavailable(&self, error: &kube::Error) -> bool {
        self.kind.is_recent() && matches!(error, kube::Error::Api(status) if status.code == 404)
    }

    /// Reports an empty list for a kind the server does not have.
    async fn on_kind_unavailable(&mut self) -> Result<(), Failure> {
        if !self.listed {
            tracing::info!(
                resource = self.requests.resource,
                "API server does not serve this resource; retrying every minute"
            );
        }
        // not counted as a repeated list
        self.publish_list_started().await?;
        self.finish_list(true).await?;
        self.on_watching().await
    }

    async fn start_list(&mut self) -> Result<(), Failure> {
        if self.listed {
            self.progress.on_relist(self.kind);
        }
        self.publish_list_started().await
    }

    async fn publish_list_started(&mut self) -> Result<(), Failure> {
        self.relist_at = None;
        self.publish(WatchEvent::ListStarted(self.kind)).await
    }

    async fn finish_list(&mut self, complete: bool) -> Result<(), Failure> {
        self.listed = true;
        if !complete {
            self.relist_at = Some(Instant::now() + RELIST_DELAY);
        }
        self.publish(WatchEvent::ListDone { kind: self.kind, complete }).await
    }

    async fn on_watching(&mut self) -> Result<(), Failure> {
        self.progress.on_watching(self.kind);
        let relist_at = self.relist_at.map(|_at| {
            format!(
                "cannot identify some objects of {}: deletions are not detected until the next complete list",
                self.requests.resource
            )
        });
        self.publish_error(relist_at).await
    }

    /// Publishes an object. Returns its resourceVersion; `None` if the object cannot be identified.
    async fn publish_object(&mut self, object: &RawValue, deleted: bool) -> Result<Option<String>, Failure> {
        let head = match serde_json::from_str::<ObjectHead>(object.get()) {
            Ok(head) if !head.metadata.name.is_empty() => head.metadata,
            Ok(_) | Err(_) => {
                tracing::warn!(resource = self.requests.resource, "ignored object without a readable name");
                return Ok(None);
            }
        };
        let key = self.kind.key(&head.namespace, &head.name);
        let event = if deleted {
            WatchEvent::Deleted(key, Owner { uid: head.uid.as_str().into() })
        } else {
            // only this object is decoded, and only during conversion
            let converted = serde_json::from_str(object.get())
                .map_err(|error| FieldError::new("object", error.to_string()))
                .and_then(|value| self.kind.convert(value));
            WatchEvent::Applied(key, converted)
        };
        self.publish(event).await?;
        Ok(Some(head.resource_version))
    }

    async fn publish_error(&mut self, reason: Option<String>) -> Result<(), Failure> {
        if reason.is_none() && !self.error_published {
            return Ok(());
        }
        self.error_published = reason.is_some();
        self.publish(WatchEvent::LastError(self.kind, reason)).await
    }

    async fn publish(&self, event: WatchEvent) -> Result<(), Failure> {
        self.events.send(event).await.map_err(|_closed| Failure::Closed)
    }
}
