//! The small API server does what clients of the real one rely on. Needs no root.

mod watches;

use std::{
    panic::resume_unwind,
    pin::pin,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_fake_apiserver::{Drop, Fault, Objects, Requests, Server, User};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Node, Pod},
};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
}

fn config_map(name: &str, value: &str) -> Value {
    let metadata = json!({"name": name, "namespace": "default", "labels": {"value": value}});
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"key": value}})
}

async fn client(server: &Server, user: &User) -> Result<Client> {
    let config = Kubeconfig::from_yaml(&server.kubeconfig(user)?)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn master() -> User {
    User { name: "root".to_owned(), groups: vec!["system:masters".to_owned()] }
}

fn status(error: kube::Error) -> Result<kube::core::Status> {
    match error {
        kube::Error::Api(status) => Ok(*status),
        other => bail!(other),
    }
}

async fn next<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> Result<T> {
    timeout(PATIENCE, stream.next()).await.context("no event came")?.context("the stream has ended")
}

#[tokio::test]
async fn a_list_by_pages_shows_one_moment_until_it_is_compacted() -> Result<()> {
    let server = Server::local()?;
    let objects = server.objects()?;
    let names: Vec<String> = (0..7).map(|number| format!("n{number}")).collect();
    objects.apply(&names.iter().map(|name| node(name)).collect::<Vec<_>>())?;
    let nodes: Api<Node> = Api::all(client(&server, &master()).await?);

    let first = nodes.list(&ListParams::default().limit(3)).await?;
    let token = first.metadata.continue_.clone().context("there is more")?;
    ensure!(first.metadata.remaining_item_count == Some(4), "{:?}", first.metadata);
    objects.delete(&[node("n5")])?;
    objects.apply(&[node("n8")])?;
    let second = nodes.list(&ListParams::default().limit(10).continue_token(&token)).await?;
    let shown: Vec<_> =
        first.items.iter().chain(&second.items).filter_map(|node| node.metadata.name.clone()).collect();
    ensure!(shown == names, "{shown:?}");
    ensure!(first.metadata.resource_version == second.metadata.resource_version);

    server.compact();
    let gone = nodes.list(&ListParams::default().limit(10).continue_token(&token)).await;
    let gone = status(gone.err().context("a list of a moment that is forgotten")?)?;
    ensure!((gone.code, gone.reason.as_str()) == (410, "Expired"), "{gone:?}");
    Ok(())
}

/// A child that has not yet become another program holds every socket of its parent.
#[test]
fn an_address_opens_again_while_processes_are_started() -> Result<()> {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let starter = scope.spawn(|| -> Result<()> {
            while !ended.load(Ordering::Relaxed) {
                ensure!(Command::new("true").status()?.success());
            }
            Ok(())
        });
        let restarts = || {
            let mut server = Server::local()?;
            (0..200).try_for_each(|_| {
                server.stop();
                server.start()
            })
        };
        let restarted: Result<()> = restarts();
        ended.store(true, Ordering::Relaxed);
        starter.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        restarted
    })
}

#[tokio::test]
async fn an_old_server_refuses_streaming_lists() -> Result<()> {
    let server = Server::local()?;
    server.behaviour().streaming_lists = false;
    let nodes: Api<Node> = Api::all(client(&server, &master()).await?);
    let streaming = WatchParams::default().initial_events();
    let refused = nodes.watch(&streaming, "0").await.map(drop);
    let refused = status(refused.err().context("it is not refused")?)?;
    ensure!(refused.code == 422 && refused.message.contains("WatchList feature gate"), "{refused:?}");
    server.behaviour().streaming_lists = true;
    let mut events = pin!(nodes.watch(&streaming, "0").await?);
    let WatchEvent::Bookmark(end) = next(&mut events).await?? else { bail!("no bookmark") };
    ensure!(end.metadata.annotations["k8s.io/initial-events-end"] == "true");
    Ok(())
}

