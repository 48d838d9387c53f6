//! What a request line means, and its answer.
//!
//! Owns the hand-over: views to those who know (the published status, the task that owns the state, the datapath), the
//! verbs of the CNI to its server. Knows no connection.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::timeout,
};

use super::{
    cni::CniServer,
    datapath::DatapathReader,
    events::EventStream,
    history::History,
    names::Names,
    query::Query,
    request::{FlowFilter, FlowList, View},
    views::{CountView, Status, StatusView},
};
use crate::metrics::{Metrics, RequestResult};

/// How long the task that owns the state may take. Longer means that it is stuck.
const PATIENCE: Duration = Duration::from_secs(10);
/// Names are made anew for an unknown address at most this often: outside addresses never get one.
const NAMES_EVERY: Duration = Duration::from_secs(3);
/// Names are believed for this long: an address may get another owner.
const NAMES_LAST: Duration = Duration::from_secs(30);

/// What a client gets.
#[derive(Debug)]
pub enum Answer {
    One(Value),
    Stream(EventStream),
}

/// Why there is no answer to a view.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the agent is stopping")]
    Stopping,
    #[error("the agent did not answer within {} s: it is stuck", PATIENCE.as_secs())]
    Stuck,
    #[error("the datapath is not loaded yet")]
    NoDatapath,
    #[error("{0}")]
    Datapath(String),
    #[error("the answer cannot be written: {0}")]
    Json(#[from] serde_json::Error),
}

/// All an answer is made of. Starts before the datapath and the CNI server are there: what needs them says so.
pub struct Api {
    status: watch::Receiver<Status>,
    queries: mpsc::Sender<Query>,
    metrics: Arc<Metrics>,
    history: History,
    live: OnceLock<Arc<dyn DatapathReader>>,
    cni: OnceLock<Arc<dyn CniServer>>,
    names: Mutex<(Option<Instant>, Arc<Names>)>,
}

