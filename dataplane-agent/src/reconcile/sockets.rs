//! Connected UDP sockets of backends that are gone.
//!
//! A socket that was translated when it connected asks nobody again: when its backend is gone, the kernel is told to end
//! its conversation, and whoever owns it connects anew. A task of its own, because looking at the sockets of many pods
//! takes its time and the tables must not wait for it. Which sockets were translated, the datapath remembers by their
//! numbers: one that is connected to the same address by its own choice is never touched.

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

pub use self::kernel::{KernelSockets, Place, SocketTable, SocketsError};
use crate::{
    api::views::{Origin, ProblemView},
    netlink::SockDiagError,
};

/// Backends go in flocks: one look is for all of them.
const BREATH: Duration = Duration::from_millis(5);
/// A socket may have chosen its backend and not be connected yet when it is looked for: it is looked for again.
const AGAIN: Duration = Duration::from_secs(1);
/// After a look, so many times as long as it took is left to others.
const REST: u32 = 10;

/// Where datagrams of a connected socket go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UdpBackend {
    pub addr: Addr,
    pub port: Port,
}

/// What is said to [`Sockets`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketUpdate {
    /// Nobody's backend any more.
    Gone(UdpBackend),
    /// Somebody's again.
    Back(UdpBackend),
    /// All there are. Earlier agents may have left sockets of others.
    Only(HashSet<UdpBackend>),
    /// A pod of this node by the name of its device, and the file of its namespace.
    Pod(String, PathBuf),
    PodGone(String),
}

/// Backends whose sockets are looked for, and where.
#[derive(Debug)]
pub struct Sockets<T> {
    table: T,
    updates: UnboundedReceiver<SocketUpdate>,
    problems: watch::Sender<Vec<ProblemView>>,
    /// The namespace of each pod, by the name of its device.
    pods: BTreeMap<String, Place>,
    /// Cookies of namespaces, as far as somebody had to look there.
    cookies: BTreeMap<Place, Option<u64>>,
    wanted: Wanted,
    /// What the last look was for; looked for once more at this moment.
    before: Option<(Wanted, Instant)>,
    /// Not before this.
    next_look: Instant,
}

/// Whose sockets are to end.
#[derive(Clone, Debug, Default)]
struct Wanted {
    gone: HashSet<UdpBackend>,
    only: Option<HashSet<UdpBackend>>,
}

impl Wanted {
    fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.only.is_none()
    }

    fn has(&self, peer: &ConnectedPeer) -> bool {
        let backend = UdpBackend { addr: peer.backend, port: peer.port };
        self.gone.contains(&backend) || self.only.as_ref().is_some_and(|only| !only.contains(&backend))
    }

    fn gone(&mut self, backend: UdpBackend) {
        self.gone.insert(backend);
        if let Some(only) = &mut self.only {
            only.remove(&backend);
        }
    }

    fn back(&mut self, backend: UdpBackend) {
        self.gone.remove(&backend);
        if let Some(only) = &mut self.only {
            only.insert(backend);
        }
    }

    /// Both, where the other was there before.
    fn merge(&mut self, before: Self) {
        self.gone.extend(before.gone);
        self.only = self.only.take().or(before.only);
    }
}

