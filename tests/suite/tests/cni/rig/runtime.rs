//! A node: a network namespace with an agent, and the container runtime's actions.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Call, Container, container::ip_json};
use dataplane_testkit::{
    bins,
    lab::{Namespace, wait},
};

/// Addresses of the node.
pub(crate) const NODE_V4: &str = "10.99.0.1";
pub(crate) const NODE_V6: &str = "fd99::1";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A node and its runtime. Dropping it removes both.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) namespace: Namespace,
    directory: TempDir,
    ranges: Vec<String>,
    agent: Option<Child>,
}

impl Runtime {
    /// Creates a node with a running agent whose pods get addresses of these ranges.
    pub(crate) fn new(ranges: &[&str]) -> Result<Self> {
        let namespace = Namespace::create(&unique("n"))?;
        let directory = tempfile::tempdir()?;
        let ranges = ranges.iter().map(ToString::to_string).collect();
        let mut runtime = Self { namespace, directory, ranges, agent: None };
        // a veth pair with both ends here: not every kernel has dummy devices
        runtime.namespace.ip(&format!(
            "link add uplink type veth peer name uplink-peer
             addr add {NODE_V4}/24 dev uplink
             addr add {NODE_V6}/64 dev uplink nodad
             link set uplink-peer up
             link set uplink up"
        ))?;
        runtime.start()?;
        Ok(runtime)
    }

    /// Starts the agent, and waits until it responds.
    pub(crate) fn start(&mut self) -> Result<()> {
        let log = fs::File::create(self.path("agent.log"))?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.namespace.path().display()))
            .arg(bins::directory()?.join("dataplane-cni-agent"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .args(["--mtu", "1450", "--sources", &format!("{NODE_V4},{NODE_V6}")]);
        if !self.ranges.is_empty() {
            command.args(["--ranges", &self.ranges.join(",")]);
        }
        let _stale = fs::remove_file(self.socket());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let child = self.agent.insert(child.context("run nsenter (package util-linux)")?);
        let (socket, log) =
            (self.directory.path().join("run/agent.sock"), self.directory.path().join("agent.log"));
        wait::until("a response of the agent", Duration::from_secs(20), || {
            if let Some(status) = child.try_wait()? {
                bail!("the agent ended ({status}): {}", fs::read_to_string(&log)?);
            }
            Ok(request_view(&socket, &json!({"view": "status"})).ok())
        })?;
        Ok(())
    }

    /// Changes the ranges for the next start of the agent.
    pub(crate) fn set_ranges(&mut self, ranges: &[&str]) {
        self.ranges = ranges.iter().map(ToString::to_string).collect();
    }

    /// Kills the agent with SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.kill()?;
            agent.wait()?;
        }
        Ok(())
    }

    /// Kills the agent and starts another.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.start()
    }

    /// A call of the plugin.
    pub(crate) fn call(&self, command: &str) -> Call {
        Call::new(command, &self.socket(), "1.1.0")
    }

    /// A call for `eth0` of a container.
    pub(crate) fn pod_call(&self, command: &str, container: &Container) -> Call {
        self.call(command)
            .set("CNI_CONTAINERID", &container.id)
            .set("CNI_NETNS", container.netns())
            .set("CNI_IFNAME", "eth0")
            .set("CNI_ARGS", format!("K8S_POD_NAMESPACE=test;K8S_POD_NAME={}", container.id))
    }

    /// Runs ADD; returns its result.
    pub(crate) fn add(&self, container: &Container) -> Result<Value> {
        self.pod_call("ADD", container).ok()
    }

    /// A CHECK with the result of ADD.
    pub(crate) fn check(&self, container: &Container, result: &Value) -> Call {
        self.pod_call("CHECK", container).with("prevResult", result.clone())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run").join("agent.sock")
    }

    /// Path of a file of the node.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The calls to the datapath since the last time.
    pub(crate) fn datapath_calls(&self) -> Result<Vec<String>> {
        let path = self.path("run/datapath.log");
        let text = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, "")?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Triggers the agent's periodic release of vanished pods.
    pub(crate) fn sweep(&self) -> Result<()> {
        let request = self.path("run/sweep");
        fs::write(&request, "")?;
        wait::until("the end of the sweep", Duration::from_secs(10), || Ok((!request.exists()).then_some(())))
    }

    /// The output of `ip -j` on the node.
    pub(crate) fn ip_json(&self, arguments: &str) -> Result<Vec<Value>> {
        ip_json(&self.namespace, arguments)
    }

    /// Names of the pods' devices.
    pub(crate) fn devices(&self) -> Result<BTreeSet<String>> {
        let links = self.ip_json("link show")?;
        let names = links.iter().filter_map(|link| link["ifname"].as_str());
        Ok(names.filter(|name| name.starts_with("dp")).map(str::to_owned).collect())
    }

    /// File names of the pod records.
    pub(crate) fn records(&self) -> Result<BTreeSet<String>> {
        let files = fs::read_dir(self.path("state/pods"))?;
        let names = files.map(|file| Ok(file?.file_name().to_string_lossy().into_owned()));
        names.filter(|name| name.as_ref().is_ok_and(|name| name != "boot_id")).collect()
    }

    /// Number of addresses in use, per range.
    pub(crate) fn used(&self) -> Result<Vec<u64>> {
        let status = request_view(&self.socket(), &json!({"view": "status"}))?;
        let ranges = status["result"]["ipam"].as_array().with_context(|| format!("status: {status}"))?;
        Ok(ranges.iter().filter_map(|range| range["used"].as_u64()).collect())
    }

    /// Fails if a device, route, record or address of a pod is left.
    pub(crate) fn expect_clean(&self) -> Result<()> {
        let devices = self.devices()?;
        let routes =
            [self.ip_json("-4 route show proto 218")?, self.ip_json("-6 route show proto 218")?].concat();
        let (records, used) = (self.records()?, self.used()?);
        if devices.is_empty() && routes.is_empty() && records.is_empty() && used.iter().all(|used| *used == 0)
        {
            return Ok(());
        }
        bail!("left over: devices {devices:?}, routes {routes:?}, records {records:?}, addresses {used:?}")
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("kill the agent of {}: {error:#}", self.namespace.name());
        }
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.path("agent.log")).unwrap_or_default());
        }
        let _absent = Namespace::delete(self.namespace.name());
    }
}

/// Sends a request to the agent's socket.
fn request_view(socket: &Path, request: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{request}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

pub(super) fn unique(kind: &str) -> String {
    format!("dpcni-{}-{kind}{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
