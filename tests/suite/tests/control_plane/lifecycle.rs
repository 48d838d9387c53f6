//! What the agent writes to its Node object and to the host, against an API server; and the removal
//! of kube-proxy's rules, against the kernel. Only the latter needs root.

mod agent;
mod kube_proxy;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::{
    api::views::{NotReady, Status},
    lifecycle::{Install, Lifecycle, Problems, ProxyAddresses},
    netlink::Netlink,
};
use dataplane_fake_apiserver::{Failure, Fault, Objects, Requests, Server, User};
use dataplane_testkit::lab::wait;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, sync::watch};

use crate::manifests;

const TIMEOUT: Duration = Duration::from_secs(20);

/// The delay before `NetworkUnavailable`; short, to keep the tests short.
const GRACE: Duration = Duration::from_millis(800);

const NODE: &str = "n1";

const TAINT: &str = "dataplane.local/agent-not-ready";

/// A Node in an API server, and the runtime of the code under test.
struct Testbed {
    server: Server,
    objects: Objects,
    runtime: Runtime,
    status: watch::Sender<Status>,
}

impl Testbed {
    fn new() -> Result<Self> {
        let server = Server::local()?;
        let objects = server.objects()?;
        objects
            .apply(&[json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}})])?;
        let conditions = json!([{"type": "Ready", "status": "False", "reason": "KubeletNotReady"}]);
        objects.apply(&[json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
            "spec": {"taints": [
                {"key": TAINT, "effect": "NoSchedule"},
                {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"},
                {"key": TAINT, "effect": "NoExecute"},
            ]},
            "status": {"conditions": conditions},
        })])?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (status, _) = watch::channel(Status::starting(NODE));
        Ok(Self { server, objects, runtime, status })
    }

    fn admin() -> User {
        User { name: "agent".to_owned(), groups: vec!["system:masters".to_owned()] }
    }

    /// Starts the lifecycle of the node as this user; `change` sets further fields.
    fn start(&self, user: &User, change: impl FnOnce(&mut Lifecycle)) -> Result<Problems> {
        let kubeconfig = Kubeconfig::from_yaml(&self.server.kubeconfig(user)?)?;
        self.runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            let client = Some(Client::try_from(config)?);
            let mut lifecycle =
                Lifecycle { client, grace: GRACE, ..Lifecycle::new(NODE, Netlink::connect()?) };
            change(&mut lifecycle);
            Ok(lifecycle.start(&self.status.subscribe()))
        })
    }

    /// Sets the readiness of the agent.
    fn set_not_ready(&self, not_ready: Option<&str>) {
        let not_ready =
            not_ready.map(|reason| NotReady { check: "source".to_owned(), reason: reason.to_owned() });
        self.status.send_modify(|status| status.not_ready = not_ready.into_iter().collect());
    }

    fn node(&self) -> Result<Value> {
        self.objects.get("v1", "Node", "", NODE)?.context("the Node object is missing")
    }

    fn condition(&self) -> Result<Option<Value>> {
        let node = self.node()?;
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        ensure!(
            conditions.iter().any(|found| found["type"] == "Ready"),
            "a condition of another component is missing"
        );
        Ok(conditions.into_iter().find(|found| found["type"] == "NetworkUnavailable"))
    }

    fn wait_condition(&self, status: &str) -> Result<Value> {
        wait::until(&format!("NetworkUnavailable={status}"), TIMEOUT, || {
            Ok(self.condition()?.filter(|found| found["status"] == status))
        })
    }

    fn taints(&self) -> Result<Vec<String>> {
        let node = self.node()?;
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        Ok(taints.iter().filter_map(|taint| taint["key"].as_str().map(str::to_owned)).collect())
    }

    fn wait_untainted(&self) -> Result<()> {
        wait::until("the startup taint is removed", TIMEOUT, || {
            Ok((!self.taints()?.iter().any(|key| key == TAINT)).then_some(()))
        })
    }

    fn wait_event(&self, reason: &str) -> Result<Value> {
        wait::until(&format!("Event {reason}"), TIMEOUT, || {
            let events = self.objects.list("events.k8s.io/v1", "Event", "default")?;
            Ok(events
                .into_iter()
                .find(|event| event["regarding"]["name"] == NODE && event["reason"] == reason))
        })
    }
}

