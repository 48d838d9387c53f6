//! The test API server behaves as clients of the real one expect. Needs no root.

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
use dataplane_fake_apiserver::{Fault, Objects, Requests, Server, User, WatchEnd};
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

const TIMEOUT: Duration = Duration::from_secs(10);

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
    timeout(TIMEOUT, stream.next())
        .await
        .context("no event before the timeout")?
        .context("the stream has ended")
}

#[tokio::test]
async fn paginated_list_shows_one_revision_until_compaction() -> Result<()> {
    let server = Server::local()?;
    let objects = server.objects()?;
    let names: Vec<String> = (0..7).map(|number| format!("n{number}")).collect();
    objects.apply(&names.iter().map(|name| node(name)).collect::<Vec<_>>())?;
    let nodes: Api<Node> = Api::all(client(&server, &master()).await?);

    let first = nodes.list(&ListParams::default().limit(3)).await?;
    let token = first.metadata.continue_.clone().context("no continue token")?;
    ensure!(first.metadata.remaining_item_count == Some(4), "{:?}", first.metadata);
    objects.delete(&[node("n5")])?;
    objects.apply(&[node("n8")])?;
    let second = nodes.list(&ListParams::default().limit(10).continue_token(&token)).await?;
    let shown: Vec<_> =
        first.items.iter().chain(&second.items).filter_map(|node| node.metadata.name.clone()).collect();
    ensure!(shown == names, "{shown:?}");
    ensure!(first.metadata.resource_version == second.metadata.resource_version);

    server.compact();
    let expired = nodes.list(&ListParams::default().limit(10).continue_token(&token)).await;
    let expired = status(expired.err().context("the list of a compacted revision succeeded")?)?;
    ensure!((expired.code, expired.reason.as_str()) == (410, "Expired"), "{expired:?}");
    Ok(())
}

/// A child between fork and exec holds every socket of its parent.
#[test]
fn listener_restarts_while_child_processes_start() -> Result<()> {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let starter = scope.spawn(|| -> Result<()> {
            while !ended.load(Ordering::Relaxed) {
                ensure!(Command::new("true").status()?.success());
            }
            Ok(())
        });
        let restart = || {
            let mut server = Server::local()?;
            (0..200).try_for_each(|_| {
                server.stop();
                server.start()
            })
        };
        let restarted: Result<()> = restart();
        ended.store(true, Ordering::Relaxed);
        starter.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        restarted
    })
}

#[tokio::test]
async fn streaming_lists_are_rejected_without_the_feature() -> Result<()> {
    let server = Server::local()?;
    server.behaviour().streaming_lists = false;
    let nodes: Api<Node> = Api::all(client(&server, &master()).await?);
    let streaming = WatchParams::default().initial_events();
    let refused = nodes.watch(&streaming, "0").await.map(drop);
    let refused = status(refused.err().context("the watch was accepted")?)?;
    ensure!(refused.code == 422 && refused.message.contains("WatchList feature gate"), "{refused:?}");
    server.behaviour().streaming_lists = true;
    let mut events = pin!(nodes.watch(&streaming, "0").await?);
    let WatchEvent::Bookmark(end) = next(&mut events).await?? else { bail!("no bookmark") };
    ensure!(end.metadata.annotations["k8s.io/initial-events-end"] == "true");
    Ok(())
}

#[tokio::test]
async fn conflicting_writes_are_rejected() -> Result<()> {
    let server = Server::local()?;
    let client = client(&server, &master()).await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-system");
    let lease =
        serde_json::from_value(json!({"metadata": {"name": "leader"}, "spec": {"holderIdentity": "a"}}))?;
    let first = leases.create(&PostParams::default(), &lease).await?;
    let twice = leases.create(&PostParams::default(), &lease).await;
    ensure!(status(twice.err().context("the lease was created twice")?)?.is_already_exists());
    leases.replace("leader", &PostParams::default(), &first).await?;
    let mut second = first.clone();
    second.spec.as_mut().context("a spec")?.holder_identity = Some("b".to_owned());
    let second = leases.replace("leader", &PostParams::default(), &second).await?;
    let late = leases.replace("leader", &PostParams::default(), &first).await;
    ensure!(status(late.err().context("an outdated lease was written")?)?.is_conflict());
    let unversioned = leases.replace("leader", &PostParams::default(), &lease).await;
    ensure!(status(unversioned.err().context("a lease without resourceVersion was written")?)?.code == 422);
    let test = json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": first.metadata.resource_version},
        {"op": "replace", "path": "/spec/holderIdentity", "value": "a"},
    ]);
    let patch = Patch::<()>::Json(serde_json::from_value(test)?);
    let late = leases.patch("leader", &PatchParams::default(), &patch).await;
    ensure!(status(late.err().context("an outdated patch was applied")?)?.code == 422);
    let outdated = DeleteParams::default().preconditions(kube::api::Preconditions {
        uid: None,
        resource_version: first.metadata.resource_version,
    });
    let late = leases.delete("leader", &outdated).await;
    ensure!(
        status(late.err().context("the lease was deleted with an outdated precondition")?)?.is_conflict()
    );
    let kept = leases.get("leader").await?;
    ensure!(kept.metadata.resource_version == second.metadata.resource_version);
    Ok(())
}

