//! Answers the plugin: a request to a verb, a result to a response. What the verbs do is in `add` (with CHECK) and
//! `del` (with GC).

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dataplane_cni::{
    pending_deletes::DeletionQueue,
    protocol::{Failure, Request, Response, code},
};
use futures::{FutureExt as _, future::BoxFuture};
use ipnet::IpNet;
use serde_json::Value;
use tokio::task::spawn_blocking;

use super::{
    CniError, PodDatapath, PodDevice, Recovery,
    ipam::Ipam,
    keyed_mutex::KeyedMutex,
    pods::{Record, RecordError, Store},
    recovery,
};
use crate::{
    api::{
        cni::{CniAnswer, CniServer},
        views::IpamView,
    },
    metrics::RequestResult,
    netlink::Netlink,
};

/// What pods of this node get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// Pod ranges of this node, one per family. Empty: no pod can be added.
    pub ranges: Vec<IpNet>,
    pub mtu: u32,
    /// The addresses the node speaks to its pods with, at most one per family. They are on a device of the node.
    pub sources: Vec<IpAddr>,
}

/// Answers the plugin. Clones are the same server.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What the verbs work with.
pub(super) struct Shared {
    pub(super) netlink: Netlink,
    pub(super) wiring: Arc<dyn PodDatapath>,
    pub(super) turns: KeyedMutex,
    store: Store,
    state: Mutex<State>,
}

/// What is known. Never locked while anything is waited for.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) network: PodNetwork,
    pub(super) ipam: Ipam,
    /// By name of the host's side.
    pub(super) pods: BTreeMap<String, Held>,
    /// Of the newest record.
    pub(super) sequence: u64,
}

/// A pod that has addresses.
#[derive(Clone, Debug)]
pub(super) struct Held {
    /// Absent if the record is lost and only the device is left.
    pub(super) record: Option<Record>,
    /// Its `ifindex` is 0 until the device is made.
    pub(super) device: PodDevice,
}

impl Server {
    /// A server over the records in the state directory, brought into line with the devices there are, and with the
    /// notes of pods that went meanwhile in the run directory, on whose socket the caller listens already. Pods that
    /// are found alive are for the caller to hand to the datapath. Until [`Self::configure`] no pod can be added.
    pub async fn start(
        netlink: Netlink,
        wiring: Arc<dyn PodDatapath>,
        state_dir: &Path,
        run_dir: &Path,
    ) -> Result<(Self, Recovery), CniError> {
        let store = Store::open(state_dir)?;
        let (state, recovery) = recovery::recover(&netlink, &store, &DeletionQueue::of(run_dir)).await?;
        let (turns, state) = (KeyedMutex::default(), Mutex::new(state));
        let shared = Arc::new(Shared { netlink, wiring, turns, store, state });
        Ok((Self { shared }, recovery))
    }

    /// What new pods get from now on. Pods that are there keep what they have.
    pub fn configure(&self, network: PodNetwork) {
        let mut state = self.shared.state();
        state.ipam.set_ranges(&network.ranges);
        state.network = network;
    }

    /// Frees the addresses of pods whose device is gone although nobody deleted them. To be called by timer.
    pub async fn sweep(&self) {
        // a task of its own: a release is not left half done because somebody stopped waiting for it
        let shared = Arc::clone(&self.shared);
        let swept = tokio::spawn(async move { shared.sweep().await });
        if let Err(error) = swept.await.unwrap_or_else(|error| Err(CniError::Panicked(error))) {
            tracing::warn!(%error, "look for pods that are gone");
        }
    }

    /// Every pod that has a device.
    pub fn pods(&self) -> Vec<PodDevice> {
        let state = self.shared.state();
        state.pods.values().map(|held| held.device.clone()).filter(|device| device.ifindex != 0).collect()
    }
}

impl CniServer for Server {
    fn answer(&self, request: Value) -> BoxFuture<'_, CniAnswer> {
        let shared = Arc::clone(&self.shared);
        async move {
            let request = match serde_json::from_value::<Request>(request) {
                Ok(request) => request,
                Err(error) => return answer("unknown", Err(CniError::Request(error))),
            };
            let verb = request.name();
            // a task of its own: half a pod is not left behind because somebody stopped waiting for it
            let work = tokio::spawn(async move { shared.handle(request).await });
            answer(verb, work.await.unwrap_or_else(|error| Err(CniError::Panicked(error))))
        }
        .boxed()
    }

    fn ranges(&self) -> Vec<IpamView> {
        self.shared.state().ipam.ranges()
    }
}

impl Shared {
    async fn handle(&self, request: Request) -> Result<Response, CniError> {
        match request {
            Request::Add(add) => self.add(add).await.map(Response::Added),
            Request::Del(del) => self.del(&del).await.map(|()| Response::Done),
            Request::Check(check) => self.check(&check).await.map(|()| Response::Done),
            Request::Gc(gc) => self.gc(&gc).await.map(|()| Response::Done),
            Request::Status => Ok(self.status()),
        }
    }

    /// Whether pods can be added. An exhausted range does not count: a runtime tells that the node is broken if we say
    /// no here, and its pods would be moved away.
    fn status(&self) -> Response {
        match self.network() {
            Ok(_) => Response::Done,
            Err(error) => Response::Failed(Failure { code: code::NOT_AVAILABLE, ..error.failure() }),
        }
    }

    pub(super) fn network(&self) -> Result<PodNetwork, CniError> {
        let network = self.state().network.clone();
        if network.ranges.is_empty() { Err(CniError::NotConfigured) } else { Ok(network) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a pod, by the name of its device.
    pub(super) fn held(&self, device: &str) -> Option<Held> {
        self.state().pods.get(device).cloned()
    }

    /// Works with the records, on a thread that may block.
    pub(super) async fn with_store(
        &self,
        work: impl FnOnce(&Store) -> Result<(), RecordError> + Send + 'static,
    ) -> Result<(), CniError> {
        let store = self.store.clone();
        spawn_blocking(move || work(&store)).await.map_err(CniError::Panicked)??;
        Ok(())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("wiring", &self.wiring).finish_non_exhaustive()
    }
}

fn answer(verb: &'static str, result: Result<Response, CniError>) -> CniAnswer {
    let response = result.unwrap_or_else(|error| {
        let failure = error.failure();
        tracing::warn!(verb, code = failure.code, %error, "CNI request failed");
        Response::Failed(failure)
    });
    let result = match &response {
        Response::Failed(_) => RequestResult::Error,
        Response::Added(_) | Response::Done => RequestResult::Ok,
    };
    let response = serde_json::to_value(response).unwrap_or_else(|error| {
        // strings and numbers: it cannot happen, and the plugin understands this all the same
        serde_json::json!({ "error": error.to_string() })
    });
    CniAnswer { verb, result, response }
}
