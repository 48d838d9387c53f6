//! Watches: order, bookmarks, disconnects, compaction.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_fake_apiserver::{Fault, Requests, Server, WatchEnd};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{
    Api,
    api::{ListParams, WatchEvent, WatchParams},
    runtime::watcher,
};
use tokio::time::timeout;

use super::{TIMEOUT, client, config_map, master, next, node};

#[tokio::test]
async fn watch_sends_ordered_changes_and_bookmarks_and_fails_after_compaction() -> Result<()> {
    let server = Server::local()?;
    server.behaviour().bookmarks = Duration::from_millis(50);
    let objects = server.objects()?;
    let client = client(&server, &master()).await?;
    let maps: Api<ConfigMap> = Api::namespaced(client, "default");
    let version = maps.list(&ListParams::default()).await?.metadata.resource_version.context("a version")?;
    let red = WatchParams::default().labels("value=red");
    let mut events = pin!(maps.watch(&red, &version).await?);

    for value in ["red", "red", "blue", "red"] {
        objects.apply(&[config_map("x", value)])?;
    }
    objects.apply(&[config_map("y", "blue")])?;
    objects.delete(&[config_map("x", "red")])?;
    let mut seen = Vec::new();
    let mut versions = Vec::new();
    while seen.last() != Some(&"bookmark") {
        let (what, version) = match next(&mut events).await?? {
            WatchEvent::Added(map) => ("added", map.metadata.resource_version),
            WatchEvent::Modified(map) => ("modified", map.metadata.resource_version),
            WatchEvent::Deleted(map) => ("deleted", map.metadata.resource_version),
            WatchEvent::Bookmark(mark) if seen.len() < 4 => ("", Some(mark.metadata.resource_version)),
            WatchEvent::Bookmark(mark) => ("bookmark", Some(mark.metadata.resource_version)),
            WatchEvent::Error(error) => bail!(error),
        };
        if !what.is_empty() {
            seen.push(what);
            versions.push(version.context("a version")?.parse::<u64>()?);
        }
    }
    // an unchanged object is no write; a change that ends the match is a deletion
    ensure!(seen == ["added", "deleted", "added", "deleted", "bookmark"], "{seen:?}");
    ensure!(versions.is_sorted(), "{versions:?}");

    server.compact();
    let mut events = pin!(maps.watch(&WatchParams::default(), &version).await?);
    let WatchEvent::Error(expired) = next(&mut events).await?? else { bail!("the watch continued") };
    ensure!(expired.code == 410, "{expired:?}");
    Ok(())
}

/// Runs a watcher and `change` until the watcher's nodes equal the server's.
async fn follow(
    server: &Server,
    config: watcher::Config,
    change: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let objects = server.objects()?;
    let nodes: Api<Node> = Api::all(client(server, &master()).await?);
    let mut events = pin!(watcher(nodes, config));
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut fresh = BTreeMap::new();
    let mut change = Some(change);
    timeout(TIMEOUT, async {
        while let Some(event) = events.next().await {
            let name_and_version = |node: Node| {
                (node.metadata.name.unwrap_or_default(), node.metadata.resource_version.unwrap_or_default())
            };
            match event {
                Ok(watcher::Event::Init) => fresh.clear(),
                Ok(watcher::Event::InitApply(node)) => fresh.extend([name_and_version(node)]),
                Ok(watcher::Event::InitDone) => known = std::mem::take(&mut fresh),
                Ok(watcher::Event::Apply(node)) => known.extend([name_and_version(node)]),
                Ok(watcher::Event::Delete(node)) => drop(known.remove(&name_and_version(node).0)),
                // the watcher retries by itself
                Err(_) => {}
            }
            if !known.is_empty()
                && let Some(change) = change.take()
            {
                change().await?;
            }
            let mut stored = BTreeMap::new();
            for node in objects.list("v1", "Node", "")? {
                let text = |field: &str| node["metadata"][field].as_str().unwrap_or_default().to_owned();
                stored.insert(text("name"), text("resourceVersion"));
            }
            if change.is_none() && known == stored {
                return Ok(());
            }
        }
        bail!("the watcher ended")
    })
    .await
    .context("the watcher did not reach the server's state")?
}

#[tokio::test]
async fn watcher_recovers_from_disconnects_restarts_and_compaction() -> Result<()> {
    for (what, config) in [
        ("streaming", watcher::Config::default().streaming_lists()),
        ("listing", watcher::Config::default().page_size(2)),
    ] {
        let mut server = Server::local()?;
        let objects = server.objects()?;
        objects.apply(&[node("a"), node("b"), node("c")])?;
        follow(&server, config.clone(), async || objects.apply(&[node("d")])).await.context(what)?;
        follow(&server, config.clone(), async || {
            server.drop_watches(WatchEnd::Reset);
            objects.delete(&[node("d")])
        })
        .await
        .context(what)?;
        follow(&server, config.clone(), async || {
            server.faults().next(2, Requests::to("watch", "nodes"), Fault::gone());
            objects.delete(&[node("c")])?;
            server.compact();
            server.drop_watches(WatchEnd::Closed);
            objects.apply(&[node("e")])
        })
        .await
        .context(what)?;
        server.restart_compacted()?;
        follow(&server, config, async || objects.delete(&[node("e")])).await.context(what)?;
    }
    Ok(())
}
