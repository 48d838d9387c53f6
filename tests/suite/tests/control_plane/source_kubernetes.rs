//! The source `kubernetes` against an API server that pages, compacts, closes watches, denies
//! requests and stops. Needs no root.

mod server;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_agent::{
    cluster::{self, Access},
    source::{KubernetesSource, Problems, Progress},
    state::{NamespacedName, ObjectKey, SourceEvent, Store},
};
use dataplane_fake_apiserver::{Failure, Fault, Objects, Requests, Server, User, WatchEnd};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

const TIMEOUT: Duration = Duration::from_secs(30);

const NODE: &str = "n1";

/// A running source, and the state from its events.
struct RunningSource {
    events: mpsc::Receiver<SourceEvent>,
    store: Store,
    /// Keys of all objects with events, in order.
    log: Vec<ObjectKey>,
    problems: Problems,
    progress: Progress,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl RunningSource {
    /// Starts a source as this user, with all addresses of the server and this state directory.
    async fn start(server: &Server, user: &User, state: &Path) -> Result<Self> {
        std::fs::create_dir_all(state)?;
        let kubeconfig = state.join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig(user)?)?;
        let servers = server.urls().iter().map(|url| url.parse()).collect::<Result<_, _>>()?;
        let access = Access { servers, kubeconfig: Some(kubeconfig), ..Access::default() };
        let (sender, events) = mpsc::channel(16);
        let (problems, progress) = (Problems::default(), Progress::new(access.failover_stats.clone()));
        let client = cluster::connect(&access).await?;
        let source = KubernetesSource::new(client, NODE, state, sender, problems.clone(), progress.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(source.run(async {
            stopped.await.ok();
        }));
        Ok(Self { events, store: Store::default(), log: Vec::new(), problems, progress, stop, task })
    }

    async fn synced(server: &Server, state: &Path) -> Result<Self> {
        let mut source = Self::start(server, &admin(), state).await?;
        source.until("synced", Store::is_synced).await?;
        Ok(source)
    }

    /// Applies events until the state meets the condition.
    async fn until(&mut self, what: &str, condition: impl Fn(&Store) -> bool) -> Result<()> {
        let end = Instant::now() + TIMEOUT;
        while !condition(&self.store) {
            let event = timeout_at(end, self.events.recv()).await;
            let event = event
                .with_context(|| format!("{what}: timed out; problems: {:?}", self.problems.current()))?;
            self.take(event.with_context(|| format!("{what}: the source has ended"))?);
        }
        Ok(())
    }

    /// Waits for a problem with this text; applies events meanwhile.
    async fn until_problem(&mut self, text: &str) -> Result<String> {
        let mut seen = self.problems.subscribe();
        let found = async {
            loop {
                let now = seen.borrow_and_update().clone();
                let messages =
                    now.into_iter().map(|problem| format!("{}: {}", problem.subject, problem.message));
                if let Some(message) = messages.into_iter().find(|message| message.contains(text)) {
                    return Ok(message);
                }
                tokio::select! {
                    changed = seen.changed() => changed?,
                    event = self.events.recv() => match event {
                        Some(SourceEvent::Upsert(object)) => {
                            self.log.push(object.key());
                            self.store.apply(SourceEvent::Upsert(object));
                        }
                        Some(event) => drop(self.store.apply(event)),
                        None => bail!("the source has ended"),
                    },
                }
            }
        };
        timeout(TIMEOUT, found).await.with_context(|| format!("problem {text:?}"))?
    }

    async fn until_no_problem(&mut self) -> Result<()> {
        let mut seen = self.problems.subscribe();
        let empty = seen.wait_for(Vec::is_empty);
        timeout(TIMEOUT, empty).await.with_context(|| format!("{:?}", self.problems.current()))??;
        Ok(())
    }

    async fn until_watching(&self) -> Result<()> {
        let mut seen = self.progress.subscribe();
        let watching = seen.wait_for(Option::is_none);
        timeout(TIMEOUT, watching).await.context("not all kinds are watched")??;
        Ok(())
    }

    fn take(&mut self, event: SourceEvent) {
        match &event {
            SourceEvent::Upsert(object) => self.log.push(object.key()),
            SourceEvent::Remove(key, _) => self.log.push(key.clone()),
            SourceEvent::Synced => {}
        }
        self.store.apply(event);
    }

    fn changed_objects(&self) -> Vec<String> {
        self.log.iter().map(ToString::to_string).collect()
    }

    async fn stop(self) -> Result<()> {
        self.stop.send(()).ok().context("the source has ended")?;
        timeout(TIMEOUT, self.task).await.context("the source did not end")??;
        Ok(())
    }
}

fn admin() -> User {
    User { name: "agent".to_owned(), groups: vec!["system:masters".to_owned()] }
}

fn node(name: &str, number: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDR": format!("10.1.{number}.0/24"), "podCIDRs": [format!("10.1.{number}.0/24")]},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.0.{number}")}]},
    })
}

