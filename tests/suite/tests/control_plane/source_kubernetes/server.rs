//! An API server that compacts, fails, denies, is down, or is replaced by another.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_agent::state::Store;
use dataplane_fake_apiserver::{Fault, Objects, Requests, Server, User, WatchEnd};
use serde_json::json;

use super::{
    NODE, RunningSource, admin, all_objects, endpoints, name, node, pod, server_with_objects, service, slice,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_relist_reports_only_what_changed() -> Result<()> {
    for streams in [true, false] {
        let server = Server::local()?;
        server.behaviour().streaming_lists = streams;
        let objects = server.objects()?;
        objects.apply(&all_objects())?;
        let state = tempfile::tempdir()?;
        let mut source = RunningSource::synced(&server, state.path()).await?;
        source.until_watching().await?;
        source.log.clear();

        let of_source = Requests { user: Some(admin().name), ..Requests::all() };
        server.faults().always(of_source, Fault::internal());
        server.drop_watches(WatchEnd::Reset);
        // n8 replaces n7 and has its range; n6 is recreated with another range; web loses an
        // endpoint
        objects.delete(&[node("n7", 7), node("n6", 6), pod("here", NODE)])?;
        objects.apply(&[node("n8", 7), node("n6", 9), slice("web", &["10.1.1.1"])])?;
        source.until_problem("500").await?;
        ensure!(source.progress.behind_since().is_some());
        ensure!(source.store.nodes().count() == 7, "the last state is kept");
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
        source.until("the new state", is_new).await?;
        source.until_watching().await?;
        source.until_no_problem().await?;
        ensure!(source.progress.relists() > 0);
        // unchanged objects have no events
        let mut changed = source.changed_objects();
        changed.sort();
        changed.dedup();
        let changed = ["EndpointSlice default/web-1", "Node n6", "Node n7", "Node n8", "Pod default/here"];
        ensure!(changed == changed, "streams {streams}: {changed:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_retried_until_the_server_answers() -> Result<()> {
    let server = Server::local()?;
    server.behaviour().streaming_lists = false;
    server.behaviour().page = 3;
    server.objects()?.apply(&all_objects())?;
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
    let mut source = RunningSource::synced(&server, state.path()).await?;
    ensure!(source.store.nodes().count() == 7 && endpoints(&source.store, "web") == 2);
    source.until_watching().await?;
    source.until_no_problem().await?;
    ensure!(source.progress.watch_errors() >= 5, "{}", source.progress.watch_errors());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_is_a_problem_and_retried() -> Result<()> {
    let (server, objects) = server_with_objects()?;
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
    let mut source = RunningSource::start(&server, &user, state.path()).await?;
    let message = source.until_problem("endpointslices").await?;
    let expected = "API server: API server denied watch of endpointslices.discovery.k8s.io to \
                    system:serviceaccount:kube-system:dataplane at the cluster scope";
    ensure!(message.starts_with(expected), "{message}");
    ensure!(!source.store.is_synced());
    objects.apply(&[role(true)])?;
    source.until("synced", Store::is_synced).await?;
    source.until_no_problem().await?;
    // without the permission the known state stays
    objects.apply(&[role(false)])?;
    server.drop_watches(WatchEnd::Closed);
    source.until_problem("endpointslices").await?;
    ensure!(endpoints(&source.store, "web") == 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_the_source_starts_from_the_cached_state() -> Result<()> {
    let mut server = Server::local()?;
    server.objects()?.apply(&all_objects())?;
    let state = tempfile::tempdir()?;
    let source = RunningSource::synced(&server, state.path()).await?;
    source.stop().await?;

    server.stop();
    let mut source = RunningSource::start(&server, &admin(), state.path()).await?;
    source
        .until("the last state", |store| {
            store.nodes().count() == 7 && endpoints(store, "web") == 2 && store.pods().count() == 1
        })
        .await?;
    let message = source.until_problem("cannot reach any API server").await?;
    ensure!(message.contains(&server.urls()[0]) && message.contains("Connection refused"), "{message}");
    ensure!(!source.store.is_synced() && source.progress.behind_since().is_some());

    server.start()?;
    source.log.clear();
    let objects = server.objects()?;
    objects.delete(&[node("n7", 7)])?;
    source.until("synced", Store::is_synced).await?;
    source.until("n7 is gone", |store| store.node("n7").is_none()).await?;
    ensure!(source.changed_objects() == ["Node n7"], "{:?}", source.changed_objects());
    source.until_watching().await?;
    source.until_no_problem().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_fails_over_to_another_server() -> Result<()> {
    let mut server = Server::local()?;
    server.listen(None, "127.0.0.1:0".parse()?)?;
    let urls = server.urls();
    let kubeconfig = server.kubeconfig(&admin())?;
    server.objects()?.apply(&all_objects())?;
    let state = tempfile::tempdir()?;
    let mut source = RunningSource::synced(&server, state.path()).await?;
    source.until_watching().await?;
    for (index, other) in [(0, 1), (1, 0), (0, 1)] {
        server.stop_one(index)?;
        let objects = Objects::connect(&kubeconfig.replace(&urls[0], &urls[other]), None)?;
        let ip = format!("10.96.1.{}", index + 1);
        let name_now = format!("s{index}{other}");
        objects.delete(&[service(&name_now, "")])?;
        source.until("the service is gone", |store| store.service(&name(&name_now)).is_none()).await?;
        objects.apply(&[service(&name_now, &ip)])?;
        source.until("the service", |store| store.service(&name(&name_now)).is_some()).await?;
        server.start()?;
    }
    ensure!(source.progress.failovers() >= 2, "{} failovers", source.progress.failovers());
    ensure!(
        source.progress.relists() == 0,
        "a server of the same cluster continues the watches without a relist"
    );
    Ok(())
}