#[tokio::test]
async fn of_two_writers_one_wins() -> Result<()> {
    let server = Server::local()?;
    let client = client(&server, &master()).await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-system");
    let lease =
        serde_json::from_value(json!({"metadata": {"name": "leader"}, "spec": {"holderIdentity": "a"}}))?;
    let mine = leases.create(&PostParams::default(), &lease).await?;
    let twice = leases.create(&PostParams::default(), &lease).await;
    ensure!(status(twice.err().context("made twice")?)?.is_already_exists());
    leases.replace("leader", &PostParams::default(), &mine).await?;
    let mut theirs = mine.clone();
    theirs.spec.as_mut().context("a spec")?.holder_identity = Some("b".to_owned());
    let theirs = leases.replace("leader", &PostParams::default(), &theirs).await?;
    let late = leases.replace("leader", &PostParams::default(), &mine).await;
    ensure!(status(late.err().context("written over")?)?.is_conflict());
    let blind = leases.replace("leader", &PostParams::default(), &lease).await;
    ensure!(status(blind.err().context("without a version")?)?.code == 422);
    let test = json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": mine.metadata.resource_version},
        {"op": "replace", "path": "/spec/holderIdentity", "value": "a"},
    ]);
    let patch = Patch::<()>::Json(serde_json::from_value(test)?);
    let late = leases.patch("leader", &PatchParams::default(), &patch).await;
    ensure!(status(late.err().context("patched over")?)?.code == 422);
    let gone = DeleteParams::default().preconditions(kube::api::Preconditions {
        uid: None,
        resource_version: mine.metadata.resource_version,
    });
    let late = leases.delete("leader", &gone).await;
    ensure!(status(late.err().context("deleted over")?)?.is_conflict());
    let kept = leases.get("leader").await?;
    ensure!(kept.metadata.resource_version == theirs.metadata.resource_version);
    Ok(())
}

#[tokio::test]
async fn a_node_keeps_its_range_and_status_is_written_apart() -> Result<()> {
    let server = Server::local()?;
    let client = client(&server, &master()).await?;
    let nodes: Api<Node> = Api::all(client);
    nodes.create(&PostParams::default(), &serde_json::from_value(node("n1"))?).await?;
    let patch = async |change: Value| nodes.patch("n1", &PatchParams::default(), &Patch::Merge(change)).await;
    let given = patch(json!({"spec": {"podCIDR": "10.1.0.0/24"}})).await?;
    let ranges = given.spec.context("a spec")?.pod_cidrs;
    ensure!(ranges == Some(vec!["10.1.0.0/24".to_owned()]), "{ranges:?}");
    let refused = patch(json!({"spec": {"podCIDR": "10.1.1.0/24", "podCIDRs": ["10.1.1.0/24"]}})).await;
    let refused = status(refused.err().context("another range")?)?;
    ensure!(
        refused.code == 422
            && refused.message
                == "Node \"n1\" is invalid: spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \
                    \"\" to valid",
        "{refused:?}"
    );
    let wrong = patch(json!({"spec": {"podCIDRs": 17}})).await;
    ensure!(status(wrong.err().context("a number")?)?.code == 400);

    let condition = json!({"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}});
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    let unchanged = patch(condition.clone()).await?;
    ensure!(unchanged.status.is_none_or(|status| status.conditions.is_none()));
    nodes.patch_status("n1", &PatchParams::default(), &Patch::Merge(&condition)).await?;
    let both = nodes.patch_status("n1", &PatchParams::default(), &Patch::Strategic(&ready)).await?;
    let conditions = both.status.context("a status")?.conditions.context("conditions")?;
    let kinds: Vec<_> = conditions.iter().map(|condition| condition.type_.as_str()).collect();
    ensure!(kinds == ["NetworkUnavailable", "Ready"], "{kinds:?}");
    Ok(())
}

#[tokio::test]
async fn a_user_may_what_roles_say_and_what_was_used_is_known() -> Result<()> {
    let server = Server::local()?;
    let user = User::service_account("kube-system", "dataplane");
    let nodes: Api<Node> = Api::all(client(&server, &user).await?);
    let denied = status(nodes.list(&ListParams::default()).await.err().context("it may list")?)?;
    ensure!(
        denied.message
            == "nodes is forbidden: User \"system:serviceaccount:kube-system:dataplane\" cannot list resource \
                \"nodes\" in API group \"\" at the cluster scope",
        "{denied:?}"
    );
    let rbac = "rbac.authorization.k8s.io/v1";
    server.objects()?.apply(&[
        json!({
            "apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": "dataplane"},
            "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}],
        }),
        json!({
            "apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": "dataplane"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "dataplane"},
            "subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "dataplane"}],
        }),
    ])?;
    nodes.list(&ListParams::default()).await?;
    let uses: Vec<String> = server.uses(&user).iter().map(ToString::to_string).collect();
    ensure!(uses == ["list nodes (core)"], "{uses:?}");
    Ok(())
}

