//! What is heard, and what comes out.

use serde_json::json;

use super::*;
use crate::{cluster::FailoverStats, source::objects::Kind};

struct World {
    deduplicator: Deduplicator,
    events: mpsc::Receiver<SourceEvent>,
    problems: Problems,
    _root: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (cache, _) = Cache::open(&root.path().join(super::super::cache::FILE), "n1");
        let (sender, events) = mpsc::channel(64);
        let problems = Problems::default();
        let deduplicator =
            Deduplicator::new(sender, problems.clone(), Progress::new(FailoverStats::default()), cache);
        Self { deduplicator, events, problems, _root: root }
    }

    /// What comes of it: `+ key uid`, `- key uid`, `synced`.
    async fn hear(&mut self, heard: impl IntoIterator<Item = WatchEvent>) -> Vec<String> {
        for heard in heard {
            assert!(self.deduplicator.hear(heard).await.is_ok());
        }
        self.deduplicator.publish();
        self.out()
    }

    fn out(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .map(|event| match event {
                SourceEvent::Upsert(object) => format!("+ {} {}", object.key(), said(object.owner().uid)),
                SourceEvent::Remove(key, owner) => format!("- {key} {}", said(owner.uid)),
                SourceEvent::Synced => "synced".to_owned(),
            })
            .collect()
    }

    fn problems(&self) -> Vec<String> {
        self.problems
            .now()
            .iter()
            .map(|problem| format!("{}: {}", problem.subject, problem.message))
            .collect()
    }
}

/// Which of the UIDs these tests use it is.
fn said(uid: Uid) -> &'static str {
    let all = ["1", "2", "old", "new"];
    all.into_iter().find(|text| Uid::from(*text) == uid).unwrap_or("unknown")
}

fn node(name: &str, uid: &str, version: u32, cidr: &str) -> WatchEvent {
    let object = json!({
        "metadata": {"name": name, "uid": uid, "resourceVersion": version.to_string()},
        "spec": {"podCIDR": cidr},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    });
    WatchEvent::Is(Kind::Node.key("", name), Kind::Node.convert(object))
}

fn namespace(name: &str, uid: &str) -> WatchEvent {
    let object = json!({"metadata": {"name": name, "uid": uid}});
    WatchEvent::Is(Kind::Namespace.key("", name), Kind::Namespace.convert(object))
}

fn gone(name: &str, uid: &str) -> WatchEvent {
    WatchEvent::Gone(Kind::Node.key("", name), Owner { uid: uid.into() })
}

const LISTING: WatchEvent = WatchEvent::Listing(Kind::Node);
const LISTED: WatchEvent = WatchEvent::Listed { kind: Kind::Node, complete: true };

#[tokio::test]
async fn a_list_again_is_only_its_difference() {
    let mut world = World::new();
    let first = [LISTING, node("a", "1", 1, "10.1.0.0/24"), node("b", "1", 1, "10.2.0.0/24"), LISTED];
    assert_eq!(world.hear(first).await, ["+ Node a 1", "+ Node b 1"]);
    // a has a heartbeat, b is gone, c came, d is b's successor in its range
    let again = [LISTING, node("a", "1", 9, "10.1.0.0/24"), node("c", "1", 8, "10.2.0.0/24"), LISTED];
    assert_eq!(world.hear(again).await, ["- Node b 1", "+ Node c 1"]);
    // cut off in the middle: nothing is known to be gone
    assert_eq!(world.hear([LISTING, node("a", "1", 9, "10.1.0.0/24")]).await, [""; 0]);
    let untold = WatchEvent::Listed { kind: Kind::Node, complete: false };
    assert_eq!(world.hear([LISTING, untold]).await, [""; 0]);
    assert_eq!(world.hear([LISTING, LISTED]).await.len(), 2);
}

#[tokio::test]
async fn a_goodbye_of_an_earlier_incarnation_is_not_believed() {
    let mut world = World::new();
    world.hear([LISTING, node("a", "1", 1, "10.1.0.0/24"), LISTED]).await;
    assert_eq!(world.hear([node("a", "2", 2, "10.1.0.0/24")]).await, ["+ Node a 2"]);
    assert_eq!(world.hear([gone("a", "1")]).await, [""; 0]);
    assert_eq!(world.hear([gone("a", "2")]).await, ["- Node a 2"]);
    assert_eq!(world.hear([gone("a", "2")]).await, [""; 0]);
}

