//! The CNI server, and its channel to the node task ([`PodDatapath`]).

use std::{path::PathBuf, sync::Arc, time::Duration};

use dataplane_cni::protocol::Pod;
use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, sleep},
};

use crate::{
    api::answer::Api,
    cni::{CniError, PodAnnotations, PodDatapath, PodDatapathError, PodDevice, PodNetwork, Server},
    netlink::Netlink,
};

/// Capacity of the request channel.
const QUEUE: usize = 64;
/// Interval of the search for pod devices that vanished without a CNI DEL.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);
/// Wait between attempts to recover existing pods.
const RECOVERY_RETRY: Duration = Duration::from_secs(2);

/// Requests of the CNI server to the node task.
#[derive(Debug)]
pub(super) enum PodRequest {
    Attach(PodDevice, Reply),
    Detach(PodDevice, Reply),
    Check(PodDevice, Reply),
    /// Looks up the annotations of a pod.
    Annotations(Pod, oneshot::Sender<Result<PodAnnotations, PodDatapathError>>),
    /// All pods that existed when the agent started are attached, or why they cannot be found.
    Recovered(Result<(), CniError>),
}

pub(super) type Reply = oneshot::Sender<Result<(), PodDatapathError>>;

/// Sends requests to the node task.
#[derive(Clone, Debug)]
pub(super) struct PodChannel(mpsc::Sender<PodRequest>);

impl PodChannel {
    pub(super) fn new() -> (Self, mpsc::Receiver<PodRequest>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), receiver)
    }

    async fn request<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, PodDatapathError>>) -> PodRequest + Send,
    ) -> Result<T, PodDatapathError> {
        let (reply, result) = oneshot::channel();
        let stopping = || PodDatapathError("the agent is stopping".to_owned());
        self.0.send(request(reply)).await.map_err(|_closed| stopping())?;
        result.await.map_err(|_dropped| stopping())?
    }
}

impl PodDatapath for PodChannel {
    fn attach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.request(|reply| PodRequest::Attach(device.clone(), reply)).boxed()
    }

    fn detach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.request(|reply| PodRequest::Detach(device.clone(), reply)).boxed()
    }

    fn annotations<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<PodAnnotations, PodDatapathError>> {
        self.request(|reply| PodRequest::Annotations(pod.clone(), reply)).boxed()
    }

    fn check<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.request(|reply| PodRequest::Check(device.clone(), reply)).boxed()
    }
}

/// Directories of the CNI server: its records, and its socket.
pub(super) struct Directories {
    pub(super) state_dir: PathBuf,
    pub(super) run_dir: PathBuf,
}

/// Runs the CNI server: attaches existing pods, then serves the plugin with the current `network`.
pub(super) async fn serve_pods(
    channel: PodChannel,
    netlink: Netlink,
    directories: Directories,
    network: watch::Receiver<PodNetwork>,
    api: Arc<Api>,
) {
    let server = loop {
        match start(&channel, netlink.clone(), &directories, network.clone()).await {
            Ok(server) => break server,
            Err(error) => {
                // fails while the agent stops
                let _stopping = channel.0.send(PodRequest::Recovered(Err(error))).await;
                sleep(RECOVERY_RETRY).await;
            }
        }
    };
    let _stopping = channel.0.send(PodRequest::Recovered(Ok(()))).await;
    api.set_cni(Arc::new(server.clone()));
    follow(&server, network).await;
}

async fn start(
    channel: &PodChannel,
    netlink: Netlink,
    Directories { state_dir, run_dir }: &Directories,
    network: watch::Receiver<PodNetwork>,
) -> Result<Server, CniError> {
    let datapath = Arc::new(channel.clone());
    let (server, recovery) = Server::start(netlink, datapath, state_dir, run_dir).await?;
    let (pods, released) = (recovery.pods.len(), recovery.released.len());
    tracing::info!("recovered {pods} existing pods; released the addresses of {released} deleted pods");
    server.configure(network.borrow().clone());
    for pod in &recovery.pods {
        if let Err(error) = channel.attach(pod).await {
            tracing::error!(%error, "cannot attach programs to existing pod device {}", pod.name);
        }
    }
    Ok(server)
}

async fn follow(server: &Server, mut network: watch::Receiver<PodNetwork>) {
    let mut sweep = interval(SWEEP_INTERVAL);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = network.changed() => {
                if changed.is_err() {
                    return;
                }
                server.configure(network.borrow_and_update().clone());
            }
            _ = sweep.tick() => server.release_vanished().await,
        }
    }
}
