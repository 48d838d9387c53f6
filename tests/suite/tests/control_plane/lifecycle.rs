//! What a node says of itself and places, against an API server; and the removal of what kube-proxy left, against the
//! kernel. Only the latter needs root.

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

const PATIENCE: Duration = Duration::from_secs(20);

/// Short, so that tests are.
const GRACE: Duration = Duration::from_millis(800);

const NODE: &str = "n1";

const TAINT: &str = "dataplane.local/agent-not-ready";

/// A Node in an API server, and whoever takes care of it.
struct Bed {
    server: Server,
    objects: Objects,
    runtime: Runtime,
    status: watch::Sender<Status>,
}

impl Bed {
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

    fn master() -> User {
        User { name: "agent".to_owned(), groups: vec!["system:masters".to_owned()] }
    }

    /// Takes care of the node as this user; `more` says of what else.
    fn start(&self, user: &User, more: impl FnOnce(&mut Lifecycle)) -> Result<Problems> {
        let kubeconfig = Kubeconfig::from_yaml(&self.server.kubeconfig(user)?)?;
        self.runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            let client = Some(Client::try_from(config)?);
            let mut lifecycle =
                Lifecycle { client, grace: GRACE, ..Lifecycle::new(NODE, Netlink::connect()?) };
            more(&mut lifecycle);
            Ok(lifecycle.start(&self.status.subscribe()))
        })
    }

    /// What the agent says of itself from now on.
    fn say(&self, not_ready: Option<&str>) {
        let not_ready =
            not_ready.map(|reason| NotReady { check: "source".to_owned(), reason: reason.to_owned() });
        self.status.send_modify(|status| status.not_ready = not_ready.into_iter().collect());
    }

    fn node(&self) -> Result<Value> {
        self.objects.get("v1", "Node", "", NODE)?.context("the node is gone")
    }

    fn condition(&self) -> Result<Option<Value>> {
        let node = self.node()?;
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        ensure!(conditions.iter().any(|found| found["type"] == "Ready"), "a condition of others is gone");
        Ok(conditions.into_iter().find(|found| found["type"] == "NetworkUnavailable"))
    }

    fn wait_condition(&self, status: &str) -> Result<Value> {
        wait::until(&format!("NetworkUnavailable={status}"), PATIENCE, || {
            Ok(self.condition()?.filter(|found| found["status"] == status))
        })
    }

    fn taints(&self) -> Result<Vec<String>> {
        let node = self.node()?;
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        Ok(taints.iter().filter_map(|taint| taint["key"].as_str().map(str::to_owned)).collect())
    }

    fn wait_untainted(&self) -> Result<()> {
        wait::until("the startup taint goes", PATIENCE, || {
            Ok((!self.taints()?.iter().any(|key| key == TAINT)).then_some(()))
        })
    }

    fn wait_event(&self, reason: &str) -> Result<Value> {
        wait::until(&format!("Event {reason}"), PATIENCE, || {
            let events = self.objects.list("events.k8s.io/v1", "Event", "default")?;
            Ok(events
                .into_iter()
                .find(|event| event["regarding"]["name"] == NODE && event["reason"] == reason))
        })
    }
}

fn wait_problem(problems: &Problems, text: &str) -> Result<()> {
    wait::until(&format!("a problem with {text:?}"), PATIENCE, || {
        let now = problems.now();
        ensure!(now.iter().any(|problem| problem.message.contains(text)), "{now:?}");
        Ok(Some(()))
    })
}