#[tokio::test]
async fn node_pod_cidr_is_immutable_and_status_is_a_subresource() -> Result<()> {
    let server = Server::local()?;
    let client = client(&server, &master()).await?;
    let nodes: Api<Node> = Api::all(client);
    nodes.create(&PostParams::default(), &serde_json::from_value(node("n1"))?).await?;
    let patch = async |change: Value| nodes.patch("n1", &PatchParams::default(), &Patch::Merge(change)).await;
    let given = patch(json!({"spec": {"podCIDR": "10.1.0.0/24"}})).await?;
    let ranges = given.spec.context("a spec")?.pod_cidrs;
    ensure!(ranges == Some(vec!["10.1.0.0/24".to_owned()]), "{ranges:?}");
    let refused = patch(json!({"spec": {"podCIDR": "10.1.1.0/24", "podCIDRs": ["10.1.1.0/24"]}})).await;
    let refused = status(refused.err().context("the pod CIDR was changed")?)?;
    ensure!(
        refused.code == 422
            && refused.message
                == "Node \"n1\" is invalid: spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \
                    \"\" to valid",
        "{refused:?}"
    );
    let wrong = patch(json!({"spec": {"podCIDRs": 17}})).await;
    ensure!(status(wrong.err().context("a number was accepted as podCIDRs")?)?.code == 400);

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
async fn roles_authorize_and_used_permissions_are_recorded() -> Result<()> {
    let server = Server::local()?;
    let user = User::service_account("kube-system", "dataplane");
    let nodes: Api<Node> = Api::all(client(&server, &user).await?);
    let denied = status(
        nodes.list(&ListParams::default()).await.err().context("the list was allowed without a role")?,
    )?;
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
    let used: Vec<String> = server.used_permissions(&user).iter().map(ToString::to_string).collect();
    ensure!(used == ["list nodes (core)"], "{used:?}");
    Ok(())
}

#[tokio::test]
async fn faults_are_injected_and_cleared() -> Result<()> {
    let mut server = Server::local()?;
    let objects = server.objects()?;
    objects.apply(&[node("a")])?;
    let nodes: Api<Node> = Api::all(client(&server, &master()).await?);
    let list = ListParams::default();
    let by_root =
        |fault| server.faults().next(1, Requests { user: Some("root".to_owned()), ..Requests::all() }, fault);
    by_root(Fault::gone());
    ensure!(status(nodes.list(&list).await.err().context("the list succeeded")?)?.code == 410);
    by_root(Fault::WrongTypes);
    nodes.list(&list).await.err().context("a node with numeric metadata was decoded")?;
    by_root(Fault::Truncate);
    nodes.list(&list).await.err().context("a truncated list was decoded")?;
    by_root(Fault::Trickle(64, Duration::from_millis(1)));
    ensure!(nodes.list(&list).await?.items.len() == 1);
    ensure!(server.faults().clear() == [1, 1, 1, 1]);

    let pods: Api<Pod> = Api::all(client(&server, &master()).await?);
    let events = pods.watch(&WatchParams::default(), "0").await?;
    server.faults().send_to_watches("pods", r#"{"type":"ADDED","object":{"kind":"Pod","metadata":17}}"#);
    server.drop_watches(WatchEnd::Closed);
    let events: Vec<_> = timeout(TIMEOUT, pin!(events).map(|event| event.is_ok()).collect()).await?;
    ensure!(events == [false], "{events:?}");

    server.stop();
    ensure!(nodes.list(&list).await.is_err(), "the stopped server responded");
    server.start()?;
    ensure!(nodes.list(&list).await?.items.len() == 1);
    Ok(())
}

#[tokio::test]
async fn finalizers_delay_deletion_and_names_are_generated() -> Result<()> {
    let server = Server::local()?;
    let objects: Objects = server.objects()?;
    let held = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "finalizers": ["x/y"]}});
    objects.apply(std::slice::from_ref(&held))?;
    objects.delete(std::slice::from_ref(&held))?;
    let terminating = objects.get("v1", "Node", "", "n")?.context("the node with a finalizer was deleted")?;
    ensure!(terminating["metadata"]["deletionTimestamp"].is_string());
    objects.patch(&held, &json!({"metadata": {"finalizers": null}}))?;
    ensure!(objects.get("v1", "Node", "", "n")?.is_none(), "the node without finalizers still exists");
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
    let first = timeout(TIMEOUT, pin!(stream).try_next()).await??.context("an event")?;
    ensure!(matches!(first, WatchEvent::Added(map) if map.metadata.generate_name.as_deref() == Some("map-")));
    Ok(())
}
