//! The cache on a real file in a temporary directory.

use super::*;
use crate::state::{NamespacedName, Node, Owner, Service};

fn node(name: &str, uid: &str) -> Object {
    let owner = Owner { uid: uid.into() };
    let cidr = "10.1.0.0/24".parse().unwrap();
    Object::Node(Node { name: name.to_owned(), owner, pod_cidrs: vec![cidr], ..Node::default() })
}

fn service(name: &str) -> Object {
    Object::Service(Service {
        name: NamespacedName::new("default", name),
        owner: Owner::default(),
        cluster_ips: vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()],
        ports: Vec::new(),
        affinity_timeout: Some(5),
        load_balancing: Some(crate::state::LoadBalancing::Maglev),
        forwarding: Some(crate::state::Forwarding::Snat),
        ..Service::default()
    })
}

fn removed(object: &Object) -> SourceEvent {
    SourceEvent::Remove(object.key(), Owner::default())
}

/// The objects another agent reads.
fn reopened(path: &Path) -> Vec<Object> {
    let mut objects = Cache::open(path, "n1").1.objects;
    objects.sort_by_key(Object::key);
    objects
}

async fn write(path: &Path, events: &[SourceEvent]) {
    let (mut cache, _) = Cache::open(path, "n1");
    for event in events {
        cache.record(event);
    }
    cache.close(true).await;
    assert_eq!(cache.last_error(), None);
}

#[tokio::test]
async fn reopened_cache_returns_last_version_of_each_object() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state").join(FILE);
    assert!(Cache::open(&path, "n1").1.time.is_none());
    let (a, b) = (node("a", "1"), service("b"));
    write(&path, &[node("a", "0"), b.clone()].map(SourceEvent::Upsert)).await;
    write(
        &path,
        &[SourceEvent::Upsert(a.clone()), SourceEvent::Upsert(node("c", "1")), removed(&node("c", "1"))],
    )
    .await;
    assert_eq!(reopened(&path), [a, b.clone()]);
    let (_, snapshot) = Cache::open(&path, "n1");
    assert!(snapshot.time.unwrap().elapsed().unwrap() < Duration::from_secs(60));
    write(&path, &[removed(&node("a", "1")), removed(&b)]).await;
    assert_eq!(reopened(&path), []);
}

#[tokio::test]
async fn truncated_line_is_ignored_and_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE);
    write(&path, &[node("a", "1"), node("b", "1")].map(SourceEvent::Upsert)).await;
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 10]).unwrap();
    assert_eq!(reopened(&path), [node("a", "1")]);
    write(&path, &[SourceEvent::Upsert(node("c", "1"))]).await;
    assert_eq!(reopened(&path), [node("a", "1"), node("c", "1")]);
}

#[tokio::test]
async fn file_of_other_version_or_node_is_replaced() {
    for header in ["{\"version\":0,\"node\":\"n1\"}\n", "{\"version\":2,\"node\":\"n2\"}\n", "\0\0\0", "[]\n"]
    {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(FILE);
        fs::write(&path, header).unwrap();
        let (_, snapshot) = Cache::open(&path, "n1");
        assert!(snapshot.objects.is_empty() && snapshot.time.is_none(), "{header:?}");
        write(&path, &[SourceEvent::Upsert(node("a", "1"))]).await;
        assert_eq!(reopened(&path), [node("a", "1")]);
    }
}

#[tokio::test]
async fn outdated_lines_are_compacted() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE);
    let (mut cache, _) = Cache::open(&path, "n1");
    for round in 0..2 * OUTDATED_LINES_MIN {
        cache.record(&SourceEvent::Upsert(node("a", &round.to_string())));
        cache.record(&SourceEvent::Upsert(node("b", "1")));
    }
    cache.record(&removed(&node("b", "1")));
    cache.save(1, true).await;
    cache.close(true).await;
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2, "the header and one object");
    assert_eq!(reopened(&path), [node("a", &(2 * OUTDATED_LINES_MIN - 1).to_string())]);
    // and it accepts further lines
    cache.record(&SourceEvent::Upsert(node("c", "1")));
    cache.close(true).await;
    assert_eq!(reopened(&path).len(), 2);
}

#[tokio::test]
async fn write_error_is_reported_and_retried() {
    let root = tempfile::tempdir().unwrap();
    // a directory in place of the file
    let path = root.path().join(FILE);
    fs::create_dir(&path).unwrap();
    let (mut cache, _) = Cache::open(&path, "n1");
    cache.record(&SourceEvent::Upsert(node("a", "1")));
    cache.save(1, true).await;
    cache.finish_write().await;
    assert!(cache.last_error().unwrap().contains(FILE), "{:?}", cache.last_error());
    fs::remove_dir(&path).unwrap();
    cache.save(1, true).await;
    cache.close(true).await;
    assert_eq!((cache.last_error(), reopened(&path).len()), (None, 1));
}
