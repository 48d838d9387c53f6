//! An API server that forgets, refuses, is away or is another one.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_agent::state::Store;
use dataplane_fake_apiserver::{Fault, Objects, Requests, Server, User, WatchEnd};
use serde_json::json;

use super::{NODE, World, endpoints, everything, master, name, node, pod, service, slice, with_everything};

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_has_forgotten_is_compared() -> Result<()> {
    for streams in [true, false] {
        let server = Server::local()?;
        server.behaviour().streaming_lists = streams;
        let objects = server.objects()?;
        objects.apply(&everything())?;
        let state = tempfile::tempdir()?;
        let mut world = World::synced(&server, state.path()).await?;
        world.until_watching().await?;
        world.log.clear();

        let ours = Requests { user: Some(master().name), ..Requests::all() };
        server.faults().always(ours, Fault::internal());
        server.drop_watches(WatchEnd::Reset);
        // n7 leaves and another comes by its range; n6 is re-created with another; web gets an endpoint
        objects.delete(&[node("n7", 7), node("n6", 6), pod("here", NODE)])?;
        objects.apply(&[node("n8", 7), node("n6", 9), slice("web", &["10.1.1.1"])])?;
        world.until_problem("500").await?;
        ensure!(world.progress.behind_since().is_some());
        ensure!(world.store.nodes().count() == 7, "the last state is kept");
        server.compact();
        server.faults().clear();
        let is_new = |store: &Store| {
            let cidr = |name: &str| Some(store.node(name)?.pod_cidrs.first()?.to_string());
            cidr("n8").as_deref() == Some("10.1.7.0/24")
                && cidr("n6").as_deref() == Some("10.1.9.0/24")
                && store.node("n7").is_none()
                && endpoints(store, "web") == 1
                && store.pods().count() == 0
        };
        world.until("the new state", is_new).await?;
        world.until_watching().await?;
        world.until_no_problem().await?;
        ensure!(world.progress.relists() > 0);
        // nothing that stayed was touched
        let mut heard = world.heard();
        heard.sort();
        heard.dedup();
        let changed = ["EndpointSlice default/web-1", "Node n6", "Node n7", "Node n8", "Pod default/here"];
        ensure!(heard == changed, "streams {streams}: {heard:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_in_trouble_is_asked_until_it_answers() -> Result<()> {
    let server = Server::local()?;
    server.behaviour().streaming_lists = false;
    server.behaviour().page = 3;
    server.objects()?.apply(&everything())?;
    let faults = server.faults();
    faults.next(2, Requests::to("list", "nodes"), Fault::internal());
    faults.next(1, Requests::to("list", "services"), Fault::too_many_requests(1));
    faults.next(1, Requests::to("list", "endpointslices"), Fault::Truncate);
    faults.next(1, Requests::to("list", "pods"), Fault::gone());
    faults.next(1, Requests::to("watch", "nodes"), Fault::gone());
    faults.next(1, Requests::to("watch", "services"), Fault::Truncate);
    faults.next(1, Requests::to("list", "namespaces"), Fault::Delay(Duration::from_millis(500)));
    faults.next(1, Requests::to("list", "namespaces"), Fault::Trickle(64, Duration::from_millis(2)));
    let state = tempfile::tempdir()?;
    let mut world = World::synced(&server, state.path()).await?;
    ensure!(world.store.nodes().count() == 7 && endpoints(&world.store, "web") == 2);
    world.until_watching().await?;
    world.until_no_problem().await?;
    ensure!(world.progress.watch_errors() >= 5, "{}", world.progress.watch_errors());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_is_named_and_tried_again() -> Result<()> {
    let (server, objects) = with_everything()?;
    let user = User::service_account("kube-system", "dataplane");
    let role = |slices: bool| {
        let core = json!({
            "apiGroups": [""], "resources": ["nodes", "namespaces", "services", "pods"], "verbs": ["list", "watch"],
        });
        let discovery = json!({
            "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"],
        });
        let networking = json!({
            "apiGroups": ["networking.k8s.io"], "resources": ["servicecidrs"], "verbs": ["list", "watch"],
        });
        let rules = if slices { json!([core, networking, discovery]) } else { json!([core, networking]) };
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "dataplane"},
            "rules": rules,
        })
    };
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "dataplane"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "dataplane"},
        "subjects": [{"kind": "ServiceAccount", "name": "dataplane", "namespace": "kube-system"}],
    });
    objects.apply(&[role(false), binding])?;
    let state = tempfile::tempdir()?;
    let mut world = World::start(&server, &user, state.path()).await?;
    let sentence = world.until_problem("endpointslices").await?;
    let expected = "API server: API server denied watch of endpointslices.discovery.k8s.io to \
                    system:serviceaccount:kube-system:dataplane at the cluster scope";
    ensure!(sentence.starts_with(expected), "{sentence}");
    ensure!(!world.store.is_synced());
    objects.apply(&[role(true)])?;
    world.until("synced", Store::is_synced).await?;
    world.until_no_problem().await?;
    // taken away again: what is known stays
    objects.apply(&[role(false)])?;
    server.drop_watches(WatchEnd::Closed);
    world.until_problem("endpointslices").await?;
    ensure!(endpoints(&world.store, "web") == 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_the_agent_starts_from_what_the_cluster_last_was() -> Result<()> {
    let mut server = Server::local()?;
    server.objects()?.apply(&everything())?;
    let state = tempfile::tempdir()?;
    let world = World::synced(&server, state.path()).await?;
    world.stop().await?;

    server.stop();
    let mut world = World::start(&server, &master(), state.path()).await?;
    world
        .until("the last state", |store| {
            store.nodes().count() == 7 && endpoints(store, "web") == 2 && store.pods().count() == 1
        })
        .await?;
    let sentence = world.until_problem("cannot reach any API server").await?;
    ensure!(sentence.contains(&server.urls()[0]) && sentence.contains("Connection refused"), "{sentence}");
    ensure!(!world.store.is_synced() && world.progress.behind_since().is_some());

    server.start()?;
    world.log.clear();
    let objects = server.objects()?;
    objects.delete(&[node("n7", 7)])?;
    world.until("synced", Store::is_synced).await?;
    world.until("n7 is gone", |store| store.node("n7").is_none()).await?;
    ensure!(world.heard() == ["Node n7"], "{:?}", world.heard());
    world.until_watching().await?;
    world.until_no_problem().await
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_takes_over() -> Result<()> {
    let mut server = Server::local()?;
    server.listen(None, "127.0.0.1:0".parse()?)?;
    let urls = server.urls();
    let kubeconfig = server.kubeconfig(&master())?;
    server.objects()?.apply(&everything())?;
    let state = tempfile::tempdir()?;
    let mut world = World::synced(&server, state.path()).await?;
    world.until_watching().await?;
    for (index, other) in [(0, 1), (1, 0), (0, 1)] {
        server.stop_one(index)?;
        let objects = Objects::connect(&kubeconfig.replace(&urls[0], &urls[other]), None)?;
        let ip = format!("10.96.1.{}", index + 1);
        let name_now = format!("s{index}{other}");
        objects.delete(&[service(&name_now, "")])?;
        world.until("the service is gone", |store| store.service(&name(&name_now)).is_none()).await?;
        objects.apply(&[service(&name_now, &ip)])?;
        world.until("the service", |store| store.service(&name(&name_now)).is_some()).await?;
        server.start()?;
    }
    ensure!(world.progress.failovers() >= 2, "{} failovers", world.progress.failovers());
    ensure!(world.progress.relists() == 0, "a server of the same cluster goes on where the other was");
    Ok(())
}