#[tokio::test]
async fn an_object_that_cannot_be_used_spoils_only_itself() {
    let mut world = World::new();
    world.hear([LISTING, node("a", "1", 1, "10.1.0.0/24"), LISTED]).await;
    let broken = [node("a", "1", 2, "10.1.0.1/24"), node("b", "1", 2, "10.2.0.0/24")];
    assert_eq!(world.hear(broken).await, ["+ Node b 1"]);
    assert!(world.problems()[0].starts_with("Node a: spec.podCIDR: \"10.1.0.1/24\" has bits set"));
    // broken still, in a list: it is there, and what is known of it stays
    let list = [LISTING, node("a", "1", 2, "10.1.0.1/24"), node("b", "1", 2, "10.2.0.0/24"), LISTED];
    assert_eq!((world.hear(list).await.len(), world.problems().len()), (0, 1));
    assert_eq!(world.hear([node("a", "1", 3, "10.1.0.0/24")]).await, [""; 0], "it is as it was");
    assert_eq!(world.problems(), [""; 0]);
    // a problem goes with its object, too
    world.hear([node("c", "1", 1, "x")]).await;
    assert_eq!(world.problems().len(), 1);
    world.hear([LISTING, LISTED]).await;
    assert_eq!(world.problems(), [""; 0]);
}

#[tokio::test]
async fn who_is_refused_is_a_problem_until_there_is_room() {
    let mut world = World::new();
    world.hear([LISTING, node("a", "1", 1, "10.1.0.0/24"), node("b", "1", 1, "10.1.0.0/24"), LISTED]).await;
    assert!(world.problems()[0].starts_with("Node b: some of pod CIDR 10.1.0.0/24 is held by Node a"));
    assert_eq!(world.hear([gone("a", "1")]).await, ["- Node a 1", "+ Node b 1"]);
    assert_eq!(world.problems(), [""; 0]);
}

#[tokio::test]
async fn synced_is_said_once_when_all_kinds_were_listed() {
    let mut world = World::new();
    for kind in Kind::ALL {
        assert_eq!(world.out(), [""; 0]);
        world.deduplicator.hear(WatchEvent::Listing(kind)).await.ok();
        world.deduplicator.hear(WatchEvent::Listed { kind, complete: true }).await.ok();
    }
    assert_eq!(world.out(), ["synced"]);
    assert_eq!(world.hear([LISTING, LISTED]).await, [""; 0]);
}

#[tokio::test]
async fn kinds_with_the_same_trouble_say_it_once() {
    let mut world = World::new();
    let trouble = |kind, what: &str| WatchEvent::Trouble(kind, Some(what.to_owned()));
    world.hear([trouble(Kind::Node, "away"), trouble(Kind::Pod, "away"), trouble(Kind::Service, "no")]).await;
    assert_eq!(world.problems(), ["API server: away", "API server: no"]);
    world.hear(Kind::ALL.map(|kind| WatchEvent::Trouble(kind, None))).await;
    assert_eq!(world.problems(), [""; 0]);
}

/// The object of something heard.
fn object(heard: WatchEvent) -> Object {
    let WatchEvent::Is(_, Ok(Converted { object: Some(object), .. })) = heard else { panic!("{heard:?}") };
    object
}

async fn restored(objects: Vec<WatchEvent>) -> World {
    let mut world = World::new();
    let objects = objects.into_iter().map(object).collect();
    let known = Known { objects, time: Some(std::time::SystemTime::now() - Duration::from_secs(60)) };
    assert!(world.deduplicator.restore(known).await.is_ok());
    world
}

#[tokio::test]
async fn what_was_known_is_delivered_and_then_compared() {
    let known = vec![node("a", "1", 1, "10.1.0.0/24"), node("b", "1", 1, "10.2.0.0/24")];
    let mut world = restored(known).await;
    assert_eq!(world.out().len(), 2);
    assert!(
        world.deduplicator.progress.behind_since().unwrap().elapsed().unwrap() >= Duration::from_secs(60)
    );
    let list = [LISTING, node("a", "1", 5, "10.1.0.0/24"), LISTED];
    assert_eq!(world.hear(list).await, ["- Node b 1"]);
}

#[tokio::test]
async fn what_is_of_another_cluster_is_forgotten_at_once() {
    let known = vec![node("a", "1", 1, "10.1.0.0/24"), namespace("kube-system", "old"), namespace("x", "2")];
    let mut world = restored(known).await;
    world.out();
    let mut out = world.hear([WatchEvent::Listing(Kind::Namespace), namespace("kube-system", "new")]).await;
    out.sort();
    assert_eq!(out, ["+ Namespace kube-system new", "- Namespace x 2", "- Node a 1"]);
    // the same cluster is no news
    let mut world = restored(vec![node("a", "1", 1, "10.1.0.0/24"), namespace("kube-system", "old")]).await;
    world.out();
    assert_eq!(
        world.hear([WatchEvent::Listing(Kind::Namespace), namespace("kube-system", "old")]).await,
        [""; 0]
    );
}
