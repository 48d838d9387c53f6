//! Dispatches requests of the local API and produces their answers.
//!
//! Views come from the published status, the node task or the datapath; CNI requests go to the CNI
//! server. Knows no connection.

use std::{
    collections::HashMap,
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

/// Longest wait for an answer of the node task; after that it counts as stuck.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest time between two refreshes of names for an unknown address: addresses outside of the
/// cluster stay unknown.
const NAMES_MIN_REFRESH: Duration = Duration::from_secs(3);
/// Age after which names are refreshed: an address may get another owner.
const NAMES_MAX_AGE: Duration = Duration::from_secs(30);

/// Answer to a request.
#[derive(Debug)]
pub enum Answer {
    One(Value),
    Stream(EventStream),
}

/// Error of a view.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the agent is stopping")]
    Stopping,
    #[error(
        "the agent did not answer within {QUERY_TIMEOUT:?}; check its log, and restart it if this persists"
    )]
    Stuck,
    #[error("the datapath is not loaded yet")]
    NoDatapath,
    #[error("{0}")]
    Datapath(String),
    #[error("cannot serialise the answer: {0}")]
    Json(#[from] serde_json::Error),
}

/// Answers requests. It starts before the datapath and the CNI server; requests that need them fail
/// until then.
pub struct Api {
    status: watch::Receiver<Status>,
    queries: mpsc::Sender<Query>,
    metrics: Arc<Metrics>,
    history: History,
    datapath: OnceLock<Arc<dyn DatapathReader>>,
    cni: OnceLock<Arc<dyn CniServer>>,
    names: Mutex<(Option<Instant>, Arc<Names>)>,
}

impl Api {
    /// Answers from `status`, and asks the node task through `queries`.
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
            datapath: OnceLock::new(),
            cni: OnceLock::new(),
            names: Mutex::new((None, Arc::default())),
        })
    }

    /// Sets the datapath for views and metrics. Call it once, inside the runtime.
    pub fn set_datapath_reader(&self, datapath: Arc<dyn DatapathReader>) {
        self.metrics.set_datapath_reader(Arc::clone(&datapath));
        tokio::spawn(self.history.clone().record(datapath.events()));
        let _first = self.datapath.set(datapath);
    }

    /// Sets the CNI server. Call it once.
    pub fn set_cni(&self, cni: Arc<dyn CniServer>) {
        self.metrics.set_cni(Arc::clone(&cni));
        let _first = self.cni.set(cni);
    }

    /// Answers one request line. An error is an answer, too.
    pub async fn answer(self: &Arc<Self>, line: &[u8]) -> Answer {
        match serde_json::from_slice::<Value>(line) {
            // requests of the CLI name a view; all others are the CNI plugin's
            Ok(request) if request.get("view").is_some() => self.answer_cli(request).await,
            Ok(request) if request.is_object() => Answer::One(self.answer_cni(request).await),
            Ok(_) => Answer::One(error("bad request: not a JSON object")),
            Err(problem) => Answer::One(error(&format!("bad request: {problem}"))),
        }
    }

    async fn answer_cni(&self, request: Value) -> Value {
        let Some(cni) = self.cni.get() else {
            return error("the agent is starting and cannot add or remove pods yet; retry");
        };
        let started = Instant::now();
        let answer = cni.answer(request).await;
        self.metrics.cni_request(answer.verb, answer.result, started.elapsed());
        answer.response
    }

    async fn answer_cli(self: &Arc<Self>, request: Value) -> Answer {
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
            View::Services => result(&self.query(Query::Services).await?),
            View::Endpoints => result(&self.query(Query::Endpoints).await?),
            View::Routes => result(&self.query(Query::Routes).await?),
            View::Flows(filter) => result(&self.flows(filter).await?),
            View::Events(filter) => Ok(Answer::Stream(EventStream::new(Arc::clone(self), filter))),
        }
    }

    async fn status(&self) -> Result<StatusView, ApiError> {
        let status = self.status.borrow().clone();
        // a starting agent has a status too
        let outcomes = match self.read(|datapath| datapath.counts()).await {
            Err(ApiError::NoDatapath) => Vec::new(),
            counts => largest_first(counts?),
        };
        let ipam = self.cni.get().map(|cni| cni.ranges()).unwrap_or_default();
        Ok(StatusView { ready: status.is_ready(), status, outcomes, ipam })
    }

    async fn flows(&self, filter: FlowFilter) -> Result<FlowList, ApiError> {
        let mut flows = self.read(|datapath| datapath.flows()).await?;
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

    /// Sends a query to the node task and waits for its answer.
    async fn query<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, ApiError> {
        let (reply, result) = oneshot::channel();
        let exchange = async {
            self.queries.send(query(reply)).await.map_err(|_closed| ApiError::Stopping)?;
            result.await.map_err(|_dropped| ApiError::Stopping)
        };
        timeout(QUERY_TIMEOUT, exchange).await.map_err(|_elapsed| ApiError::Stuck)?
    }

    /// Reads the datapath on a blocking thread.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn DatapathReader) -> Result<T, String> + Send + 'static,
    ) -> Result<T, ApiError> {
        let datapath = Arc::clone(self.datapath.get().ok_or(ApiError::NoDatapath)?);
        spawn_blocking(move || read(datapath.as_ref()))
            .await
            .map_err(|panicked| ApiError::Datapath(panicked.to_string()))?
            .map_err(ApiError::Datapath)
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }

    /// Names, at most [`NAMES_MAX_AGE`] old.
    pub(super) async fn names(&self) -> Arc<Names> {
        let (made, names) = self.names.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if made.is_some_and(|made| made.elapsed() < NAMES_MAX_AGE) {
            names
        } else {
            self.refresh_names().await
        }
    }

    /// Names newer than `names`; `None` if they were refreshed less than [`NAMES_MIN_REFRESH`] ago.
    pub(super) async fn fresher_names(&self, names: &Arc<Names>) -> Option<Arc<Names>> {
        let (made, current) = self.names.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !Arc::ptr_eq(&current, names) {
            return Some(current);
        }
        let due = made.is_none_or(|made| made.elapsed() >= NAMES_MIN_REFRESH);
        if due { Some(self.refresh_names().await) } else { None }
    }

    /// Without an answer of the node task the names are empty: views are shown without them.
    async fn refresh_names(&self) -> Arc<Names> {
        let services = self.query(Query::Services).await.unwrap_or_default();
        let endpoints = self.query(Query::Endpoints).await.unwrap_or_default();
        let names = Arc::new(Names::new(&services, &endpoints, &self.status.borrow(), devices()));
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) =
            (Some(Instant::now()), Arc::clone(&names));
        names
    }
}

/// Names of the node's devices by index; none if they cannot be listed, which only costs names.
fn devices() -> HashMap<u32, String> {
    let devices = nix::net::if_::if_nameindex();
    let named = devices.iter().flat_map(nix::net::if_::Interfaces::iter);
    named.map(|device| (device.index(), device.name().to_string_lossy().into_owned())).collect()
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

/// The form of an error answer.
pub(super) fn error(message: &str) -> Value {
    json!({ "error": message })
}

fn result(value: &impl Serialize) -> Result<Answer, ApiError> {
    Ok(Answer::One(json!({ "result": serde_json::to_value(value)? })))
}

fn largest_first(mut counts: Vec<CountView>) -> Vec<CountView> {
    counts.sort_by_key(|count| std::cmp::Reverse(count.packets));
    counts
}
