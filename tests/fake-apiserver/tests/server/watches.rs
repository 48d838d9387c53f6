//! Watches: order, bookmarks, drops, compaction.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_fake_apiserver::{Drop, Fault, Requests, Server};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{
    Api,
    api::{ListParams, WatchEvent, WatchParams},
    runtime::watcher,
};
use tokio::time::timeout;

use super::{PATIENCE, client, config_map, master, next, node};

#[tokio::test]
async fn a_watch_tells_changes_in_order_and_bookmarks_and_ends_when_its_past_is_gone() -> Result<()> {
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
    // the same again is no write, and another colour is an end
    ensure!(seen == ["added", "deleted", "added", "deleted", "bookmark"], "{seen:?}");
    ensure!(versions.is_sorted(), "{versions:?}");

    server.compact();
    let mut events = pin!(maps.watch(&WatchParams::default(), &version).await?);
    let WatchEvent::Error(gone) = next(&mut events).await?? else { bail!("it goes on") };
    ensure!(gone.code == 410, "{gone:?}");
    Ok(())
}

/// The nodes a watcher knows once it is where the server is.
async fn follow(
    server: &Server,
    config: watcher::Config,
    work: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let objects = server.objects()?;
    let nodes: Api<Node> = Api::all(client(server, &master()).await?);
    let mut events = pin!(watcher(nodes, config));
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut fresh = BTreeMap::new();
    let mut work = Some(work);
    timeout(PATIENCE, async {
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
                // the watcher goes on by itself
                Err(_) => {}
            }
            if !known.is_empty()
                && let Some(work) = work.take()
            {
                work().await?;
            }
            let mut there = BTreeMap::new();
            for node in objects.list("v1", "Node", "")? {
                let text = |field: &str| node["metadata"][field].as_str().unwrap_or_default().to_owned();
                there.insert(text("name"), text("resourceVersion"));
            }
            if work.is_none() && known == there {
                return Ok(());
            }
        }
        bail!("the watcher ended")
    })
    .await
    .context("the watcher never knew what the server knows")?
}

#[tokio::test]
async fn a_watcher_follows_through_drops_restarts_and_compaction() -> Result<()> {
    for (what, config) in [
        ("streaming", watcher::Config::default().streaming_lists()),
        ("listing", watcher::Config::default().page_size(2)),
    ] {
        let mut server = Server::local()?;
        let objects = server.objects()?;
        objects.apply(&[node("a"), node("b"), node("c")])?;
        follow(&server, config.clone(), async || objects.apply(&[node("d")])).await.context(what)?;
        follow(&server, config.clone(), async || {
            server.drop_watches(Drop::Broken);
            objects.delete(&[node("d")])
        })
        .await
        .context(what)?;
        follow(&server, config.clone(), async || {
            server.faults().next(2, Requests::to("watch", "nodes"), Fault::gone());
            objects.delete(&[node("c")])?;
            server.compact();
            server.drop_watches(Drop::Orderly);
            objects.apply(&[node("e")])
        })
        .await
        .context(what)?;
        server.restart_compacted()?;
        follow(&server, config, async || objects.delete(&[node("e")])).await.context(what)?;
    }
    Ok(())
}