#[tokio::test]
async fn faults_come_when_they_are_asked_for_and_go() -> Result<()> {
    let mut server = Server::local()?;
    let objects = server.objects()?;
    objects.apply(&[node("a")])?;
    let nodes: Api<Node> = Api::all(client(&server, &master()).await?);
    let list = ListParams::default();
    let by_root =
        |fault| server.faults().next(1, Requests { user: Some("root".to_owned()), ..Requests::all() }, fault);
    by_root(Fault::gone());
    ensure!(status(nodes.list(&list).await.err().context("gone")?)?.code == 410);
    by_root(Fault::WrongTypes);
    nodes.list(&list).await.err().context("a number for metadata is no node")?;
    by_root(Fault::Break);
    nodes.list(&list).await.err().context("half of a list is no list")?;
    by_root(Fault::Trickle(64, Duration::from_millis(1)));
    ensure!(nodes.list(&list).await?.items.len() == 1);
    ensure!(server.faults().clear() == [1, 1, 1, 1]);

    let pods: Api<Pod> = Api::all(client(&server, &master()).await?);
    let events = pods.watch(&WatchParams::default(), "0").await?;
    server.faults().send_to_watches("pods", r#"{"type":"ADDED","object":{"kind":"Pod","metadata":17}}"#);
    server.drop_watches(Drop::Orderly);
    let events: Vec<_> = timeout(PATIENCE, pin!(events).map(|event| event.is_ok()).collect()).await?;
    ensure!(events == [false], "{events:?}");

    server.stop();
    ensure!(nodes.list(&list).await.is_err(), "nobody is there");
    server.start()?;
    ensure!(nodes.list(&list).await?.items.len() == 1);
    Ok(())
}

#[tokio::test]
async fn finalizers_hold_and_names_are_made() -> Result<()> {
    let server = Server::local()?;
    let objects: Objects = server.objects()?;
    let held = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "finalizers": ["x/y"]}});
    objects.apply(std::slice::from_ref(&held))?;
    objects.delete(std::slice::from_ref(&held))?;
    let leaving = objects.get("v1", "Node", "", "n")?.context("it is held")?;
    ensure!(leaving["metadata"]["deletionTimestamp"].is_string());
    objects.patch(&held, &json!({"metadata": {"finalizers": null}}))?;
    ensure!(objects.get("v1", "Node", "", "n")?.is_none(), "nobody holds it");
    let made = objects.create(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "map-", "namespace": "default"},
    }))?;
    ensure!(made["metadata"]["name"].as_str().is_some_and(|name| name.len() == "map-".len() + 5), "{made}");
    ensure!(
        objects
            .create(
                &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "nowhere"}})
            )
            .is_err()
    );
    let maps: Api<ConfigMap> = Api::all(client(&server, &master()).await?);
    let stream = maps.watch_metadata(&WatchParams::default(), "0").await?;
    let first = timeout(PATIENCE, pin!(stream).try_next()).await??.context("an event")?;
    ensure!(matches!(first, WatchEvent::Added(map) if map.metadata.generate_name.as_deref() == Some("map-")));
    Ok(())
}
