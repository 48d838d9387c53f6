//! The agent's CNI server with its socket, the real kernel and a recorder in place of the datapath:
//! for the tests in `tests/cni`.
//!
//! Calls to the datapath are written to `datapath.log` in the run directory. A file `fail-attach`,
//! `fail-detach` or `fail-check` there makes the call fail. Creating a file `sweep` triggers the
//! periodic release of vanished pods; it is deleted when that is done. The netns tests cover the
//! real datapath.
#![forbid(unsafe_code)]

use std::{
    fs::OpenOptions,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use dataplane_agent::{
    api::{
        answer::Api,
        instance::Instance,
        server::{self, Limits},
        views::Status,
    },
    cni::{PodAnnotations, PodDatapath, PodDatapathError, PodDevice, PodNetwork, Server},
    metrics::Metrics,
    netlink::{Netlink, sysctl},
};
use dataplane_cni::protocol::Pod;
use futures::{FutureExt as _, future::BoxFuture};
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};

#[derive(Parser)]
struct Args {
    #[arg(long)]
    run_dir: PathBuf,
    #[arg(long)]
    state_dir: PathBuf,
    #[arg(long, value_delimiter = ',')]
    ranges: Vec<IpNet>,
    #[arg(long, value_delimiter = ',')]
    sources: Vec<IpAddr>,
    #[arg(long)]
    mtu: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Args { run_dir, state_dir, ranges, sources, mtu } = Args::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let instance = Instance::acquire(&run_dir)?;
    sysctl::prepare_node(&[], "dataplane0")?;
    // before pending deletes are read: see `Server::start`
    let listener = instance.listen()?;
    let recorder = Recorder { directory: run_dir.clone() };
    let (server, recovery) =
        Server::start(Netlink::connect()?, Arc::new(recorder.clone()), &state_dir, &run_dir).await?;
    for device in &recovery.pods {
        recorder.write("recover", device).context("datapath.log")?;
    }
    server.configure(PodNetwork { ranges, mtu, sources });
    let (_status, status) = watch::channel(Status::starting("test"));
    let (queries, _unanswered) = mpsc::channel(1);
    let api = Api::new(status.clone(), queries, Arc::new(Metrics::new(status)));
    api.set_cni(Arc::new(server.clone()));
    tokio::spawn(sweep_on_request(server, run_dir.join("sweep")));
    server::serve(listener, api, Limits::default()).await;
    Ok(())
}

async fn sweep_on_request(server: Server, request: PathBuf) {
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if request.exists() {
            server.release_vanished().await;
            let _removed = std::fs::remove_file(&request);
        }
    }
}

/// Records the calls to the datapath.
#[derive(Clone, Debug)]
struct Recorder {
    directory: PathBuf,
}

impl Recorder {
    fn record(
        &self,
        operation: &'static str,
        device: &PodDevice,
    ) -> BoxFuture<'static, Result<(), PodDatapathError>> {
        let refused = Path::exists(&self.directory.join(format!("fail-{operation}")));
        let written = self.write(operation, device);
        async move {
            written.map_err(|error| PodDatapathError(error.to_string()))?;
            if refused { Err(PodDatapathError("failure requested by the test".to_owned())) } else { Ok(()) }
        }
        .boxed()
    }

    fn write(&self, operation: &str, device: &PodDevice) -> std::io::Result<()> {
        let PodDevice { name, ifindex, mac, addresses, pod, .. } = device;
        let pod = pod.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        let line = format!("{operation} {name} {ifindex} {mac} {} {pod}\n", addresses.join(","));
        let mut log =
            OpenOptions::new().create(true).append(true).open(self.directory.join("datapath.log"))?;
        log.write_all(line.as_bytes())
    }
}

impl PodDatapath for Recorder {
    fn attach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.record("attach", device)
    }

    fn detach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.record("detach", device)
    }

    fn annotations<'a>(&'a self, _pod: &'a Pod) -> BoxFuture<'a, Result<PodAnnotations, PodDatapathError>> {
        async { Ok(PodAnnotations::default()) }.boxed()
    }

    fn check<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.record("check", device)
    }
}
