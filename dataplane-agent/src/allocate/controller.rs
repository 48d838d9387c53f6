//! The allocator at work: hears the nodes, writes their ranges, as long as it leads.
//!
//! Each time it begins to lead it forgets everything, lists all nodes, and *fences* those without a range: a write to
//! each, without a meaning, so that a write of an earlier leader that is still on its way finds another version of the
//! node and fails. Only then does it give anything. A range is written together with the version of the node it was
//! meant for; who lost that race looks again. Nothing is written after leading ended.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{sleep_until, timeout},
};

use super::{
    election::Leadership,
    ledger::{Finding, NodeFacts, RangeLedger},
    metrics::AllocatorMetrics,
    nodes::{facts, trim},
    settings::Settings,
};
use crate::{
    cluster::explain,
    event_recorder::{EventRecorder, EventType, NewEvent, node as node_reference},
    reconcile::backoff::WorkQueue,
};

/// What is wrong with nodes is said again after so long.
const REMIND: Duration = Duration::from_secs(300);
/// Says which allocator looked at the node; written for the sake of the node's version.
const FENCE: &str = "dataplane.local/allocator";

/// Why a node was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("{}", explain(.0))]
    Api(#[from] kube::Error),
    #[error("no answer within {0:?}")]
    Silence(Duration),
    #[error("the node changed meanwhile")]
    Changed,
    #[error("{0}")]
    Full(Finding),
}

/// Gives ranges.
#[derive(Debug)]
pub(super) struct Controller {
    nodes: Api<Node>,
    settings: Settings,
    leadership: watch::Receiver<Leadership>,
    recorder: EventRecorder,
    allocator_metrics: Arc<AllocatorMetrics>,
}

/// One time of leading.
struct Term<'a> {
    controller: &'a Controller,
    number: u64,
    ledger: RangeLedger,
    /// Nodes that need a range, or need to be looked at again.
    queue: WorkQueue<String>,
    /// Nodes of this list so far; `None`: the list is complete.
    listed: Option<HashSet<String>>,
    /// Nodes without a range, by identity, that no earlier leader can write any more.
    fenced: HashMap<String, String>,
    /// Only nodes of the first list can have been seen by an earlier leader.
    first_list: bool,
    remind: Instant,
    /// What was found wrong with nodes, as it was last said.
    reported: HashMap<String, Vec<Finding>>,
}

impl Controller {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        leadership: watch::Receiver<Leadership>,
        recorder: EventRecorder,
        allocator_metrics: Arc<AllocatorMetrics>,
    ) -> Self {
        Self { nodes: Api::all(client), settings, leadership, recorder, allocator_metrics }
    }

    /// Gives ranges whenever it leads, for ever.
    pub(super) async fn run(mut self) {
        loop {
            let led = self.leadership.wait_for(|said| said.leads(Instant::now())).await;
            let Ok(term) = led.map(|said| said.term) else { return };
            self.lead(term).await;
            self.allocator_metrics.not_leading();
        }
    }

    /// Until leading ends.
    async fn lead(&self, number: u64) {
        let config = watcher::Config::default();
        let nodes = watcher(self.nodes.clone(), config).modify(trim).default_backoff();
        let mut nodes = std::pin::pin!(nodes);
        let mut leadership = self.leadership.clone();
        let mut term = Term {
            controller: self,
            number,
            ledger: RangeLedger::new(self.settings.pools.clone()),
            queue: WorkQueue::default(),
            listed: Some(HashSet::new()),
            fenced: HashMap::new(),
            first_list: true,
            remind: Instant::now() + REMIND,
            reported: HashMap::new(),
        };
        let mut trouble = None;
        while self.may_write(number) {
            let due = term.work().await;
            let until = self.leadership.borrow().until.unwrap_or_else(Instant::now);
            tokio::select! {
                event = nodes.next() => match event {
                    Some(Ok(event)) => {
                        term.hear(event);
                        // a burst is one piece of work
                        while let Some(Some(Ok(event))) = nodes.next().now_or_never() {
                            term.hear(event);
                        }
                        trouble = None;
                    }
                    Some(Err(error)) => {
                        let reason = say(&error);
                        if trouble.as_ref() != Some(&reason) {
                            tracing::warn!(reason, "nodes are not heard");
                        }
                        trouble = Some(reason);
                    }
                    None => return,
                },
                _ = leadership.changed() => {}
                () = sleep_until(due.min(until).into()) => {}
            }
        }
    }

    /// Whether this term goes on, long enough for a write.
    fn may_write(&self, term: u64) -> bool {
        let said = self.leadership.borrow();
        said.term == term && said.leads(Instant::now())
    }
}