fn service(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80}]},
    })
}

fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("{service}-1"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints,
    })
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
    })
}

fn name(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

fn endpoints(store: &Store, service: &str) -> usize {
    store.slices_of(&name(service)).map(|slice| slice.endpoints.len()).sum()
}

fn service_range(name: &str, cidrs: &[&str]) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
        "spec": {"cidrs": cidrs},
    })
}

/// An API server with [`all_objects`].
fn server_with_objects() -> Result<(Server, Objects)> {
    let server = Server::local()?;
    let objects = server.objects()?;
    objects.apply(&all_objects())?;
    Ok((server, objects))
}

fn all_objects() -> Vec<Value> {
    let nodes = (1..=7).map(|number| node(&format!("n{number}"), number));
    nodes
        .chain([
            service("web", "10.96.0.1"),
            slice("web", &["10.1.1.1", "10.1.2.1"]),
            pod("here", NODE),
            pod("there", "n2"),
        ])
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_objects_arrive_before_synced_by_streams_and_by_pages() -> Result<()> {
    for streams in [true, false] {
        let server = Server::local()?;
        server.behaviour().streaming_lists = streams;
        server.behaviour().page = 3;
        server.objects()?.apply(&all_objects())?;
        let state = tempfile::tempdir()?;
        let source = RunningSource::synced(&server, state.path()).await?;
        ensure!(source.store.nodes().count() == 7, "streams: {streams}");
        ensure!(source.store.service(&name("web")).is_some() && endpoints(&source.store, "web") == 2);
        ensure!(source.store.namespace("kube-system").is_some());
        let pods: Vec<_> = source.store.pods().map(|pod| pod.name.to_string()).collect();
        ensure!(pods == ["default/here"], "{pods:?}");
        source.until_watching().await?;
        ensure!(source.problems.current().is_empty() && source.progress.relists() == 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_arrive_in_spite_of_broken_watches() -> Result<()> {
    let (server, objects) = server_with_objects()?;
    let state = tempfile::tempdir()?;
    let mut source = RunningSource::synced(&server, state.path()).await?;
    source.until_watching().await?;
    source.log.clear();
    for (round, how) in [WatchEnd::Closed, WatchEnd::Reset, WatchEnd::Reset].into_iter().enumerate() {
        let addresses: Vec<_> = (0..=round).map(|number| format!("10.1.3.{}", number + 1)).collect();
        server.drop_watches(how);
        objects.apply(&[slice("web", &addresses.iter().map(String::as_str).collect::<Vec<_>>())])?;
        source.until("the new slice", |store| endpoints(store, "web") == round + 1).await?;
    }
    objects.delete(&[service("web", ""), node("n7", 7), pod("here", NODE)])?;
    source
        .until("the deletions", |store| {
            store.service(&name("web")).is_none() && store.node("n7").is_none() && store.pods().count() == 0
        })
        .await?;
    ensure!(source.progress.relists() == 0, "{} relists", source.progress.relists());
    ensure!(source.log.len() == 6, "{:?}", source.changed_objects());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_object_affects_no_other() -> Result<()> {
    let (server, objects) = server_with_objects()?;
    let state = tempfile::tempdir()?;
    let mut source = RunningSource::synced(&server, state.path()).await?;
    source.until_watching().await?;
    let mut broken = service("web", "10.96.0.1");
    broken["spec"]["ports"][0]["port"] = json!("http");
    server.faults().send_to_watches("services", &json!({"type": "MODIFIED", "object": broken}).to_string());
    let message = source.until_problem("Service default/web").await?;
    ensure!(message.contains("spec.ports[0].port: invalid type: string"), "{message}");
    ensure!(
        source.store.service(&name("web")).is_some_and(|web| web.ports.len() == 1),
        "the last valid state must stay"
    );
    // not JSON, an object without a name, an unknown event type
    for line in
        ["{\"type\":", r#"{"type":"ADDED","object":{"metadata":7}}"#, r#"{"type":"SEEN","object":{}}"#]
    {
        source.until_watching().await?;
        server.faults().send_to_watches("services", line);
    }
    objects.apply(&[service("next", "10.96.0.2")])?;
    source.until("the next service", |store| store.service(&name("next")).is_some()).await?;
    // the stored object was valid all the time
    objects.patch(&service("web", ""), &json!({"metadata": {"labels": {"a": "b"}}}))?;
    source.until_no_problem().await
}

#[tokio::test(flavor = "multi_thread")]
async fn service_cidrs_are_watched_if_the_server_has_them() -> Result<()> {
    let server = Server::local()?;
    server.objects()?.apply(&all_objects())?;
    server.objects()?.apply(&[service_range("kubernetes", &["10.96.0.0/16", "fd96::/108"])])?;
    let state = tempfile::tempdir()?;
    let mut source = RunningSource::synced(&server, state.path()).await?;
    let range = source.store.service_cidr("kubernetes").context("the range")?;
    ensure!(
        range.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>() == ["10.96.0.0/16", "fd96::/108"]
    );
    server.objects()?.apply(&[service_range("more", &["10.112.0.0/16"])])?;
    source.until("another range", |store| store.service_cidr("more").is_some()).await?;
    source.stop().await?;

    // a server older than Kubernetes 1.33
    let server = Server::local()?;
    server.objects()?.apply(&all_objects())?;
    let unknown =
        || Fault::Refuse(Failure::new(404, "NotFound", "the server could not find the requested resource"));
    server.faults().next(u32::MAX, Requests::to("list", "servicecidrs"), unknown());
    server.faults().next(u32::MAX, Requests::to("watch", "servicecidrs"), unknown());
    let state = tempfile::tempdir()?;
    let source = RunningSource::synced(&server, state.path()).await?;
    ensure!(source.problems.current().is_empty(), "{:?}", source.problems.current());
    source.until_watching().await?;
    ensure!(source.progress.watch_errors() == 0, "a missing resource type is not a watch error");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_but_valid_objects_change_no_others() -> Result<()> {
    let (server, objects) = server_with_objects()?;
    let state = tempfile::tempdir()?;
    let mut source = RunningSource::synced(&server, state.path()).await?;
    source.log.clear();
    let mut headless = service("headless", "None");
    headless["spec"]["clusterIPs"] = json!(["None"]);
    let external = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "external", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "example.com"},
    });
    let mut foreign = service("foreign", "10.96.0.3");
    foreign["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
    let mut without_node = slice("odd", &["10.1.1.1", "10.1.1.1"]);
    without_node["endpoints"][1]["conditions"] =
        json!({"ready": false, "serving": true, "terminating": true});
    let mut headless_slice = slice("headless", &["10.1.1.3"]);
    headless_slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    let mut empty = slice("empty", &[]);
    empty["ports"] = json!(null);
    let odd = [headless, external, foreign, without_node, headless_slice, empty];
    objects.apply(&odd)?;
    objects.apply(&[service("last", "10.96.0.9")])?;
    source.until("the last service", |store| store.service(&name("last")).is_some()).await?;
    source.until("the odd slice", |store| endpoints(store, "odd") == 2).await?;
    let services: Vec<_> = source.store.services().map(|service| service.name.name.as_str()).collect();
    ensure!(services == ["last", "web"], "{services:?}");
    ensure!(endpoints(&source.store, "headless") == 0 && source.problems.current().is_empty());
    // a heartbeat is not a change
    source.log.clear();
    let beat = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    objects.patch_status(&node("n1", 1), &beat)?;
    objects.delete(&odd)?;
    objects.delete(&[service("last", "")])?;
    source.until("the last service is gone", |store| store.service(&name("last")).is_none()).await?;
    source.until("the odd slice is gone", |store| endpoints(store, "odd") == 0).await?;
    ensure!(!source.changed_objects().contains(&"Node n1".to_owned()), "{:?}", source.changed_objects());
    Ok(())
}
