//! Annotation lookups for pods that the API cache does not have yet.
//!
//! kubelet and the agent watch the same API server independently, so a CNI ADD may arrive before
//! the pod does. Such a lookup waits for a short time. Static pods, and pods started while the API
//! server is away, never arrive: they get no annotations.

use std::time::{Duration, Instant};

use dataplane_cni::protocol::Pod;
use tokio::sync::oneshot;

use crate::{
    cni::{PodAnnotations, PodDatapathError, annotations},
    state::{NamespacedName, Store, Uid},
};

/// Longest wait for a pod to arrive in the cache.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

type Reply = oneshot::Sender<Result<PodAnnotations, PodDatapathError>>;

/// Lookups that wait for their pod.
#[derive(Debug, Default)]
pub(super) struct PendingPodLookups {
    /// Namespaces whose pods may have allowed sources.
    allowed_sources_namespaces: Vec<String>,
    lookups: Vec<(Pod, Instant, Reply)>,
}

impl PendingPodLookups {
    pub(super) const fn new(allowed_sources_namespaces: Vec<String>) -> Self {
        Self { allowed_sources_namespaces, lookups: Vec::new() }
    }

    /// Adds a lookup. `may_wait`: the source will deliver the pod, so an absent one is waited for.
    pub(super) fn push(&mut self, pod: Pod, reply: Reply, may_wait: bool) {
        let deadline = Instant::now() + if may_wait { LOOKUP_TIMEOUT } else { Duration::ZERO };
        self.lookups.push((pod, deadline, reply));
    }

    /// Answers lookups whose pod is known or whose deadline has passed. Returns the next deadline.
    pub(super) fn poll(&mut self, store: &Store, now: Instant) -> Option<Instant> {
        for (pod, deadline, reply) in std::mem::take(&mut self.lookups) {
            let name = NamespacedName::new(pod.namespace.clone(), pod.name.clone());
            // a pod of the same name with another UID (a StatefulSet's predecessor) does not count
            let uid = Uid::from(pod.uid.as_str());
            let cached = store.pod(&name).filter(|cached| !uid.excludes(cached.owner.uid));
            let result = match cached {
                Some(cached) => {
                    annotations::read(&cached.annotations, &pod.namespace, &self.allowed_sources_namespaces)
                        .map_err(|error| PodDatapathError(error.to_string()))
                }
                None if now < deadline => {
                    self.lookups.push((pod, deadline, reply));
                    continue;
                }
                None => {
                    tracing::debug!(%pod, "pod not found in the API cache in time; using no annotations");
                    Ok(PodAnnotations::default())
                }
            };
            // fails if the CNI request timed out
            let _caller_gone = reply.send(result);
        }
        self.lookups.iter().map(|(_, deadline, _)| *deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::state::{Object, Owner, Pod as CachedPod, SourceEvent};

    fn requested(uid: &str) -> Pod {
        Pod { namespace: "shop".to_owned(), name: "db-0".to_owned(), uid: uid.to_owned() }
    }

    fn upsert(uid: &str, address: &str) -> SourceEvent {
        SourceEvent::Upsert(Object::Pod(CachedPod {
            name: NamespacedName::new("shop", "db-0"),
            owner: Owner { uid: uid.into() },
            annotations: BTreeMap::from([(annotations::IPV4.to_owned(), address.to_owned())]),
            ..CachedPod::default()
        }))
    }

    #[test]
    fn lookup_waits_for_the_pod_with_the_requested_uid() {
        let (mut pending, mut store) = (PendingPodLookups::default(), Store::default());
        store.apply(upsert("old", "10.1.0.4"));
        let (reply, mut result) = oneshot::channel();
        pending.push(requested("new"), reply, true);
        let now = Instant::now();
        assert!(pending.poll(&store, now).is_some(), "annotations of the predecessor do not count");
        assert!(result.try_recv().is_err());
        store.apply(upsert("new", "10.1.0.5"));
        assert_eq!(pending.poll(&store, now), None);
        assert_eq!(
            result.try_recv().unwrap().unwrap().addresses,
            ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()]
        );
    }

    #[test]
    fn lookup_of_an_absent_pod_times_out_without_annotations() {
        let (mut pending, store) = (PendingPodLookups::default(), Store::default());
        let (reply, mut result) = oneshot::channel();
        pending.push(requested("u"), reply, true);
        assert!(pending.poll(&store, Instant::now()).is_some());
        assert_eq!(pending.poll(&store, Instant::now() + LOOKUP_TIMEOUT), None);
        assert_eq!(result.try_recv().unwrap().unwrap(), PodAnnotations::default());
        let (reply, mut result) = oneshot::channel();
        pending.push(requested("u"), reply, false);
        assert_eq!(pending.poll(&store, Instant::now()), None);
        assert_eq!(result.try_recv().unwrap().unwrap(), PodAnnotations::default());
    }
}