fn wait_problem(problems: &Problems, text: &str) -> Result<()> {
    wait::until(&format!("a problem with {text:?}"), TIMEOUT, || {
        let now = problems.now();
        ensure!(now.iter().any(|problem| problem.message.contains(text)), "{now:?}");
        Ok(Some(()))
    })
}

#[test]
fn network_unavailable_is_set_after_a_delay_and_cleared_at_once() -> Result<()> {
    let testbed = Testbed::new()?;
    let _problems = testbed.start(&Testbed::admin(), |_| {})?;
    testbed.set_not_ready(Some("not connected"));
    let unavailable = testbed.wait_condition("True")?;
    ensure!(unavailable["reason"] == "DataplaneNotReady", "{unavailable}");
    ensure!(unavailable["message"] == "source: not connected", "{unavailable}");
    ensure!(testbed.taints()?.len() == 3, "taints were removed early");
    let event = testbed.wait_event("DataplaneNotReady")?;
    ensure!(event["type"] == "Warning" && event["note"] == "source: not connected", "{event}");
    ensure!(event["regarding"]["uid"] == testbed.node()?["metadata"]["uid"], "{event}");

    testbed.set_not_ready(None);
    let available = testbed.wait_condition("False")?;
    ensure!(available["reason"] == "DataplaneReady", "{available}");
    testbed.wait_untainted()?;
    ensure!(testbed.taints()? == ["node.kubernetes.io/not-ready"], "{:?}", testbed.taints()?);
    testbed.wait_event("DataplaneReady")?;

    // no write without a change
    let before = testbed.node()?;
    for revision in 1..20 {
        testbed.status.send_modify(|status| status.revision = revision);
        std::thread::yield_now();
    }
    testbed.set_not_ready(Some("a restart"));
    testbed.set_not_ready(None);
    std::thread::sleep(GRACE * 2);
    ensure!(testbed.node()?["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]);
    Ok(())
}

#[test]
fn an_agent_restart_keeps_the_condition() -> Result<()> {
    let testbed = Testbed::new()?;
    testbed.set_not_ready(None);
    testbed.start(&Testbed::admin(), |_| {})?;
    let first = testbed.wait_condition("False")?;
    testbed.wait_untainted()?;
    let before = testbed.node()?;

    let (status, seen) = watch::channel(Status::starting(NODE));
    let again = Testbed { status, ..testbed };
    drop(seen);
    again.start(&Testbed::admin(), |lifecycle| lifecycle.grace = Duration::from_secs(30))?;
    again.set_not_ready(None);
    // the new instance has read the node and created an Event of its own
    wait::until("two Events", TIMEOUT, || {
        let events = again.objects.list("events.k8s.io/v1", "Event", "default")?;
        let ready: Vec<_> = events.iter().filter(|event| event["reason"] == "DataplaneReady").collect();
        Ok((ready.len() == 2).then_some(()))
    })?;
    ensure!(again.node()?["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]);
    ensure!(again.condition()?.as_ref() == Some(&first));
    Ok(())
}

#[test]
fn a_taint_added_concurrently_is_kept() -> Result<()> {
    let testbed = Testbed::new()?;
    let conflict = Failure::new(
        409,
        "Conflict",
        "the object has been modified; please apply your changes to the latest version",
    );
    testbed.server.faults().next(2, Requests::to("patch", "nodes"), Fault::Refuse(conflict));
    testbed.start(&Testbed::admin(), |_| {})?;
    testbed.set_not_ready(None);
    testbed.wait_untainted()?;
    ensure!(testbed.taints()? == ["node.kubernetes.io/not-ready"], "{:?}", testbed.taints()?);
    Ok(())
}

#[test]
fn the_condition_is_written_when_the_api_server_is_back() -> Result<()> {
    let mut testbed = Testbed::new()?;
    testbed.server.stop();
    let problems = testbed.start(&Testbed::admin(), |_| {})?;
    testbed.set_not_ready(None);
    wait_problem(&problems, "cannot update its condition NetworkUnavailable")?;
    testbed.server.start()?;
    testbed.objects = testbed.server.objects()?;
    testbed.wait_condition("False")?;
    testbed.wait_untainted()?;
    wait::until("the problem is cleared", TIMEOUT, || {
        Ok(problems
            .now()
            .iter()
            .all(|problem| !problem.message.contains("cannot update its condition"))
            .then_some(()))
    })
}

#[test]
fn missing_permissions_are_a_problem_and_only_granted_ones_are_used() -> Result<()> {
    let testbed = Testbed::new()?;
    let user = User::service_account("dataplane-system", "dataplane-agent");
    let problems = testbed.start(&user, |_| {})?;
    testbed.set_not_ready(None);
    wait_problem(&problems, "denied get of nodes to system:serviceaccount:dataplane-system:dataplane-agent")?;
    let text = fs::read_to_string(manifests::directory().join("base/rbac.yaml"))?;
    let objects: Vec<Value> = serde_norway::Deserializer::from_str(&text)
        .map(<Value as serde::Deserialize>::deserialize)
        .collect::<Result<_, _>>()?;
    testbed.objects.apply(&[
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dataplane-system"}}),
    ])?;
    testbed.objects.apply(&objects)?;
    testbed.wait_condition("False")?;
    testbed.wait_untainted()?;
    testbed.wait_event("DataplaneReady")?;
    let used: BTreeSet<_> = testbed.server.used_permissions(&user).iter().map(ToString::to_string).collect();
    let wanted = [
        "create events (events.k8s.io) in default",
        "get nodes (core)",
        "patch nodes (core)",
        "patch nodes/status (core)",
    ];
    ensure!(used.iter().map(String::as_str).eq(wanted), "{used:?}");
    Ok(())
}

#[test]
fn the_cni_configuration_is_written_when_the_agent_is_ready_and_stays() -> Result<()> {
    let testbed = Testbed::new()?;
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    fs::write(at("plugin"), "program")?;
    fs::create_dir(at("net.d"))?;
    fs::write(at("net.d/00-first.conf"), "{}")?;
    let install = Install {
        plugin: at("plugin"),
        bin_dir: at("bin"),
        conf_dir: at("net.d"),
        socket: at("run/agent.sock"),
    };
    let problems = testbed.start(&Testbed::admin(), |lifecycle| lifecycle.install = Some(install))?;
    let (plugin, conflist) = (at("bin/dataplane-cni"), at("net.d/05-dataplane.conflist"));
    wait::until("the CNI plugin", TIMEOUT, || Ok(plugin.exists().then_some(())))?;
    wait_problem(&problems, "uses this configuration instead of")?;
    ensure!(!conflist.exists(), "the runtime would start pods that cannot be connected");
    testbed.set_not_ready(None);
    wait::until("the CNI configuration", TIMEOUT, || Ok(conflist.exists().then_some(())))?;
    let text: Value = serde_json::from_str(&fs::read_to_string(&conflist)?)?;
    ensure!(text["plugins"][0]["agentSocket"] == at("run/agent.sock").display().to_string(), "{text}");
    testbed.set_not_ready(Some("restarting"));
    testbed.wait_condition("True")?;
    ensure!(conflist.exists(), "the CNI configuration must stay while the agent restarts");
    Ok(())
}

#[test]
fn kube_proxys_health_endpoints_are_served_and_a_used_port_is_retried() -> Result<()> {
    let testbed = Testbed::new()?;
    let used = TcpListener::bind("127.0.0.1:0")?;
    let health = used.local_addr()?;
    let mode = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let proxy = ProxyAddresses { health: Some(health), mode: Some(mode) };
    let problems = testbed.start(&Testbed::admin(), |lifecycle| lifecycle.proxy = proxy)?;
    wait_problem(&problems, &format!("cannot listen on {health}"))?;
    ensure!(
        wait::until("/proxyMode", TIMEOUT, || Ok(get(mode, "/proxyMode").ok()))?.ends_with("\r\n\r\nebpf")
    );
    drop(used);
    let answer = wait::until("/healthz", TIMEOUT, || Ok(get(health, "/healthz").ok()))?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"nodeEligible\": true"), "{answer}");
    testbed
        .status
        .send_modify(|status| status.leaving_reason = Some("its Node object is being deleted".to_owned()));
    wait::until("status 503", TIMEOUT, || {
        let answer = get(health, "/healthz")?;
        Ok((answer.starts_with("HTTP/1.1 503") && answer.contains("\"nodeEligible\": false")).then_some(()))
    })?;
    ensure!(get(health, "/livez")?.starts_with("HTTP/1.1 200"));
    Ok(())
}

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
