//! One kind, followed: everything there is, then every change, without a gap, whatever the server does.
//!
//! Everything comes by a watch that begins with it where the server can do that, else by pages of a list. A watch that
//! ends is taken up where it was; when the server has forgotten that place (410), everything is asked for again. What
//! is heard is told in order; [`WatchEvent::Listed`] says that what was not heard since [`WatchEvent::Listing`] is gone.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use futures::{AsyncBufRead, AsyncBufReadExt as _};
use kube::core::Status;
use serde_json::value::RawValue;
use tokio::{sync::mpsc, time::Instant};

use super::{
    Progress,
    backoff::Backoff,
    request::{Begin, Bookmark, Head, Line, Page, Requests},
};
use crate::{
    cluster,
    source::objects::{Converted, FieldError, Kind},
    state::{ObjectKey, Owner},
};

/// Servers end watches after this many seconds, so that clients spread over servers; by chance up to twice as many.
const WATCH_SECONDS: u64 = 300;
/// A server whose time is over but that says nothing is dead.
const OVERTIME: Duration = Duration::from_secs(30);
/// A server that knows streaming lists begins to stream at once. One that does not may just keep silent.
const SILENCE: Duration = Duration::from_secs(5);
/// A watch that went on for this long was a success, even if there was nothing to say.
const SUCCESS: Duration = Duration::from_secs(5);
/// To ask again for a kind the server does not have: it may be a newer one by then.
const ABSENT: Duration = Duration::from_secs(60);
/// To ask again for everything after something could not be told.
const UNTOLD: Duration = Duration::from_secs(30);

/// What is heard of the cluster.
#[derive(Debug)]
pub(super) enum WatchEvent {
    /// All objects of the kind follow.
    Listing(Kind),
    /// There is this object, or it cannot be what it says.
    Is(ObjectKey, Result<Converted, FieldError>),
    Gone(ObjectKey, Owner),
    /// All have been said. `complete`: but for some nobody can tell.
    Listed {
        kind: Kind,
        complete: bool,
    },
    /// Something is wrong with the kind as a whole; `None`: not any more.
    Trouble(Kind, Option<String>),
}

/// What to do next.
#[derive(Debug)]
enum Step {
    List,
    Watch(String),
}

/// How everything is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lists {
    /// As the beginning of a watch.
    Streamed,
    /// The server does not do that.
    Pages,
    /// The server has forgotten a place between pages: once without.
    Whole,
}

/// Why something did not work.
#[derive(Debug)]
enum Failure {
    /// Nobody listens any more.
    Closed,
    /// The server has forgotten where we were.
    Forgotten,
    /// The server does not have the kind.
    Absent,
    /// Streaming lists are not for this server.
    NotStreaming,
    Other {
        reason: String,
        refused: bool,
        then: Step,
    },
}

/// Follows one kind.
pub(super) struct Reflector {
    kind: Kind,
    client: kube::Client,
    requests: Requests,
    heard: mpsc::Sender<WatchEvent>,
    progress: Progress,
    backoff: Backoff,
    lists: Lists,
    /// Everything was heard once.
    listed: bool,
    /// Some object could not be told: ask for everything again at this time.
    untold: Option<Instant>,
    troubled: bool,
}

impl Reflector {
    pub(super) fn new(
        kind: Kind,
        client: kube::Client,
        node: &str,
        heard: mpsc::Sender<WatchEvent>,
        progress: Progress,
    ) -> Self {
        Self {
            kind,
            client,
            requests: Requests::new(kind, node),
            heard,
            progress,
            backoff: Backoff::default(),
            lists: Lists::Streamed,
            listed: false,
            untold: None,
            troubled: false,
        }
    }

    /// Until nobody listens.
    pub(super) async fn run(mut self) {
        let mut step = Step::List;
        loop {
            let done = match &step {
                Step::List if self.lists == Lists::Streamed => self.watch(Begin::Everything).await,
                Step::List => self.list().await,
                Step::Watch(version) => self.watch(Begin::After(version)).await,
            };
            step = match done {
                Ok(next) => next,
                Err(Failure::Closed) => return,
                Err(Failure::Absent) => {
                    if self.is_absent().await.is_err() {
                        return;
                    }
                    tokio::time::sleep(ABSENT).await;
                    Step::List
                }
                Err(Failure::NotStreaming) => {
                    tracing::info!(resource = self.requests.resource, "no streaming lists: listing by pages");
                    self.lists = Lists::Pages;
                    Step::List
                }
                Err(Failure::Forgotten) => {
                    tracing::info!(
                        resource = self.requests.resource,
                        "the API server has forgotten: listing again"
                    );
                    self.progress.lost(self.kind);
                    // the first time at once, or nearly
                    tokio::time::sleep(self.backoff.next()).await;
                    Step::List
                }
                Err(Failure::Other { reason, refused, then }) => {
                    self.progress.lost(self.kind);
                    tracing::debug!(resource = self.requests.resource, reason, "watch failed");
                    // a connection that breaks once is no trouble
                    if (refused || self.backoff.failures() > 0) && self.trouble(Some(reason)).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(self.backoff.next()).await;
                    then
                }
            };
        }
    }

