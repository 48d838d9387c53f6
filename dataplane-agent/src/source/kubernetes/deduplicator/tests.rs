//! Watch events in, source events out.

use serde_json::json;

use super::*;
use crate::{cluster::FailoverStats, source::objects::Kind};

struct Fixture {
    deduplicator: Deduplicator,
    events: mpsc::Receiver<SourceEvent>,
    problems: Problems,
    _root: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (cache, _) = Cache::open(&root.path().join(super::super::cache::FILE), "n1");
        let (sender, events) = mpsc::channel(64);
        let problems = Problems::default();
        let deduplicator =
            Deduplicator::new(sender, problems.clone(), Progress::new(FailoverStats::default()), cache);
        Self { deduplicator, events, problems, _root: root }
    }

    /// The resulting events: `+ key uid`, `- key uid`, `synced`.
    async fn on_events(&mut self, event: impl IntoIterator<Item = WatchEvent>) -> Vec<String> {
        for event in event {
            assert!(self.deduplicator.on_event(event).await.is_ok());
        }
        self.deduplicator.publish();
        self.delivered()
    }

    fn delivered(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .map(|event| match event {
                SourceEvent::Upsert(object) => format!("+ {} {}", object.key(), uid_text(object.owner().uid)),
                SourceEvent::Remove(key, owner) => format!("- {key} {}", uid_text(owner.uid)),
                SourceEvent::Synced => "synced".to_owned(),
            })
            .collect()
    }

    fn problems(&self) -> Vec<String> {
        self.problems
            .current()
            .iter()
            .map(|problem| format!("{}: {}", problem.subject, problem.message))
            .collect()
    }
}

/// The text of a UID used by these tests.
fn uid_text(uid: Uid) -> &'static str {
    let all = ["1", "2", "old", "new"];
    all.into_iter().find(|text| Uid::from(*text) == uid).unwrap_or("unknown")
}

fn node(name: &str, uid: &str, version: u32, cidr: &str) -> WatchEvent {
    let object = json!({
        "metadata": {"name": name, "uid": uid, "resourceVersion": version.to_string()},
        "spec": {"podCIDR": cidr},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    });
    WatchEvent::Applied(Kind::Node.key("", name), Kind::Node.convert(object))
}

fn namespace(name: &str, uid: &str) -> WatchEvent {
    let object = json!({"metadata": {"name": name, "uid": uid}});
    WatchEvent::Applied(Kind::Namespace.key("", name), Kind::Namespace.convert(object))
}

fn deleted(name: &str, uid: &str) -> WatchEvent {
    WatchEvent::Deleted(Kind::Node.key("", name), Owner { uid: uid.into() })
}

const LIST_STARTED: WatchEvent = WatchEvent::ListStarted(Kind::Node);
const LIST_DONE: WatchEvent = WatchEvent::ListDone { kind: Kind::Node, complete: true };

#[tokio::test]
async fn relist_delivers_only_differences() {
    let mut fixture = Fixture::new();
    let first = [LIST_STARTED, node("a", "1", 1, "10.1.0.0/24"), node("b", "1", 1, "10.2.0.0/24"), LIST_DONE];
    assert_eq!(fixture.on_events(first).await, ["+ Node a 1", "+ Node b 1"]);
    // a only has a new resourceVersion, b is missing, c takes b's pod CIDR
    let again = [LIST_STARTED, node("a", "1", 9, "10.1.0.0/24"), node("c", "1", 8, "10.2.0.0/24"), LIST_DONE];
    assert_eq!(fixture.on_events(again).await, ["- Node b 1", "+ Node c 1"]);
    // an interrupted list removes nothing
    assert_eq!(fixture.on_events([LIST_STARTED, node("a", "1", 9, "10.1.0.0/24")]).await, [""; 0]);
    let incomplete = WatchEvent::ListDone { kind: Kind::Node, complete: false };
    assert_eq!(fixture.on_events([LIST_STARTED, incomplete]).await, [""; 0]);
    assert_eq!(fixture.on_events([LIST_STARTED, LIST_DONE]).await.len(), 2);
}

#[tokio::test]
async fn deletion_of_earlier_incarnation_is_ignored() {
    let mut fixture = Fixture::new();
    fixture.on_events([LIST_STARTED, node("a", "1", 1, "10.1.0.0/24"), LIST_DONE]).await;
    assert_eq!(fixture.on_events([node("a", "2", 2, "10.1.0.0/24")]).await, ["+ Node a 2"]);
    assert_eq!(fixture.on_events([deleted("a", "1")]).await, [""; 0]);
    assert_eq!(fixture.on_events([deleted("a", "2")]).await, ["- Node a 2"]);
    assert_eq!(fixture.on_events([deleted("a", "2")]).await, [""; 0]);
}

