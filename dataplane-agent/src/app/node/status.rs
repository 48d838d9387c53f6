//! What the node task publishes: the agent's status, and the health checks of services.

use std::{collections::BTreeSet, sync::Arc};

use super::{Inputs, NodeTask};
use crate::{
    api::views::{NotReady, Origin, ProblemView, SourceView, Status, unix_seconds},
    compile::{self, services::NodeContext},
    lifecycle::HealthCheck,
    state::{NamespacedName, Node},
};

/// Taint of a node that the cluster autoscaler is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

impl NodeTask {
    pub(super) fn publish_status(&self, inputs: &Inputs) {
        let own_node = self.store.node(&self.config.node_name);
        let mut status = Status {
            started: self.outputs.status.borrow().started,
            not_ready: self.not_ready(),
            revision: self.store.revision(),
            synced: self.store.is_synced(),
            leaving_reason: own_node.and_then(leaving_reason).map(str::to_owned),
            last_event: self.last_event.map(Into::into),
            last_audit: self.last_audit.map(Into::into),
            source: SourceView {
                name: self.config.source.name().to_owned(),
                behind_since: inputs.progress.behind_since().map(unix_seconds),
                relists: inputs.progress.relists(),
                watch_errors: inputs.progress.watch_errors(),
                failovers: inputs.progress.failovers(),
            },
            ..Status::starting(&self.config.node_name)
        };
        status.problems.extend(inputs.problems.borrow().iter().map(|problem| ProblemView {
            origin: Origin::Source,
            subject: problem.subject.clone(),
            message: problem.message.clone(),
        }));
        status.problems.extend(inputs.node_problems.now());
        status.problems.extend(inputs.config.borrow().problems.iter().cloned());
        if let Some((reason, _)) = &self.setup_failure {
            status.problems.push(ProblemView {
                origin: Origin::Datapath,
                subject: "network".to_owned(),
                message: format!("node network setup failed, retrying: {reason}"),
            });
        }
        status.objects.nodes = self.store.nodes().count() as u64;
        status.objects.services = self.store.services().count() as u64;
        status.objects.endpoint_slices = self.store.slice_count() as u64;
        if let Some(datapath) = &self.datapath {
            datapath.fill_status(&mut status, &self.store);
        }
        let was_ready = self.outputs.status.borrow().is_ready();
        if status.is_ready() && !was_ready {
            tracing::info!(node = status.node, "agent is ready");
        }
        // fails while the agent stops
        let _no_receivers = self.outputs.status.send(status);
    }

    fn not_ready(&self) -> Vec<NotReady> {
        let mut reasons = Vec::new();
        let mut wait_for = |check: &str, reason: String| {
            reasons.push(NotReady { check: check.to_owned(), reason });
        };
        if !self.store.is_synced() {
            wait_for("source", "the source has not delivered every object yet".to_owned());
        }
        match (&self.datapath, &self.setup_failure) {
            (Some(datapath), _) => reasons.extend(datapath.not_ready()),
            (None, Some((reason, _))) => wait_for("network", reason.clone()),
            (None, None) => {
                let name = &self.config.node_name;
                if self.store.node(name).is_none() {
                    wait_for("node", format!("there is no Node object {name} yet"));
                }
                if self.loaded.is_none() {
                    wait_for("datapath", "the eBPF programs are being loaded".to_owned());
                }
            }
        }
        reasons
    }

    /// Publishes the health checks (`healthCheckNodePort`) of these services.
    pub(super) fn publish_health_checks(&self, names: &BTreeSet<NamespacedName>) {
        let node_context = NodeContext { node: self.config.node_name.clone(), ..NodeContext::default() };
        let check = |name: &NamespacedName| {
            let service = self.store.service(name)?;
            let port = service.health_check_port?;
            let endpoints = compile::services::count_local_ready(self.store.slices_of(name), &node_context);
            Some(HealthCheck { port, endpoints })
        };
        self.outputs.health_checks.send_if_modified(|published| {
            let changed: Vec<_> = names
                .iter()
                .map(|name| (name, check(name)))
                .filter(|(name, check)| published.get(name) != check.as_ref())
                .collect();
            for (name, check) in &changed {
                let published = Arc::make_mut(published);
                match check {
                    Some(check) => drop(published.insert((*name).clone(), check.clone())),
                    None => drop(published.remove(name)),
                }
            }
            !changed.is_empty()
        });
    }
}

/// Why a node is leaving the cluster, by kube-proxy's rules (`ProxyHealthServer.SyncNode`).
fn leaving_reason(node: &Node) -> Option<&'static str> {
    if node.deleting {
        return Some("its Node object is being deleted");
    }
    let tainted = node.taints.iter().any(|key| key == TO_BE_DELETED);
    tainted.then_some("the cluster autoscaler is about to delete it")
}
