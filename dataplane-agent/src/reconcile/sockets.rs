//! Destroys connected UDP sockets of removed backends.
//!
//! A UDP socket translated at connect keeps its backend. When the backend is removed, the kernel is
//! told to destroy the socket (`SOCK_DESTROY`), so that its process connects again. A task of its
//! own, because scanning the sockets of many pods takes time and tables must not wait. The datapath
//! records the cookies of translated sockets: a socket that a process connected to the same address
//! itself is never touched.

mod kernel;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use dataplane_common::abi::{Addr, ConnectedPeer, Port};
use tokio::{
    sync::{mpsc::UnboundedReceiver, watch},
    time::{sleep_until, timeout},
};

pub use self::kernel::{KernelSockets, Netns, SocketTable, SocketsError};
use crate::{
    api::views::{Origin, ProblemView},
    netlink::SockDiagError,
};

/// Backends are often removed in groups: one scan serves all of them.
const BATCH_WINDOW: Duration = Duration::from_millis(5);
/// A socket may have selected its backend but not be connected yet: scan once more after this time.
const RESCAN_DELAY: Duration = Duration::from_secs(1);
/// Pause after a scan, as a multiple of its duration.
const PAUSE_FACTOR: u32 = 10;

/// A UDP backend of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UdpBackend {
    /// ID of the service port; 0 for any: sockets of earlier programs do not have it.
    pub service: u32,
    pub addr: Addr,
    pub port: Port,
}

/// An update for [`Sockets`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketUpdate {
    /// The backend was removed.
    BackendRemoved(UdpBackend),
    /// The backend was added, perhaps again.
    BackendAdded(UdpBackend),
    /// All existing backends. An earlier agent may have left sockets of others.
    AllBackends(HashSet<UdpBackend>),
    /// A pod of this node: the name of its device, and the path of its network namespace.
    PodAdded(String, PathBuf),
    PodRemoved(String),
}

/// Removed backends, and the namespaces where their sockets may be.
#[derive(Debug)]
pub struct Sockets<T> {
    table: T,
    updates: UnboundedReceiver<SocketUpdate>,
    problems: watch::Sender<Vec<ProblemView>>,
    /// The network namespace of each pod, by the name of its device.
    pods: BTreeMap<String, Netns>,
    /// Cookies of the namespaces scanned so far.
    cookies: BTreeMap<Netns, Option<u64>>,
    removed: RemovedBackends,
    /// The backends of the last scan, and when to scan for them once more.
    previous: Option<(RemovedBackends, Instant)>,
    /// Earliest time of the next scan.
    next_scan: Instant,
}

/// Backends whose sockets are destroyed.
#[derive(Clone, Debug, Default)]
struct RemovedBackends {
    removed: HashSet<UdpBackend>,
    all: Option<HashSet<UdpBackend>>,
}

impl RemovedBackends {
    fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.all.is_none()
    }

    fn has(&self, peer: &ConnectedPeer) -> bool {
        let backend = UdpBackend { service: peer.service_id, addr: peer.backend, port: peer.port };
        self.removed.contains(&backend) || self.all.as_ref().is_some_and(|all| !all.contains(&backend))
    }

    fn on_removed(&mut self, backend: UdpBackend) {
        self.removed.insert(backend);
        if let Some(all) = &mut self.all {
            all.remove(&backend);
        }
    }

    fn on_added(&mut self, backend: UdpBackend) {
        self.removed.remove(&backend);
        if let Some(all) = &mut self.all {
            all.insert(backend);
        }
    }

    /// Adds an earlier set.
    fn merge(&mut self, earlier: Self) {
        self.removed.extend(earlier.removed);
        self.all = self.all.take().or(earlier.all);
    }
}

impl<T: SocketTable> Sockets<T> {
    /// Creates the task, and a receiver of its current problems.
    pub fn new(
        table: T,
        updates: UnboundedReceiver<SocketUpdate>,
    ) -> (Self, watch::Receiver<Vec<ProblemView>>) {
        let (problems, published) = watch::channel(Vec::new());
        let sockets = Self {
            table,
            updates,
            problems,
            pods: BTreeMap::new(),
            cookies: BTreeMap::new(),
            removed: RemovedBackends::default(),
            previous: None,
            next_scan: Instant::now(),
        };
        (sockets, published)
    }

    /// Runs until the sender of updates is gone.
    pub async fn run(mut self) {
        loop {
            let due = self.due();
            tokio::select! {
                update = self.updates.recv() => {
                    let Some(update) = update else { return };
                    self.on_update(update);
                    self.drain_updates().await;
                }
                () = sleep_until_due(due) => self.scan().await,
            }
        }
    }