#[test]
fn a_node_is_said_to_be_unavailable_after_a_while_and_available_at_once() -> Result<()> {
    let bed = Bed::new()?;
    let _problems = bed.start(&Bed::master(), |_| {})?;
    bed.say(Some("nothing yet"));
    let unavailable = bed.wait_condition("True")?;
    ensure!(unavailable["reason"] == "DataplaneNotReady", "{unavailable}");
    ensure!(unavailable["message"] == "source: nothing yet", "{unavailable}");
    ensure!(bed.taints()?.len() == 3, "taints went early");
    let event = bed.wait_event("DataplaneNotReady")?;
    ensure!(event["type"] == "Warning" && event["note"] == "source: nothing yet", "{event}");
    ensure!(event["regarding"]["uid"] == bed.node()?["metadata"]["uid"], "{event}");

    bed.say(None);
    let available = bed.wait_condition("False")?;
    ensure!(available["reason"] == "DataplaneReady", "{available}");
    bed.wait_untainted()?;
    ensure!(bed.taints()? == ["node.kubernetes.io/not-ready"], "{:?}", bed.taints()?);
    bed.wait_event("DataplaneReady")?;

    // nothing changed: nothing is written
    let before = bed.node()?;
    for revision in 1..20 {
        bed.status.send_modify(|status| status.revision = revision);
        std::thread::yield_now();
    }
    bed.say(Some("a restart"));
    bed.say(None);
    std::thread::sleep(GRACE * 2);
    ensure!(bed.node()?["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]);
    Ok(())
}

#[test]
fn an_agent_that_restarts_leaves_the_condition_as_it_is() -> Result<()> {
    let bed = Bed::new()?;
    bed.say(None);
    bed.start(&Bed::master(), |_| {})?;
    let first = bed.wait_condition("False")?;
    bed.wait_untainted()?;
    let before = bed.node()?;

    let (status, seen) = watch::channel(Status::starting(NODE));
    let again = Bed { status, ..bed };
    drop(seen);
    again.start(&Bed::master(), |lifecycle| lifecycle.grace = Duration::from_secs(30))?;
    again.say(None);
    // it has looked, and said so in an Event of its own
    wait::until("two Events", PATIENCE, || {
        let events = again.objects.list("events.k8s.io/v1", "Event", "default")?;
        let ready: Vec<_> = events.iter().filter(|event| event["reason"] == "DataplaneReady").collect();
        Ok((ready.len() == 2).then_some(()))
    })?;
    ensure!(again.node()?["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]);
    ensure!(again.condition()?.as_ref() == Some(&first));
    Ok(())
}

#[test]
fn a_taint_that_somebody_adds_meanwhile_is_not_lost() -> Result<()> {
    let bed = Bed::new()?;
    let conflict = Failure::new(
        409,
        "Conflict",
        "the object has been modified; please apply your changes to the latest version",
    );
    bed.server.faults().next(2, Requests::to("patch", "nodes"), Fault::Refuse(conflict));
    bed.start(&Bed::master(), |_| {})?;
    bed.say(None);
    bed.wait_untainted()?;
    ensure!(bed.taints()? == ["node.kubernetes.io/not-ready"], "{:?}", bed.taints()?);
    Ok(())
}

#[test]
fn an_api_server_that_is_away_is_told_when_it_is_back() -> Result<()> {
    let mut bed = Bed::new()?;
    bed.server.stop();
    let problems = bed.start(&Bed::master(), |_| {})?;
    bed.say(None);
    wait_problem(&problems, "cannot update its condition NetworkUnavailable")?;
    bed.server.start()?;
    bed.objects = bed.server.objects()?;
    bed.wait_condition("False")?;
    bed.wait_untainted()?;
    wait::until("the problem is gone", PATIENCE, || {
        Ok(problems
            .now()
            .iter()
            .all(|problem| !problem.message.contains("cannot update its condition"))
            .then_some(()))
    })
}

#[test]
fn a_missing_permission_is_named_and_no_more_is_used_than_is_granted() -> Result<()> {
    let bed = Bed::new()?;
    let user = User::service_account("dataplane-system", "dataplane-agent");
    let problems = bed.start(&user, |_| {})?;
    bed.say(None);
    wait_problem(&problems, "denied get of nodes to system:serviceaccount:dataplane-system:dataplane-agent")?;
    let text = fs::read_to_string(manifests::directory().join("base/rbac.yaml"))?;
    let objects: Vec<Value> = serde_norway::Deserializer::from_str(&text)
        .map(<Value as serde::Deserialize>::deserialize)
        .collect::<Result<_, _>>()?;
    bed.objects.apply(&[
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "dataplane-system"}}),
    ])?;
    bed.objects.apply(&objects)?;
    bed.wait_condition("False")?;
    bed.wait_untainted()?;
    bed.wait_event("DataplaneReady")?;
    let used: BTreeSet<_> = bed.server.used_permissions(&user).iter().map(ToString::to_string).collect();
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
fn the_configuration_comes_when_the_agent_is_ready_and_stays() -> Result<()> {
    let bed = Bed::new()?;
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
    let problems = bed.start(&Bed::master(), |lifecycle| lifecycle.install = Some(install))?;
    let (plugin, conflist) = (at("bin/dataplane-cni"), at("net.d/05-dataplane.conflist"));
    wait::until("the plugin", PATIENCE, || Ok(plugin.exists().then_some(())))?;
    wait_problem(&problems, "uses this configuration instead of")?;
    ensure!(!conflist.exists(), "pods would be started that cannot be connected");
    bed.say(None);
    wait::until("the configuration", PATIENCE, || Ok(conflist.exists().then_some(())))?;
    let text: Value = serde_json::from_str(&fs::read_to_string(&conflist)?)?;
    ensure!(text["plugins"][0]["agentSocket"] == at("run/agent.sock").display().to_string(), "{text}");
    bed.say(Some("restarting"));
    bed.wait_condition("True")?;
    ensure!(conflist.exists(), "a node is not to be without configuration for a restart");
    Ok(())
}

#[test]
fn kube_proxys_health_is_answered_and_a_taken_port_is_waited_for() -> Result<()> {
    let bed = Bed::new()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let health = taken.local_addr()?;
    let mode = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let proxy = ProxyAddresses { health: Some(health), mode: Some(mode) };
    let problems = bed.start(&Bed::master(), |lifecycle| lifecycle.proxy = proxy)?;
    wait_problem(&problems, &format!("cannot listen on {health}"))?;
    ensure!(
        wait::until("the mode", PATIENCE, || Ok(get(mode, "/proxyMode").ok()))?.ends_with("\r\n\r\nebpf")
    );
    drop(taken);
    let answer = wait::until("health", PATIENCE, || Ok(get(health, "/healthz").ok()))?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"nodeEligible\": true"), "{answer}");
    bed.status
        .send_modify(|status| status.leaving_reason = Some("its Node object is being deleted".to_owned()));
    wait::until("503", PATIENCE, || {
        let answer = get(health, "/healthz")?;
        Ok((answer.starts_with("HTTP/1.1 503") && answer.contains("\"nodeEligible\": false")).then_some(()))
    })?;
    ensure!(get(health, "/livez")?.starts_with("HTTP/1.1 200"));
    Ok(())
}

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
