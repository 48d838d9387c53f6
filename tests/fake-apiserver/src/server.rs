//! The handle of the server: listeners, users, recorded permissions and faults.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    net::{SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
    sync::{Arc, MutexGuard, mpsc},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, anyhow};
use axum::{Router, serve::ListenerExt as _};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::sync::oneshot;

use super::{
    faults::{Faults, WatchEnd},
    http,
    kubeconfig::kubeconfig,
    namespace,
    objects::Objects,
    rbac::{Permission, User},
    state::{Behaviour, State},
};

/// An API server in this process.
#[derive(Debug)]
pub struct Server {
    state: Arc<State>,
    endpoints: Vec<Endpoint>,
}

/// One listening address; several act like several API servers of a cluster.
#[derive(Debug)]
struct Endpoint {
    /// The network namespace of the listener; `None`: that of the process.
    namespace: Option<Arc<File>>,
    address: SocketAddr,
    listener: Option<Listener>,
}

/// A running listener; dropping it closes all its connections.
struct Listener {
    socket: TcpListener,
    close: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Creates a server without objects and listeners.
    pub fn new() -> Self {
        Self { state: State::new(), endpoints: Vec::new() }
    }

    /// Creates a server on a free loopback port of the current network namespace.
    pub fn local() -> Result<Self> {
        let mut server = Self::new();
        server.listen(None, "127.0.0.1:0".parse()?)?;
        Ok(server)
    }

    /// Listens at one more address, in this or the current network namespace. Port 0: any free
    /// port.
    pub fn listen(&mut self, namespace: Option<Arc<File>>, address: SocketAddr) -> Result<SocketAddr> {
        let mut endpoint = Endpoint { namespace, address, listener: None };
        endpoint.open(&self.state)?;
        let address = endpoint.address;
        self.endpoints.push(endpoint);
        Ok(address)
    }

    /// The URLs of all addresses.
    pub fn urls(&self) -> Vec<String> {
        self.endpoints.iter().map(|endpoint| format!("http://{}", endpoint.address)).collect()
    }

    /// Stops all listeners and closes their connections.
    pub fn stop(&mut self) {
        for endpoint in &mut self.endpoints {
            endpoint.listener = None;
        }
    }

    /// Like [`Self::stop`], for the address with this index.
    pub fn stop_one(&mut self, index: usize) -> Result<()> {
        self.endpoints
            .get_mut(index)
            .with_context(|| format!("the server has no address {index}"))?
            .listener = None;
        Ok(())
    }

    /// Starts the listeners that were stopped.
    pub fn start(&mut self) -> Result<()> {
        for endpoint in self.endpoints.iter_mut().filter(|endpoint| endpoint.listener.is_none()) {
            endpoint.open(&self.state)?;
        }
        Ok(())
    }

    /// Restarts with a compacted history: no client can resume a watch.
    pub fn restart_compacted(&mut self) -> Result<()> {
        self.stop();
        self.compact();
        self.start()
    }

    /// Compacts the history. Open watches continue; a watch from an older revision fails at once.
    pub fn compact(&self) {
        // one revision later than any client has seen, as after a write to another resource
        self.state.write(|store| {
            store.advance(1);
            store.compact();
        });
    }

    /// Ends all open watches. Returns their number.
    pub fn drop_watches(&self, how: WatchEnd) -> usize {
        self.state.faults.drop_watches(how)
    }

    pub fn faults(&self) -> &Faults {
        &self.state.faults
    }

    /// The behaviour settings, to be changed.
    pub fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        self.state.behaviour()
    }

    /// Returns a bearer token for this user; the roles in the store decide what it may do.
    pub fn token(&self, user: &User) -> String {
        self.state.access().register(user)
    }

    /// Returns the permissions that a user has used.
    pub fn used_permissions(&self, user: &User) -> BTreeSet<Permission> {
        self.state.access().used_permissions(&user.name)
    }

    /// Returns a kubeconfig for this user at the first address.
    pub fn kubeconfig(&self, user: &User) -> Result<String> {
        let url = self.urls().into_iter().next().context("the server has no address")?;
        kubeconfig(&url, &self.token(user), None)
    }

    /// Connects a client as administrator to the first address, in the namespace of its listener.
    pub fn objects(&self) -> Result<Objects> {
        let endpoint = self.endpoints.first().context("the server has no address")?;
        Objects::connect(&self.kubeconfig(&User::admin())?, endpoint.namespace.clone())
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Endpoint {
    fn open(&mut self, state: &Arc<State>) -> Result<()> {
        let address = self.address;
        let bind = || TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"));
        // a socket and the connections it accepts stay in the namespace of its creation
        let socket = namespace::within(self.namespace.as_deref(), bind)?;
        socket.set_nonblocking(true)?;
        self.address = socket.local_addr()?;
        self.listener = Some(Listener::serve(socket, Arc::clone(state))?);
        Ok(())
    }
}

impl Listener {
    fn serve(socket: TcpListener, state: Arc<State>) -> Result<Self> {
        let kept = socket.try_clone()?;
        let (close, closed) = oneshot::channel();
        let (report, ready) = mpsc::channel();
        let thread = thread::Builder::new().name("apiserver".to_owned()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(report.send(Err(error))),
            };
            runtime.block_on(async {
                let listener = match tokio::net::TcpListener::from_std(socket) {
                    Ok(listener) => listener,
                    Err(error) => return drop(report.send(Err(error))),
                };
                let _gone = report.send(Ok(()));
                let listener = listener.tap_io(|connection| {
                    // watch events must not wait for more data
                    let _slower = connection.set_nodelay(true);
                });
                let router = Router::new().fallback(http::handle).with_state(state);
                tokio::select! {
                    _never = axum::serve(listener, router).into_future() => {}
                    _closed = closed => {}
                }
            });
            // dropping the runtime closes all connections and watches
        })?;
        let started = ready.recv().map_err(|_ended| anyhow!("the API server thread ended"))?;
        started.context("cannot start the API server")?;
        Ok(Self { socket: kept, close: Some(close), thread: Some(thread) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.close.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        // close() is not enough: a child between fork and exec still has the socket, so it would
        // listen on
        let _not_connected = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}