    /// Everything, by pages.
    async fn list(&mut self) -> Result<Step, Failure> {
        self.begin_list().await?;
        let (mut next, mut complete) = (None::<String>, true);
        loop {
            let request = self.requests.list(next.as_deref(), self.lists == Lists::Pages);
            let request = request.map_err(|error| other(error.to_string(), Step::List))?;
            let text = match self.client.request_text(request).await {
                Ok(text) => text,
                Err(error) if is_gone(&error) => {
                    self.lists = Lists::Whole;
                    return Err(Failure::Forgotten);
                }
                Err(error) if self.has_no_kind(&error) => return Err(Failure::Absent),
                Err(error) => return Err(failure(&error, Step::List)),
            };
            let page: Page<'_> = serde_json::from_str(&text)
                .map_err(|error| other(format!("a list cannot be read: {error}"), Step::List))?;
            for item in page.items.into_iter().flatten() {
                complete &= self.tell(item, false).await?.is_some();
            }
            next = page.metadata.r#continue.filter(|next| !next.is_empty());
            if next.is_none() {
                if page.metadata.resource_version.is_empty() {
                    return Err(other("a list says no resourceVersion".to_owned(), Step::List));
                }
                self.lists = Lists::Pages;
                self.end_list(complete).await?;
                return Ok(Step::Watch(page.metadata.resource_version));
            }
        }
    }

