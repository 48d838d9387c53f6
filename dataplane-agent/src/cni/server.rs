//! The CNI server: decodes a request of the plugin and encodes the response. ADD and CHECK are in
//! `add`, DEL and GC in `del`.

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

/// Settings for new pods of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// Pod ranges of this node, at most one per family. If empty, no pod can be added.
    pub ranges: Vec<IpNet>,
    pub mtu: u32,
    /// Source addresses of the node towards its pods, at most one per family. A device of the node
    /// has them.
    pub sources: Vec<IpAddr>,
}

/// The CNI server. Clones share their state.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

/// State that the CNI operations share.
pub(super) struct Shared {
    pub(super) netlink: Netlink,
    pub(super) datapath: Arc<dyn PodDatapath>,
    pub(super) container_locks: KeyedMutex,
    store: Store,
    state: Mutex<State>,
}

/// Pods and addresses. The lock is never held across an await.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) network: PodNetwork,
    pub(super) ipam: Ipam,
    /// By name of the host device.
    pub(super) pods: BTreeMap<String, PodEntry>,
    /// Sequence number of the newest record.
    pub(super) sequence: u64,
}

/// A pod with addresses.
#[derive(Clone, Debug)]
pub(super) struct PodEntry {
    /// `None` if the record is lost and only the device exists.
    pub(super) record: Option<Record>,
    /// Its `ifindex` is 0 until the device is created.
    pub(super) device: PodDevice,
}

impl Server {
    /// Starts a server: recovers the pods from records, devices and pending deletions. The caller
    /// already listens on the socket in `run_dir`, and attaches the datapath to the recovered pods.
    /// No pod can be added before [`Self::configure`].
    pub async fn start(
        netlink: Netlink,
        datapath: Arc<dyn PodDatapath>,
        state_dir: &Path,
        run_dir: &Path,
    ) -> Result<(Self, Recovery), CniError> {
        let store = Store::open(state_dir)?;
        let (state, recovery) =
            recovery::recover(&netlink, &store, &DeletionQueue::in_run_dir(run_dir)).await?;
        let (container_locks, state) = (KeyedMutex::default(), Mutex::new(state));
        let shared = Arc::new(Shared { netlink, datapath, container_locks, store, state });
        Ok((Self { shared }, recovery))
    }

    /// Sets the settings for new pods. Existing pods do not change.
    pub fn configure(&self, network: PodNetwork) {
        let mut state = self.shared.state();
        state.ipam.set_ranges(&network.ranges);
        state.network = network;
    }

    /// Releases the addresses of pods whose device vanished without a DEL. Called by a timer.
    pub async fn release_vanished(&self) {
        // a separate task: a release completes even if the caller is cancelled
        let shared = Arc::clone(&self.shared);
        let done = tokio::spawn(async move { shared.release_vanished().await });
        if let Err(error) = done.await.unwrap_or_else(|error| Err(CniError::Panicked(error))) {
            tracing::warn!(%error, "cannot look for pods whose device vanished without CNI DEL; retrying later");
        }
    }

    /// Every pod that has a device.
    pub fn pods(&self) -> Vec<PodDevice> {
        let state = self.shared.state();
        state.pods.values().map(|entry| entry.device.clone()).filter(|device| device.ifindex != 0).collect()
    }
}

impl CniServer for Server {
    fn answer(&self, request: Value) -> BoxFuture<'_, CniAnswer> {
        let shared = Arc::clone(&self.shared);
        async move {
            let request = match serde_json::from_value::<Request>(request) {
                Ok(request) => request,
                Err(error) => return answer("unknown", "unknown", Err(CniError::Request(error))),
            };
            let (verb, object) = (request.name(), request.object());
            // a separate task: the request completes even if the plugin closes the connection
            let work = tokio::spawn(async move { shared.handle(request).await });
            answer(verb, &object, work.await.unwrap_or_else(|error| Err(CniError::Panicked(error))))
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

    /// Whether pods can be added. An exhausted range is not an error here: the runtime would report
    /// the node as not ready, and its pods would be evicted.
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

    /// The pod with this host device.
    pub(super) fn pod(&self, device: &str) -> Option<PodEntry> {
        self.state().pods.get(device).cloned()
    }

    /// Runs `work` on the record store, on a blocking thread.
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
        f.debug_struct("Shared").field("datapath", &self.datapath).finish_non_exhaustive()
    }
}

fn answer(verb: &'static str, object: &str, result: Result<Response, CniError>) -> CniAnswer {
    let response = result.unwrap_or_else(|error| {
        let failure = error.failure();
        tracing::warn!(verb, object, code = failure.code, %error, advice = error.advice(), "CNI request failed");
        Response::Failed(failure)
    });
    let result = match &response {
        Response::Failed(_) => RequestResult::Error,
        Response::Added(_) | Response::Done => RequestResult::Ok,
    };
    let response = serde_json::to_value(response).unwrap_or_else(|error| {
        // cannot happen with strings and numbers; the plugin understands this form too
        serde_json::json!({ "error": error.to_string() })
    });
    CniAnswer { verb, result, response }
}