impl<T: SocketTable> Sockets<T> {
    /// Does what comes through `updates`. Also gives what is wrong, whenever that changes.
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
            wanted: Wanted::default(),
            before: None,
            next_look: Instant::now(),
        };
        (sockets, published)
    }

    /// Until whoever speaks to it is gone.
    pub async fn run(mut self) {
        loop {
            let due = self.due();
            tokio::select! {
                update = self.updates.recv() => {
                    let Some(update) = update else { return };
                    self.take(update);
                    self.take_waiting().await;
                }
                () = until(due) => self.look().await,
            }
        }
    }

    /// When to look.
    fn due(&self) -> Option<Instant> {
        let again = self.before.as_ref().map(|(_, at)| *at);
        let due = if self.wanted.is_empty() { again? } else { self.next_look };
        Some(due.max(self.next_look))
    }

    async fn take_waiting(&mut self) {
        let end = Instant::now() + BREATH;
        let left = || end.saturating_duration_since(Instant::now());
        while let Ok(Some(update)) = timeout(left(), self.updates.recv()).await {
            self.take(update);
        }
    }

    fn take(&mut self, update: SocketUpdate) {
        match update {
            SocketUpdate::Gone(backend) => self.wanted.gone(backend),
            SocketUpdate::Back(backend) => {
                self.wanted.back(backend);
                if let Some((before, _)) = &mut self.before {
                    before.back(backend);
                }
            }
            SocketUpdate::Only(backends) => self.wanted.only = Some(backends),
            SocketUpdate::Pod(name, netns) => {
                let place = Place::Pod(netns);
                self.cookies.remove(&place);
                self.pods.insert(name, place);
            }
            SocketUpdate::PodGone(name) => {
                if let Some(place) = self.pods.remove(&name) {
                    self.cookies.remove(&place);
                }
            }
        }
    }

    /// Looks for the sockets of all who are gone.
    async fn look(&mut self) {
        let began = Instant::now();
        let mut wanted = std::mem::take(&mut self.wanted);
        let before = self.before.take();
        if !wanted.is_empty() {
            self.before = Some((wanted.clone(), began + AGAIN));
        }
        if let Some((before, _)) = before {
            wanted.merge(before);
        }
        let problems = match self.table.peers().await {
            Ok(peers) => self.end(peers.into_iter().filter(|(_, peer)| wanted.has(peer))).await,
            Err(error) => vec![error.to_string()],
        };
        self.publish(problems);
        self.next_look = Instant::now() + began.elapsed() * REST;
    }

    /// Ends the conversations of these, wherever they are; what could not be done, as sentences.
    async fn end(&mut self, doomed: impl Iterator<Item = (u64, ConnectedPeer)>) -> Vec<String> {
        let mut by_netns: HashMap<u64, HashSet<u64>> = HashMap::new();
        for (cookie, peer) in doomed {
            by_netns.entry(peer.netns).or_default().insert(cookie);
        }
        let mut problems = Vec::new();
        let places: Vec<Place> = [Place::Host].into_iter().chain(self.pods.values().cloned()).collect();
        for place in places {
            if by_netns.is_empty() {
                break;
            }
            match self.end_at(&place, &mut by_netns).await {
                Ok(0) => {}
                Ok(ended) => {
                    tracing::info!(?place, sockets = ended, "UDP sockets of backends that are gone: ended");
                }
                // the pod may be on its way out
                Err(SocketsError::Netns(error)) => tracing::debug!(%error, "sockets of a pod"),
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

    async fn end_at(
        &mut self,
        place: &Place,
        by_netns: &mut HashMap<u64, HashSet<u64>>,
    ) -> Result<usize, SocketsError> {
        let netns = match self.cookies.get(place) {
            Some(known) => *known,
            None => {
                let netns = self.table.netns(place).await?;
                self.cookies.insert(place.clone(), netns);
                netns
            }
        };
        let cookies = match netns {
            Some(netns) => by_netns.remove(&netns),
            // any of them may be here: a cookie is of one socket, wherever it is
            None => Some(by_netns.values().flatten().copied().collect()),
        };
        match cookies {
            Some(cookies) => self.table.end(place, cookies).await,
            None => Ok(0),
        }
    }

    fn publish(&self, messages: Vec<String>) {
        let problem =
            |message| ProblemView { origin: Origin::Datapath, subject: "UDP sockets".to_owned(), message };
        let problems: Vec<_> = messages.into_iter().map(problem).collect();
        self.problems.send_if_modified(|known| {
            if *known == problems {
                return false;
            }
            for problem in problems.iter().filter(|problem| !known.contains(problem)) {
                tracing::warn!(problem = problem.message, "sockets of backends that are gone");
            }
            *known = problems;
            true
        });
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
