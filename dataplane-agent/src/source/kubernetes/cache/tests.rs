//! A real file in a directory of its own.

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

fn gone(object: &Object) -> SourceEvent {
    SourceEvent::Remove(object.key(), Owner::default())
}

/// What another agent finds.
fn found(path: &Path) -> Vec<Object> {
    let mut objects = Cache::open(path, "n1").1.objects;
    objects.sort_by_key(Object::key);
    objects
}

async fn write(path: &Path, events: &[SourceEvent]) {
    let (mut cache, _) = Cache::open(path, "n1");
    for event in events {
        cache.note(event);
    }
    cache.close(true).await;
    assert_eq!(cache.trouble(), None);
}

#[tokio::test]
async fn the_last_of_each_object_is_found_again() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state").join(FILE);
    assert!(Cache::open(&path, "n1").1.time.is_none());
    let (a, b) = (node("a", "1"), service("b"));
    write(&path, &[node("a", "0"), b.clone()].map(SourceEvent::Upsert)).await;
    write(
        &path,
        &[SourceEvent::Upsert(a.clone()), SourceEvent::Upsert(node("c", "1")), gone(&node("c", "1"))],
    )
    .await;
    assert_eq!(found(&path), [a, b.clone()]);
    let (_, known) = Cache::open(&path, "n1");
    assert!(known.time.unwrap().elapsed().unwrap() < Duration::from_secs(60));
    write(&path, &[gone(&node("a", "1")), gone(&b)]).await;
    assert_eq!(found(&path), []);
}

#[tokio::test]
async fn a_line_cut_off_is_left_out_and_written_over() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE);
    write(&path, &[node("a", "1"), node("b", "1")].map(SourceEvent::Upsert)).await;
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 10]).unwrap();
    assert_eq!(found(&path), [node("a", "1")]);
    write(&path, &[SourceEvent::Upsert(node("c", "1"))]).await;
    assert_eq!(found(&path), [node("a", "1"), node("c", "1")]);
}

#[tokio::test]
async fn a_file_of_another_version_or_node_is_replaced() {
    for header in ["{\"version\":0,\"node\":\"n1\"}\n", "{\"version\":2,\"node\":\"n2\"}\n", "\0\0\0", "[]\n"]
    {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(FILE);
        fs::write(&path, header).unwrap();
        let (_, known) = Cache::open(&path, "n1");
        assert!(known.objects.is_empty() && known.time.is_none(), "{header:?}");
        write(&path, &[SourceEvent::Upsert(node("a", "1"))]).await;
        assert_eq!(found(&path), [node("a", "1")]);
    }
}

#[tokio::test]
async fn lines_that_do_not_count_are_swept() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE);
    let (mut cache, _) = Cache::open(&path, "n1");
    for round in 0..2 * SLACK {
        cache.note(&SourceEvent::Upsert(node("a", &round.to_string())));
        cache.note(&SourceEvent::Upsert(node("b", "1")));
    }
    cache.note(&gone(&node("b", "1")));
    cache.save(1, true).await;
    cache.close(true).await;
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2, "the header and one object");
    assert_eq!(found(&path), [node("a", &(2 * SLACK - 1).to_string())]);
    // and it can be written on
    cache.note(&SourceEvent::Upsert(node("c", "1")));
    cache.close(true).await;
    assert_eq!(found(&path).len(), 2);
}

#[tokio::test]
async fn a_disk_that_takes_nothing_is_said_and_tried_again() {
    let root = tempfile::tempdir().unwrap();
    // a directory in the place of the file
    let path = root.path().join(FILE);
    fs::create_dir(&path).unwrap();
    let (mut cache, _) = Cache::open(&path, "n1");
    cache.note(&SourceEvent::Upsert(node("a", "1")));
    cache.save(1, true).await;
    cache.written().await;
    assert!(cache.trouble().unwrap().contains(FILE), "{:?}", cache.trouble());
    fs::remove_dir(&path).unwrap();
    cache.save(1, true).await;
    cache.close(true).await;
    assert_eq!((cache.trouble(), found(&path).len()), (None, 1));
}