#[tokio::test]
async fn invalid_object_affects_only_itself() {
    let mut fixture = Fixture::new();
    fixture.on_events([LIST_STARTED, node("a", "1", 1, "10.1.0.0/24"), LIST_DONE]).await;
    let broken = [node("a", "1", 2, "10.1.0.1/24"), node("b", "1", 2, "10.2.0.0/24")];
    assert_eq!(fixture.on_events(broken).await, ["+ Node b 1"]);
    assert!(fixture.problems()[0].starts_with("Node a: spec.podCIDR: \"10.1.0.1/24\" has bits set"));
    // still invalid in the next list: its last valid version stays
    let list = [LIST_STARTED, node("a", "1", 2, "10.1.0.1/24"), node("b", "1", 2, "10.2.0.0/24"), LIST_DONE];
    assert_eq!((fixture.on_events(list).await.len(), fixture.problems().len()), (0, 1));
    assert_eq!(
        fixture.on_events([node("a", "1", 3, "10.1.0.0/24")]).await,
        [""; 0],
        "it equals the delivered version"
    );
    assert_eq!(fixture.problems(), [""; 0]);
    // a problem ends with its object
    fixture.on_events([node("c", "1", 1, "x")]).await;
    assert_eq!(fixture.problems().len(), 1);
    fixture.on_events([LIST_STARTED, LIST_DONE]).await;
    assert_eq!(fixture.problems(), [""; 0]);
}

#[tokio::test]
async fn conflicting_object_is_a_problem_until_delivered() {
    let mut fixture = Fixture::new();
    fixture
        .on_events([
            LIST_STARTED,
            node("a", "1", 1, "10.1.0.0/24"),
            node("b", "1", 1, "10.1.0.0/24"),
            LIST_DONE,
        ])
        .await;
    assert!(
        fixture.problems()[0].starts_with("Node b: part of pod CIDR 10.1.0.0/24 is already used by Node a")
    );
    assert_eq!(fixture.on_events([deleted("a", "1")]).await, ["- Node a 1", "+ Node b 1"]);
    assert_eq!(fixture.problems(), [""; 0]);
}

#[tokio::test]
async fn synced_is_sent_once_after_all_kinds_are_listed() {
    let mut fixture = Fixture::new();
    for kind in Kind::ALL {
        assert_eq!(fixture.delivered(), [""; 0]);
        fixture.deduplicator.on_event(WatchEvent::ListStarted(kind)).await.ok();
        fixture.deduplicator.on_event(WatchEvent::ListDone { kind, complete: true }).await.ok();
    }
    assert_eq!(fixture.delivered(), ["synced"]);
    assert_eq!(fixture.on_events([LIST_STARTED, LIST_DONE]).await, [""; 0]);
}

#[tokio::test]
async fn same_error_of_several_kinds_is_one_problem() {
    let mut fixture = Fixture::new();
    let error = |kind, message: &str| WatchEvent::LastError(kind, Some(message.to_owned()));
    fixture
        .on_events([error(Kind::Node, "away"), error(Kind::Pod, "away"), error(Kind::Service, "no")])
        .await;
    assert_eq!(fixture.problems(), ["API server: away", "API server: no"]);
    fixture.on_events(Kind::ALL.map(|kind| WatchEvent::LastError(kind, None))).await;
    assert_eq!(fixture.problems(), [""; 0]);
}

/// The object of an event.
fn object(event: WatchEvent) -> Object {
    let WatchEvent::Applied(_, Ok(Converted { object: Some(object), .. })) = event else {
        panic!("{event:?}")
    };
    object
}

async fn restored(objects: Vec<WatchEvent>) -> Fixture {
    let mut fixture = Fixture::new();
    let objects = objects.into_iter().map(object).collect();
    let snapshot = Snapshot { objects, time: Some(std::time::SystemTime::now() - Duration::from_secs(60)) };
    assert!(fixture.deduplicator.restore(snapshot).await.is_ok());
    fixture
}

#[tokio::test]
async fn snapshot_is_delivered_then_compared_with_list() {
    let snapshot = vec![node("a", "1", 1, "10.1.0.0/24"), node("b", "1", 1, "10.2.0.0/24")];
    let mut fixture = restored(snapshot).await;
    assert_eq!(fixture.delivered().len(), 2);
    assert!(
        fixture.deduplicator.progress.behind_since().unwrap().elapsed().unwrap() >= Duration::from_secs(60)
    );
    let list = [LIST_STARTED, node("a", "1", 5, "10.1.0.0/24"), LIST_DONE];
    assert_eq!(fixture.on_events(list).await, ["- Node b 1"]);
}

#[tokio::test]
async fn snapshot_of_another_cluster_is_discarded() {
    let snapshot =
        vec![node("a", "1", 1, "10.1.0.0/24"), namespace("kube-system", "old"), namespace("x", "2")];
    let mut fixture = restored(snapshot).await;
    fixture.delivered();
    let mut delivered =
        fixture.on_events([WatchEvent::ListStarted(Kind::Namespace), namespace("kube-system", "new")]).await;
    delivered.sort();
    assert_eq!(delivered, ["+ Namespace kube-system new", "- Namespace x 2", "- Node a 1"]);
    // the same cluster changes nothing
    let mut fixture = restored(vec![node("a", "1", 1, "10.1.0.0/24"), namespace("kube-system", "old")]).await;
    fixture.delivered();
    assert_eq!(
        fixture.on_events([WatchEvent::ListStarted(Kind::Namespace), namespace("kube-system", "old")]).await,
        [""; 0]
    );
}