    /// Changes behind a version, or everything and then changes, as long as it goes on.
    async fn watch(&mut self, begin: Begin<'_>) -> Result<Step, Failure> {
        let (mut listing, mut version) = match begin {
            Begin::Everything => (true, String::new()),
            Begin::After(version) => (false, version.to_owned()),
        };
        // where to go on if this ends; a list that is not complete counts for nothing
        let resume = |listing: bool, version: &str| {
            if listing || version.is_empty() { Step::List } else { Step::Watch(version.to_owned()) }
        };
        let seconds = WATCH_SECONDS + RandomState::new().hash_one(self.kind as u8) % WATCH_SECONDS;
        let request = self.requests.watch(begin, seconds);
        let request = request.map_err(|error| other(error.to_string(), Step::List))?;
        let mut lines = match self.client.request_stream(request).await {
            Ok(stream) => Lines { stream: Box::pin(stream), line: Vec::new() },
            Err(kube::Error::Api(status)) if listing && matches!(status.code, 400 | 422) => {
                return Err(Failure::NotStreaming);
            }
            Err(error) if is_gone(&error) => return Err(Failure::Forgotten),
            Err(error) if self.has_no_kind(&error) => return Err(Failure::Absent),
            Err(error) => return Err(failure(&error, resume(listing, &version))),
        };
        if listing {
            self.begin_list().await?;
        } else {
            self.is_watching().await?;
        }
        let (started, mut complete) = (Instant::now(), true);
        let end = started + Duration::from_secs(seconds) + OVERTIME;
        loop {
            let until = if listing { end.min(Instant::now() + SILENCE) } else { end };
            let until = self.untold.map_or(until, |untold| if listing { until } else { until.min(untold) });
            let line = match tokio::time::timeout_at(until, lines.next()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => {
                    if started.elapsed() >= SUCCESS {
                        self.backoff.reset();
                    } else {
                        // ends as soon as it begins: not at full speed again
                        tokio::time::sleep(self.backoff.next()).await;
                    }
                    return Ok(resume(listing, &version));
                }
                Ok(Err(error)) => {
                    if started.elapsed() >= SUCCESS {
                        self.backoff.reset();
                    }
                    let reason = cluster::explain(&kube::Error::ReadEvents(error));
                    return Err(other(reason, resume(listing, &version)));
                }
                Err(_elapsed) if listing => return Err(Failure::NotStreaming),
                Err(_elapsed) if self.untold.take().is_some() => return Ok(Step::List),
                Err(_elapsed) => return Ok(resume(listing, &version)),
            };
            let Ok(line) = serde_json::from_slice::<Line<'_>>(line) else {
                return Err(other(
                    "a line of the watch cannot be read".to_owned(),
                    resume(listing, &version),
                ));
            };
            match &*line.r#type {
                "ADDED" | "MODIFIED" | "DELETED" => {
                    match self.tell(line.object, line.r#type == "DELETED").await? {
                        Some(now) if !now.is_empty() => version = now,
                        Some(_) => {}
                        None => complete = false,
                    }
                }
                "BOOKMARK" => {
                    let Ok(bookmark) = serde_json::from_str::<Bookmark>(line.object.get()) else { continue };
                    version = bookmark.metadata.resource_version.clone();
                    if listing && bookmark.metadata.ends_initial() {
                        listing = false;
                        self.end_list(complete).await?;
                        self.is_watching().await?;
                        continue;
                    }
                }
                "ERROR" => {
                    let status = serde_json::from_str::<Status>(line.object.get()).unwrap_or_default();
                    let error = kube::Error::Api(status.boxed());
                    if is_gone(&error) {
                        return Err(Failure::Forgotten);
                    }
                    return Err(failure(&error, resume(listing, &version)));
                }
                other => tracing::debug!(event = other, "a watch says something new"),
            }
            if !listing {
                self.backoff.reset();
                if !complete && self.untold.is_none() {
                    self.untold = Some(Instant::now() + UNTOLD);
                }
            }
        }
    }

    /// Whether the server is one from before the kind.
    fn has_no_kind(&self, error: &kube::Error) -> bool {
        self.kind.is_recent() && matches!(error, kube::Error::Api(status) if status.code == 404)
    }

    /// There are no objects of a kind that is not there.
    async fn is_absent(&mut self) -> Result<(), Failure> {
        if !self.listed {
            tracing::info!(resource = self.requests.resource, "this API server does not have the kind");
        }
        // asked again and again, which is no list that had to be repeated
        self.listing().await?;
        self.end_list(true).await?;
        self.is_watching().await
    }

    async fn begin_list(&mut self) -> Result<(), Failure> {
        if self.listed {
            self.progress.relisting(self.kind);
        }
        self.listing().await
    }

    async fn listing(&mut self) -> Result<(), Failure> {
        self.untold = None;
        self.say(WatchEvent::Listing(self.kind)).await
    }

    async fn end_list(&mut self, complete: bool) -> Result<(), Failure> {
        self.listed = true;
        if !complete {
            self.untold = Some(Instant::now() + UNTOLD);
        }
        self.say(WatchEvent::Listed { kind: self.kind, complete }).await
    }

    async fn is_watching(&mut self) -> Result<(), Failure> {
        self.progress.watching(self.kind);
        let untold = self.untold.map(|_| {
            format!("some of {} cannot be told: none of them counts as gone", self.requests.resource)
        });
        self.trouble(untold).await
    }

    /// Says what an object is. Its version; `None` if nobody can tell which object it is.
    async fn tell(&mut self, object: &RawValue, gone: bool) -> Result<Option<String>, Failure> {
        let head = match serde_json::from_str::<Head>(object.get()) {
            Ok(head) if !head.metadata.name.is_empty() => head.metadata,
            Ok(_) | Err(_) => {
                tracing::warn!(
                    resource = self.requests.resource,
                    "an object without a name that can be read"
                );
                return Ok(None);
            }
        };
        let key = self.kind.key(&head.namespace, &head.name);
        let heard = if gone {
            WatchEvent::Gone(key, Owner { uid: head.uid.as_str().into() })
        } else {
            // this object only, and only for as long as it is converted
            let converted = serde_json::from_str(object.get())
                .map_err(|error| FieldError::new("object", error.to_string()))
                .and_then(|value| self.kind.convert(value));
            WatchEvent::Is(key, converted)
        };
        self.say(heard).await?;
        Ok(Some(head.resource_version))
    }

    async fn trouble(&mut self, reason: Option<String>) -> Result<(), Failure> {
        if reason.is_none() && !self.troubled {
            return Ok(());
        }
        self.troubled = reason.is_some();
        self.say(WatchEvent::Trouble(self.kind, reason)).await
    }

    async fn say(&self, heard: WatchEvent) -> Result<(), Failure> {
        self.heard.send(heard).await.map_err(|_closed| Failure::Closed)
    }
}

/// Lines of an answer that goes on.
struct Lines<S> {
    stream: S,
    line: Vec<u8>,
}

impl<S: AsyncBufRead + Unpin> Lines<S> {
    /// The next line; `None` at the end. What is behind the last line end is nothing.
    async fn next(&mut self) -> std::io::Result<Option<&[u8]>> {
        self.line.clear();
        self.stream.read_until(b'\n', &mut self.line).await?;
        Ok(self.line.strip_suffix(b"\n"))
    }
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410 || status.reason == "Expired")
}

fn failure(error: &kube::Error, then: Step) -> Failure {
    // a server in trouble may be well again in a moment; one that says no goes on saying it
    let refused = matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403));
    Failure::Other { reason: cluster::explain(error), refused, then }
}

fn other(reason: String, then: Step) -> Failure {
    Failure::Other { reason, refused: false, then }
}