    /// When to scan.
    fn due(&self) -> Option<Instant> {
        let rescan = self.previous.as_ref().map(|(_, at)| *at);
        let due = if self.removed.is_empty() { rescan? } else { self.next_scan };
        Some(due.max(self.next_scan))
    }

    async fn drain_updates(&mut self) {
        let end = Instant::now() + BATCH_WINDOW;
        let left = || end.saturating_duration_since(Instant::now());
        while let Ok(Some(update)) = timeout(left(), self.updates.recv()).await {
            self.on_update(update);
        }
    }

    fn on_update(&mut self, update: SocketUpdate) {
        match update {
            SocketUpdate::BackendRemoved(backend) => self.removed.on_removed(backend),
            SocketUpdate::BackendAdded(backend) => {
                self.removed.on_added(backend);
                if let Some((previous, _)) = &mut self.previous {
                    previous.on_added(backend);
                }
            }
            SocketUpdate::AllBackends(backends) => self.removed.all = Some(backends),
            SocketUpdate::PodAdded(name, netns) => {
                let netns = Netns::Pod(netns);
                self.cookies.remove(&netns);
                self.pods.insert(name, netns);
            }
            SocketUpdate::PodRemoved(name) => {
                if let Some(netns) = self.pods.remove(&name) {
                    self.cookies.remove(&netns);
                }
            }
        }
    }

    /// Scans for the sockets of all removed backends.
    async fn scan(&mut self) {
        let began = Instant::now();
        let mut removed = std::mem::take(&mut self.removed);
        let previous = self.previous.take();
        if !removed.is_empty() {
            self.previous = Some((removed.clone(), began + RESCAN_DELAY));
        }
        if let Some((previous, _)) = previous {
            removed.merge(previous);
        }
        let problems = match self.table.peers().await {
            Ok(peers) => self.destroy(peers.into_iter().filter(|(_, peer)| removed.has(peer))).await,
            Err(error) => vec![error.to_string()],
        };
        self.publish(problems);
        self.next_scan = Instant::now() + began.elapsed() * PAUSE_FACTOR;
    }

    /// Destroys the sockets in their namespaces. Returns errors as sentences.
    async fn destroy(&mut self, sockets: impl Iterator<Item = (u64, ConnectedPeer)>) -> Vec<String> {
        let mut by_netns: HashMap<u64, HashSet<u64>> = HashMap::new();
        for (cookie, peer) in sockets {
            by_netns.entry(peer.netns).or_default().insert(cookie);
        }
        let mut problems = Vec::new();
        let namespaces: Vec<Netns> = [Netns::Host].into_iter().chain(self.pods.values().cloned()).collect();
        for netns in namespaces {
            if by_netns.is_empty() {
                break;
            }
            match self.destroy_in(&netns, &mut by_netns).await {
                Ok(0) => {}
                Ok(destroyed) => {
                    tracing::info!(?netns, sockets = destroyed, "destroyed UDP sockets of removed backends");
                }
                // the pod may be terminating
                Err(SocketsError::Netns(error)) => {
                    tracing::debug!(%error, "cannot open network namespace of pod");
                }
                Err(error) => {
                    let is_final = matches!(error, SocketsError::Kernel(SockDiagError::Unsupported(_)));
                    problems.push(error.to_string());
                    if is_final {
                        break;
                    }
                }
            }
        }
        problems
    }

    async fn destroy_in(
        &mut self,
        netns: &Netns,
        by_netns: &mut HashMap<u64, HashSet<u64>>,
    ) -> Result<usize, SocketsError> {
        let netns_cookie = match self.cookies.get(netns) {
            Some(known) => *known,
            None => {
                let found = self.table.netns(netns).await?;
                self.cookies.insert(netns.clone(), found);
                found
            }
        };
        let sockets = match netns_cookie {
            Some(netns_cookie) => by_netns.remove(&netns_cookie),
            // the kernel does not tell the namespace: try all cookies, which are unique to sockets
            None => Some(by_netns.values().flatten().copied().collect()),
        };
        match sockets {
            Some(sockets) => self.table.destroy(netns, sockets).await,
            None => Ok(0),
        }
    }

    fn publish(&self, messages: Vec<String>) {
        let problem =
            |message| ProblemView { origin: Origin::Datapath, subject: "UDP sockets".to_owned(), message };
        let problems: Vec<_> = messages.into_iter().map(problem).collect();
        self.problems.send_if_modified(|published| {
            if *published == problems {
                return false;
            }
            for problem in problems.iter().filter(|problem| !published.contains(problem)) {
                tracing::warn!(problem = problem.message, "cannot destroy UDP sockets of removed backends");
            }
            *published = problems;
            true
        });
    }
}

async fn sleep_until_due(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
