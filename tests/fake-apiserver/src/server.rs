//! The server as a handle: where it listens, who may come in, what it has seen.

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
    faults::{Drop as DropWatch, Faults},
    http,
    kubeconfig::kubeconfig,
    namespace,
    objects::Objects,
    rbac::{Use, User},
    state::{Behaviour, State},
};

/// An API server in this process.
#[derive(Debug)]
pub struct Server {
    state: Arc<State>,
    doors: Vec<Door>,
}

/// One address, like one of several API servers of a cluster.
#[derive(Debug)]
struct Door {
    /// The network namespace it is in; `None`: that of the process.
    namespace: Option<Arc<File>>,
    address: SocketAddr,
    open: Option<Open>,
}

/// Ends with all its connections when dropped.
struct Open {
    listener: TcpListener,
    close: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Empty, and reachable by nobody yet.
    pub fn new() -> Self {
        Self { state: State::new(), doors: Vec::new() }
    }

    /// On a port of the loopback device of the network namespace we are in.
    pub fn local() -> Result<Self> {
        let mut server = Self::new();
        server.listen(None, "127.0.0.1:0".parse()?)?;
        Ok(server)
    }

    /// Opens one more address, in this network namespace or where we are; port 0 becomes a real one.
    pub fn listen(&mut self, namespace: Option<Arc<File>>, address: SocketAddr) -> Result<SocketAddr> {
        let mut door = Door { namespace, address, open: None };
        door.open(&self.state)?;
        let address = door.address;
        self.doors.push(door);
        Ok(address)
    }

    /// Of all addresses.
    pub fn urls(&self) -> Vec<String> {
        self.doors.iter().map(|door| format!("http://{}", door.address)).collect()
    }

    /// All addresses refuse connections; those there are break.
    pub fn stop(&mut self) {
        for door in &mut self.doors {
            door.open = None;
        }
    }

    /// As [`Self::stop`], of the address with this index.
    pub fn stop_one(&mut self, index: usize) -> Result<()> {
        self.doors.get_mut(index).with_context(|| format!("there is no address {index}"))?.open = None;
        Ok(())
    }

    /// The addresses that are closed open again.
    pub fn start(&mut self) -> Result<()> {
        for door in self.doors.iter_mut().filter(|door| door.open.is_none()) {
            door.open(&self.state)?;
        }
        Ok(())
    }

    /// Away and back, with no history: nobody can go on where they were.
    pub fn restart_compacted(&mut self) -> Result<()> {
        self.stop();
        self.compact();
        self.start()
    }

    /// Forgets history. Watches that are open know nothing of it; those that begin in the past end at once.
    pub fn compact(&self) {
        // at one past what anybody has seen, as other writes would
        self.state.write(|store| {
            store.advance(1);
            store.compact();
        });
    }

    /// Ends all watches that are open; how many there were.
    pub fn drop_watches(&self, how: DropWatch) -> usize {
        self.state.faults.drop_watches(how)
    }

    pub fn faults(&self) -> &Faults {
        &self.state.faults
    }

    /// To be changed.
    pub fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        self.state.behaviour()
    }

    /// A bearer token for this user, who may do what roles in the store allow.
    pub fn token(&self, user: &User) -> String {
        self.state.access().admit(user)
    }

    /// Which permissions a user has made use of.
    pub fn uses(&self, user: &User) -> BTreeSet<Use> {
        self.state.access().uses(&user.name)
    }

    /// A kubeconfig for this user at the first address.
    pub fn kubeconfig(&self, user: &User) -> Result<String> {
        let url = self.urls().into_iter().next().context("the server listens nowhere")?;
        kubeconfig(&url, &self.token(user), None)
    }

    /// Its objects, through its first address, as somebody who may do everything. The address must be reachable from
    /// the network namespace it was opened in.
    pub fn objects(&self) -> Result<Objects> {
        let door = self.doors.first().context("the server listens nowhere")?;
        Objects::connect(&self.kubeconfig(&User::admin())?, door.namespace.clone())
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Door {
    fn open(&mut self, state: &Arc<State>) -> Result<()> {
        let address = self.address;
        let bind = || TcpListener::bind(address).with_context(|| format!("listen at {address}"));
        // a socket stays in the namespace it was made in, and so do those it accepts
        let listener = namespace::within(self.namespace.as_deref(), bind)?;
        listener.set_nonblocking(true)?;
        self.address = listener.local_addr()?;
        self.open = Some(Open::serve(listener, Arc::clone(state))?);
        Ok(())
    }
}

impl Open {
    fn serve(listener: TcpListener, state: Arc<State>) -> Result<Self> {
        let kept = listener.try_clone()?;
        let (close, closed) = oneshot::channel();
        let (report, ready) = mpsc::channel();
        let thread = thread::Builder::new().name("apiserver".to_owned()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(report.send(Err(error))),
            };
            runtime.block_on(async {
                let listener = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => listener,
                    Err(error) => return drop(report.send(Err(error))),
                };
                let _told = report.send(Ok(()));
                let listener = listener.tap_io(|connection| {
                    // an event must not wait for the next one
                    let _slower = connection.set_nodelay(true);
                });
                let router = Router::new().fallback(http::handle).with_state(state);
                tokio::select! {
                    _never = axum::serve(listener, router).into_future() => {}
                    _closed = closed => {}
                }
            });
            // the runtime's end is the end of its connections and watches
        })?;
        let told = ready.recv().map_err(|_ended| anyhow!("the API server's thread ended"))?;
        told.context("start the API server")?;
        Ok(Self { listener: kept, close: Some(close), thread: Some(thread) })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        drop(self.close.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        // closed, it would listen on in a child of ours that is not yet another program, and its address stay taken
        let _not_connected = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Open")
    }
}
