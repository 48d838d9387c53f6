//! The CNI server beside the task that owns programs and tables: [`PodDatapath`] is a channel between them.

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

/// Requests that may wait.
const WAITING: usize = 64;
/// How often pods that went without a word are looked for.
const SWEEP: Duration = Duration::from_secs(30);

/// Between two attempts to find out which pods there are.
const RETRY: Duration = Duration::from_secs(2);

/// What the CNI server asks.
#[derive(Debug)]
pub(super) enum PodRequest {
    Attach(PodDevice, Answer),
    Detach(PodDevice, Answer),
    Check(PodDevice, Answer),
    /// What the pod asks for by its annotations.
    PodAnnotations(Pod, oneshot::Sender<Result<PodAnnotations, PodDatapathError>>),
    /// Every pod that was there when the agent started has been attached; or why they are not known.
    LoadedPrograms(Result<(), CniError>),
}

/// Where the answer goes.
pub(super) type Answer = oneshot::Sender<Result<(), PodDatapathError>>;

/// The asking end.
#[derive(Clone, Debug)]
pub(super) struct PodChannel(mpsc::Sender<PodRequest>);

impl PodChannel {
    pub(super) fn new() -> (Self, mpsc::Receiver<PodRequest>) {
        let (asking, asked) = mpsc::channel(WAITING);
        (Self(asking), asked)
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, PodDatapathError>>) -> PodRequest + Send,
    ) -> Result<T, PodDatapathError> {
        let (answer, answered) = oneshot::channel();
        let stopping = || PodDatapathError("the agent is stopping".to_owned());
        self.0.send(request(answer)).await.map_err(|_closed| stopping())?;
        answered.await.map_err(|_dropped| stopping())?
    }
}

impl PodDatapath for PodChannel {
    fn attach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.ask(|answer| PodRequest::Attach(device.clone(), answer)).boxed()
    }

    fn detach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.ask(|answer| PodRequest::Detach(device.clone(), answer)).boxed()
    }

    fn annotations<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<PodAnnotations, PodDatapathError>> {
        self.ask(|answer| PodRequest::PodAnnotations(pod.clone(), answer)).boxed()
    }

    fn check<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.ask(|answer| PodRequest::Check(device.clone(), answer)).boxed()
    }
}

/// Where the CNI server keeps its records, and where its socket is.
pub(super) struct Directories {
    pub(super) state_dir: PathBuf,
    pub(super) run_dir: PathBuf,
}

/// Runs the CNI server: attaches the pods that are there, then lets the plugin in, and gives new pods what `network`
/// says at the time.
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
                // nobody listens: the agent is stopping
                let _stopping = channel.0.send(PodRequest::LoadedPrograms(Err(error))).await;
                sleep(RETRY).await;
            }
        }
    };
    let _stopping = channel.0.send(PodRequest::LoadedPrograms(Ok(()))).await;
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
    tracing::info!(alive = recovery.pods.len(), gone = recovery.released.len(), "pods of before");
    server.configure(network.borrow().clone());
    for pod in &recovery.pods {
        if let Err(error) = channel.attach(pod).await {
            tracing::error!(device = pod.name, %error, "attach a pod of before");
        }
    }
    Ok(server)
}

async fn follow(server: &Server, mut network: watch::Receiver<PodNetwork>) {
    let mut sweep = interval(SWEEP);
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
