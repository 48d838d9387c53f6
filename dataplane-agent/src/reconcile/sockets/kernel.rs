//! [`SocketTable`] of the running datapath and kernel.

use std::{collections::HashSet, io, path::PathBuf, sync::Arc};

use dataplane_common::{abi::ConnectedPeer, netns};
use tokio::task::spawn_blocking;

use crate::{
    datapath::table::{Table, TableError},
    netlink::{PodNetns, PodNetnsError, SockDiag, SockDiagError},
};

/// A network namespace with sockets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Netns {
    Host,
    Pod(PathBuf),
}

/// Why sockets could not be listed or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    #[error(transparent)]
    Peers(#[from] TableError),
    #[error("{0}; connected UDP sockets keep their removed backend until they reconnect")]
    Kernel(#[from] SockDiagError),
    #[error(transparent)]
    Netns(#[from] PodNetnsError),
    #[error("thread that inspects sockets failed: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// The translated sockets of the datapath, and the sockets of the kernel.
pub trait SocketTable: Send + Sync {
    /// Translated connected UDP sockets, by cookie.
    fn peers(&self) -> impl Future<Output = Result<Vec<(u64, ConnectedPeer)>, SocketsError>> + Send;
    /// The cookie of a namespace; `None` if the kernel has none.
    fn netns(&self, netns: &Netns) -> impl Future<Output = Result<Option<u64>, SocketsError>> + Send;
    /// Destroys those of the sockets that are in the namespace. Returns their number.
    fn destroy(
        &self,
        netns: &Netns,
        cookies: HashSet<u64>,
    ) -> impl Future<Output = Result<usize, SocketsError>> + Send;
}

/// The running datapath and kernel.
pub struct KernelSockets {
    peers: Arc<dyn Table<u64, ConnectedPeer> + Sync>,
}

impl KernelSockets {
    /// `peers` is the datapath's table of connected UDP sockets.
    pub fn new(peers: impl Table<u64, ConnectedPeer> + Sync + 'static) -> Self {
        Self { peers: Arc::new(peers) }
    }

    /// Runs `work` in the namespace, on a thread that may block.
    async fn run_in<T: Send + 'static>(
        netns: &Netns,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, SocketsError> {
        Ok(match netns {
            Netns::Host => spawn_blocking(work).await?,
            Netns::Pod(path) => PodNetns::open(path)?.run(work).await?,
        })
    }
}

impl SocketTable for KernelSockets {
    async fn peers(&self) -> Result<Vec<(u64, ConnectedPeer)>, SocketsError> {
        let peers = Arc::clone(&self.peers);
        Ok(spawn_blocking(move || peers.entries()).await??)
    }

    async fn netns(&self, netns: &Netns) -> Result<Option<u64>, SocketsError> {
        Self::run_in(netns, netns::cookie).await
    }

    async fn destroy(&self, netns: &Netns, cookies: HashSet<u64>) -> Result<usize, SocketsError> {
        let open =
            |source: io::Error| SockDiagError::Kernel { operation: "open sock_diag socket to list", source };
        let work = move || SockDiag::open().map_err(open)?.destroy(&cookies);
        Ok(Self::run_in(netns, work).await??)
    }
}
