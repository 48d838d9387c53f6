//! The real datapath and kernel behind [`SocketTable`].

use std::{collections::HashSet, io, path::PathBuf, sync::Arc};

use dataplane_common::{abi::ConnectedPeer, netns};
use tokio::task::spawn_blocking;

use crate::{
    datapath::table::{Table, TableError},
    netlink::{PodNetns, PodNetnsError, SockDiag, SockDiagError},
};

/// A network namespace with sockets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Host,
    Pod(PathBuf),
}

/// Why sockets could not be found or ended.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    #[error(transparent)]
    Peers(#[from] TableError),
    #[error("{0}: connected UDP sockets stay with a backend that is gone")]
    Kernel(#[from] SockDiagError),
    #[error(transparent)]
    Netns(#[from] PodNetnsError),
    #[error("a thread died: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// Datapath and kernel, as far as they are needed here.
pub trait SocketTable: Send + Sync {
    /// Connected UDP sockets that were translated, by their cookies.
    fn peers(&self) -> impl Future<Output = Result<Vec<(u64, ConnectedPeer)>, SocketsError>> + Send;
    /// The cookie of a namespace; `None` if the kernel does not tell.
    fn netns(&self, place: &Place) -> impl Future<Output = Result<Option<u64>, SocketsError>> + Send;
    /// Ends the conversations of those of these sockets that are in the namespace. How many there were.
    fn end(
        &self,
        place: &Place,
        cookies: HashSet<u64>,
    ) -> impl Future<Output = Result<usize, SocketsError>> + Send;
}

/// The real ones.
pub struct KernelSockets {
    peers: Arc<dyn Table<u64, ConnectedPeer> + Sync>,
}

impl KernelSockets {
    /// `peers`: what the datapath remembers of connected UDP sockets.
    pub fn new(peers: impl Table<u64, ConnectedPeer> + Sync + 'static) -> Self {
        Self { peers: Arc::new(peers) }
    }

    /// Runs `work` in the namespace, on a thread that may block.
    async fn at<T: Send + 'static>(
        place: &Place,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, SocketsError> {
        Ok(match place {
            Place::Host => spawn_blocking(work).await?,
            Place::Pod(path) => PodNetns::open(path)?.run(work).await?,
        })
    }
}

impl SocketTable for KernelSockets {
    async fn peers(&self) -> Result<Vec<(u64, ConnectedPeer)>, SocketsError> {
        let peers = Arc::clone(&self.peers);
        Ok(spawn_blocking(move || peers.entries()).await??)
    }

    async fn netns(&self, place: &Place) -> Result<Option<u64>, SocketsError> {
        Self::at(place, netns::cookie).await
    }

    async fn end(&self, place: &Place, cookies: HashSet<u64>) -> Result<usize, SocketsError> {
        let open = |source: io::Error| SockDiagError::Kernel { operation: "ask for", source };
        let work = move || SockDiag::open().map_err(open)?.destroy(&cookies);
        Ok(Self::at(place, work).await??)
    }
}