impl Term<'_> {
    fn hear(&mut self, event: watcher::Event<Node>) {
        let now = Instant::now();
        match event {
            watcher::Event::Init => self.listed = Some(HashSet::new()),
            watcher::Event::InitApply(node) => {
                let node = facts(&node);
                self.listed.get_or_insert_default().insert(node.name.clone());
                self.observe(&node, now);
            }
            watcher::Event::InitDone => self.complete(now),
            watcher::Event::Apply(node) => self.observe(&facts(&node), now),
            watcher::Event::Delete(node) => {
                let name = node.metadata.name.unwrap_or_default();
                // a node that was made again may be known already
                if self.ledger.uid(&name) == node.metadata.uid.as_deref() {
                    self.forget(&name, now);
                }
            }
        }
    }

    fn observe(&mut self, node: &NodeFacts, now: Instant) {
        self.ledger.observe(node, now);
        if !self.first_list {
            // born after we began to lead
            self.fenced.entry(node.name.clone()).or_insert_with(|| node.uid.clone());
        }
        self.queue.push(node.name.clone());
    }

    fn forget(&mut self, name: &str, now: Instant) {
        self.ledger.remove(name, now);
        self.fenced.remove(name);
        self.reported.remove(name);
        self.queue.settle(&name.to_owned());
        // there is room for one that got nothing
        let needy: Vec<_> =
            self.ledger.names().filter(|name| self.ledger.needy(name).is_some()).map(str::to_owned).collect();
        for name in needy {
            self.queue.push(name);
        }
    }

    /// The list is complete: what is not in it is gone.
    fn complete(&mut self, now: Instant) {
        let Some(listed) = self.listed.take() else { return };
        let gone: Vec<_> =
            self.ledger.names().filter(|name| !listed.contains(*name)).map(str::to_owned).collect();
        for name in gone {
            self.forget(&name, now);
        }
        if std::mem::take(&mut self.first_list) {
            tracing::info!(nodes = listed.len(), term = self.number, "adopted what the nodes have");
        }
    }

    /// Does what is due. Returns when there is more to do.
    async fn work(&mut self) -> Instant {
        let now = Instant::now();
        if now >= self.remind {
            self.remind = now + REMIND;
            let names: Vec<_> = self.ledger.names().map(str::to_owned).collect();
            for name in names {
                self.queue.push(name);
            }
        }
        self.controller.allocator_metrics.leading(self.ledger.pools());
        // nothing is given before everything is known
        if self.listed.is_some() {
            return self.remind;
        }
        while self.controller.may_write(self.number) {
            let Some(name) = self.queue.pop(Instant::now()) else { break };
            match self.serve(&name).await {
                Ok(()) => self.queue.settle(&name),
                Err(error) => {
                    if !matches!(error, WriteError::Changed | WriteError::Full(_)) {
                        tracing::warn!(node = name, %error, "no pod CIDR yet");
                    }
                    self.queue.fail(name, error.to_string(), Instant::now());
                }
            }
        }
        self.controller.allocator_metrics.leading(self.ledger.pools());
        self.queue.next_due(Instant::now()).map_or(self.remind, |due| due.min(self.remind))
    }

    /// Makes writes of earlier leaders to the node fail that are on their way still.
    async fn fence_node(&mut self, name: &str) -> Result<(), WriteError> {
        let Some((uid, version)) = self.ledger.needy(name) else { return Ok(()) };
        if self.fenced.get(name).is_some_and(|fenced| fenced == uid) {
            return Ok(());
        }
        let mark = format!("{}/{}", self.controller.settings.identity, self.number);
        let uid = uid.to_owned();
        let patch = json!({
            "metadata": { "uid": uid, "resourceVersion": version, "annotations": { FENCE: mark } },
        });
        let node = self.write(name, &patch).await?;
        self.fenced.insert(name.to_owned(), uid);
        // it may have got its ranges before it was fenced: then the version differed, and we are not here
        self.ledger.touched(name, node.resource_version);
        Ok(())
    }

    /// Everything about one node: what is wrong with it is said, what it lacks is given.
    async fn serve(&mut self, name: &str) -> Result<(), WriteError> {
        if self.ledger.needy(name).is_none() {
            self.examine(name);
            return Ok(());
        }
        // every node that could be written behind our back must be fenced before any range is safe to give
        while let Some(open) = self.unfenced() {
            self.fence_node(&open).await?;
        }
        let ranges = match self.ledger.promise(name, Instant::now()) {
            Ok(ranges) => ranges,
            Err(finding) => {
                let mut findings = self.ledger.findings(name);
                findings.push(finding.clone());
                self.report(name, findings);
                return Err(WriteError::Full(finding));
            }
        };
        let Some((uid, version)) = self.ledger.needy(name) else { return Ok(()) };
        let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
        let patch = json!({
            "metadata": { "uid": uid, "resourceVersion": version },
            "spec": { "podCIDR": ranges.first(), "podCIDRs": ranges },
        });
        let node = self.write(name, &patch).await?;
        tracing::info!(node = name, pod_cidrs = ?node.pod_cidrs, "assigned");
        self.controller.allocator_metrics.assigned();
        self.ledger.observe(&node, Instant::now());
        self.examine(name);
        Ok(())
    }

    /// A node that has no range and that an earlier leader may be writing to.
    fn unfenced(&self) -> Option<String> {
        let open = |name: &&str| {
            self.ledger
                .needy(name)
                .is_some_and(|(uid, _)| self.fenced.get(*name).is_none_or(|fenced| fenced != uid))
        };
        self.ledger.names().find(open).map(str::to_owned)
    }

    /// Writes a node if it is still of the version we know; if not, learns what it is now.
    async fn write(&mut self, name: &str, patch: &serde_json::Value) -> Result<NodeFacts, WriteError> {
        let nodes = &self.controller.nodes;
        let (how, patch) = (PatchParams::default(), Patch::Merge(patch));
        let request = nodes.patch(name, &how, &patch);
        if !self.controller.may_write(self.number) {
            return Err(WriteError::Changed);
        }
        let patience = self.controller.settings.terms.patience;
        match timeout(patience, request).await {
            Ok(Ok(node)) => Ok(facts(&node)),
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => {
                let found = timeout(patience, nodes.get_opt(name))
                    .await
                    .map_err(|_late| WriteError::Silence(patience))??;
                let now = Instant::now();
                match found {
                    Some(node) => self.ledger.observe(&facts(&node), now),
                    None => self.ledger.remove(name, now),
                }
                Err(if status.code == 422 { kube::Error::Api(status).into() } else { WriteError::Changed })
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_elapsed) => Err(WriteError::Silence(patience)),
        }
    }

    /// Says what is wrong with what a node has, to the other node too if there is one.
    fn examine(&mut self, name: &str) {
        let findings = self.ledger.findings(name);
        let others: Vec<_> = findings.iter().filter_map(Finding::other).map(str::to_owned).collect();
        self.report(name, findings);
        for other in others {
            let findings = self.ledger.findings(&other);
            self.report(&other, findings);
        }
    }

    /// All that is wrong with a node. Counted and logged once; Events count their repetitions themselves.
    fn report(&mut self, name: &str, findings: Vec<Finding>) {
        let Some(uid) = self.ledger.uid(name) else { return };
        let known = self.reported.get(name).map_or(&[][..], Vec::as_slice);
        for finding in &findings {
            if !known.contains(finding) {
                self.controller.allocator_metrics.found(finding);
                tracing::warn!(node = name, reason = finding.reason(), %finding, "cannot be right");
            }
            self.controller.recorder.record(NewEvent {
                regarding: node_reference(name, uid),
                event_type: EventType::Warning,
                reason: finding.reason(),
                action: "AllocatePodCIDRs",
                note: finding.to_string(),
            });
        }
        if findings.is_empty() {
            self.reported.remove(name);
        } else {
            self.reported.insert(name.to_owned(), findings);
        }
    }
}

fn say(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => explain(error),
        other => other.to_string(),
    }
}