impl Api {
    /// An API over what `status` and `queries` lead to.
    pub fn new(
        status: watch::Receiver<Status>,
        queries: mpsc::Sender<Query>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            status,
            queries,
            metrics,
            history: History::default(),
            live: OnceLock::new(),
            cni: OnceLock::new(),
            names: Mutex::new((None, Arc::default())),
        })
    }

    /// From now on the datapath can be read, here and by the metrics. Call it once, inside the runtime.
    pub fn set_datapath_reader(&self, live: Arc<dyn DatapathReader>) {
        self.metrics.set_datapath_reader(Arc::clone(&live));
        tokio::spawn(self.history.clone().record(live.events()));
        let _first = self.live.set(live);
    }

    /// From now on pods can be added. Call it once.
    pub fn set_cni(&self, cni: Arc<dyn CniServer>) {
        self.metrics.set_cni(Arc::clone(&cni));
        let _first = self.cni.set(cni);
    }

    /// The answer to one line. Never fails: what is wrong is the answer.
    pub async fn answer(self: &Arc<Self>, line: &[u8]) -> Answer {
        match serde_json::from_slice::<Value>(line) {
            // what the CLI asks names a view; everything else is the plugin's
            Ok(request) if request.get("view").is_some() => self.cli(request).await,
            Ok(request) if request.is_object() => Answer::One(self.plugin(request).await),
            Ok(_) => Answer::One(error("bad request: not a JSON object")),
            Err(problem) => Answer::One(error(&format!("bad request: {problem}"))),
        }
    }

    async fn plugin(&self, request: Value) -> Value {
        let Some(cni) = self.cni.get() else {
            return error("the agent is starting: it cannot add or remove pods yet");
        };
        let started = Instant::now();
        let answer = cni.answer(request).await;
        self.metrics.cni_request(answer.verb, answer.result, started.elapsed());
        answer.response
    }

    async fn cli(self: &Arc<Self>, request: Value) -> Answer {
        let started = Instant::now();
        let view = match serde_json::from_value::<View>(request) {
            Ok(view) => view,
            Err(problem) => return Answer::One(error(&format!("bad request: {problem}"))),
        };
        let name = view.name();
        let answer = self.view(view).await;
        self.metrics.api_request(name, RequestResult::from(&answer), started.elapsed());
        answer.unwrap_or_else(|problem| Answer::One(error(&problem.to_string())))
    }

    async fn view(self: &Arc<Self>, view: View) -> Result<Answer, ApiError> {
        match view {
            View::Status => result(&self.status().await?),
            View::Services => result(&self.ask(Query::Services).await?),
            View::Endpoints => result(&self.ask(Query::Endpoints).await?),
            View::Routes => result(&self.ask(Query::Routes).await?),
            View::Flows(filter) => result(&self.flows(filter).await?),
            View::Events(filter) => Ok(Answer::Stream(EventStream::new(Arc::clone(self), filter))),
        }
    }

    async fn status(&self) -> Result<StatusView, ApiError> {
        let status = self.status.borrow().clone();
        // a starting agent has a status too
        let outcomes = match self.read(|live| live.counts()).await {
            Err(ApiError::NoDatapath) => Vec::new(),
            counts => most_first(counts?),
        };
        let ipam = self.cni.get().map(|cni| cni.ranges()).unwrap_or_default();
        Ok(StatusView { ready: status.is_ready(), status, outcomes, ipam })
    }

    async fn flows(&self, filter: FlowFilter) -> Result<FlowList, ApiError> {
        let mut flows = self.read(|live| live.flows()).await?;
        let names = self.names().await;
        let total = flows.len();
        for flow in &mut flows {
            names.name_flow(flow);
        }
        flows.retain(|flow| filter.matches(flow));
        let matching = flows.len();
        flows.truncate(filter.limit.unwrap_or(usize::MAX));
        Ok(FlowList { matching, total, flows })
    }

    /// Asks the task that owns the state.
    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, ApiError> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.queries.send(query(answer)).await.map_err(|_closed| ApiError::Stopping)?;
            answered.await.map_err(|_dropped| ApiError::Stopping)
        };
        timeout(PATIENCE, asked).await.map_err(|_elapsed| ApiError::Stuck)?
    }

    /// Reads the datapath, on a thread that may block.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn DatapathReader) -> Result<T, String> + Send + 'static,
    ) -> Result<T, ApiError> {
        let live = Arc::clone(self.live.get().ok_or(ApiError::NoDatapath)?);
        spawn_blocking(move || read(live.as_ref()))
            .await
            .map_err(|panicked| ApiError::Datapath(panicked.to_string()))?
            .map_err(ApiError::Datapath)
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }

    /// What is known by name, as of a while ago.
    pub(super) async fn names(&self) -> Arc<Names> {
        let (made, names) = self.names.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if made.is_some_and(|made| made.elapsed() < NAMES_LAST) { names } else { self.make_names().await }
    }

    /// Names made since `names` were, or made now unless that was done a moment ago.
    pub(super) async fn fresher_names(&self, names: &Arc<Names>) -> Option<Arc<Names>> {
        let (made, current) = self.names.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !Arc::ptr_eq(&current, names) {
            return Some(current);
        }
        let due = made.is_none_or(|made| made.elapsed() >= NAMES_EVERY);
        if due { Some(self.make_names().await) } else { None }
    }

    /// Without an answer there are no names, and no reason not to show the rest.
    async fn make_names(&self) -> Arc<Names> {
        let services = self.ask(Query::Services).await.unwrap_or_default();
        let endpoints = self.ask(Query::Endpoints).await.unwrap_or_default();
        let names = Arc::new(Names::of(&services, &endpoints, &self.status.borrow()));
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) =
            (Some(Instant::now()), Arc::clone(&names));
        names
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

/// An answer that is an error.
pub(super) fn error(message: &str) -> Value {
    json!({ "error": message })
}

fn result(value: &impl Serialize) -> Result<Answer, ApiError> {
    Ok(Answer::One(json!({ "result": serde_json::to_value(value)? })))
}

fn most_first(mut counts: Vec<CountView>) -> Vec<CountView> {
    counts.sort_by_key(|count| std::cmp::Reverse(count.packets));
    counts
}
