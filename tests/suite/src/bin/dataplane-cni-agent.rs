//! The agent's CNI server and its socket, with the real kernel and without a datapath: what `tests/cni.rs` drives.
//!
//! What the datapath would be told is written to `wiring.log` in the run directory; a file `fail-attach`, `fail-detach`
//! or `fail-check` there makes it refuse. A file `sweep` stands for the timer, and is gone once it was done. The real datapath is proved by the namespace tests.
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
    sysctl::prepare_node(&[])?;
    // before notes are read: see `Server::start`
    let listener = instance.listen()?;
    let wiring = Recorder { directory: run_dir.clone() };
    let (server, recovery) =
        Server::start(Netlink::connect()?, Arc::new(wiring.clone()), &state_dir, &run_dir).await?;
    for device in &recovery.pods {
        wiring.write("recover", device).context("wiring.log")?;
    }
    server.configure(PodNetwork { ranges, mtu, sources });
    let (_status, status) = watch::channel(Status::starting("test"));
    let (queries, _unanswered) = mpsc::channel(1);
    let api = Api::new(status.clone(), queries, Arc::new(Metrics::new(status)));
    api.set_cni(Arc::new(server.clone()));
    tokio::spawn(sweep_when_told(server, run_dir.join("sweep")));
    server::serve(listener, api, Limits::default()).await;
    Ok(())
}

async fn sweep_when_told(server: Server, told: PathBuf) {
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if told.exists() {
            server.release_vanished().await;
            let _gone = std::fs::remove_file(&told);
        }
    }
}

/// Remembers what the datapath would have been told.
#[derive(Clone, Debug)]
struct Recorder {
    directory: PathBuf,
}

impl Recorder {
    fn told(
        &self,
        what: &'static str,
        device: &PodDevice,
    ) -> BoxFuture<'static, Result<(), PodDatapathError>> {
        let refused = Path::exists(&self.directory.join(format!("fail-{what}")));
        let written = self.write(what, device);
        async move {
            written.map_err(|error| PodDatapathError(error.to_string()))?;
            if refused { Err(PodDatapathError("the test wants it so".to_owned())) } else { Ok(()) }
        }
        .boxed()
    }

    fn write(&self, what: &str, device: &PodDevice) -> std::io::Result<()> {
        let PodDevice { name, ifindex, mac, addresses, pod, .. } = device;
        let pod = pod.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        let line = format!("{what} {name} {ifindex} {mac} {} {pod}\n", addresses.join(","));
        let mut log = OpenOptions::new().create(true).append(true).open(self.directory.join("wiring.log"))?;
        log.write_all(line.as_bytes())
    }
}

impl PodDatapath for Recorder {
    fn attach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.told("attach", device)
    }

    fn detach<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.told("detach", device)
    }

    fn annotations<'a>(&'a self, _pod: &'a Pod) -> BoxFuture<'a, Result<PodAnnotations, PodDatapathError>> {
        async { Ok(PodAnnotations::default()) }.boxed()
    }

    fn check<'a>(&'a self, device: &'a PodDevice) -> BoxFuture<'a, Result<(), PodDatapathError>> {
        self.told("check", device)
    }
}
