//! Pods that are being added and wait until it is known what they ask for.
//!
//! kubelet and the agent hear of a new pod from the same API server, each in its own time: who asks for a pod that has
//! not been heard of waits a little. A pod nobody tells of (a static one, or one that is started while the API server
//! is away) is not held up for longer: it asks for nothing.

use std::time::{Duration, Instant};

use dataplane_cni::protocol::Pod;
use tokio::sync::oneshot;

use crate::{
    cni::{PodAnnotations, PodDatapathError, annotations},
    state::{NamespacedName, Store, Uid},
};

/// How long a pod may be unheard of.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the answer goes.
type Answer = oneshot::Sender<Result<PodAnnotations, PodDatapathError>>;

/// Those who wait.
#[derive(Debug, Default)]
pub(super) struct PendingPodLookups {
    questions: Vec<(Pod, Instant, Answer)>,
}

impl PendingPodLookups {
    /// Takes a question. `patient`: the source tells of pods by itself, sooner or later.
    pub(super) fn ask(&mut self, pod: Pod, answer: Answer, patient: bool) {
        let until = Instant::now() + if patient { PATIENCE } else { Duration::ZERO };
        self.questions.push((pod, until, answer));
    }

    /// Answers whom it can. Returns when to look again, whatever is heard until then.
    pub(super) fn look(&mut self, store: &Store, now: Instant) -> Option<Instant> {
        for (pod, until, answer) in std::mem::take(&mut self.questions) {
            let name = NamespacedName::new(pod.namespace.clone(), pod.name.clone());
            // another incarnation of the name says nothing of this one
            let uid = Uid::from(pod.uid.as_str());
            let known = store.pod(&name).filter(|known| !uid.excludes(known.owner.uid));
            let said = match known {
                Some(known) => {
                    annotations::read(&known.annotations).map_err(|error| PodDatapathError(error.to_string()))
                }
                None if now < until => {
                    self.questions.push((pod, until, answer));
                    continue;
                }
                None => {
                    tracing::debug!(%pod, "nobody has told of this pod: it asks for nothing");
                    Ok(PodAnnotations::default())
                }
            };
            // whoever asked has given up
            let _gone = answer.send(said);
        }
        self.questions.iter().map(|(_, until, _)| *until).min()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::state::{Object, Owner, Pod as Known, SourceEvent};

    fn asked(uid: &str) -> Pod {
        Pod { namespace: "shop".to_owned(), name: "db-0".to_owned(), uid: uid.to_owned() }
    }

    fn heard_of(uid: &str, address: &str) -> SourceEvent {
        SourceEvent::Upsert(Object::Pod(Known {
            name: NamespacedName::new("shop", "db-0"),
            owner: Owner { uid: uid.into() },
            annotations: BTreeMap::from([(annotations::IPV4.to_owned(), address.to_owned())]),
            ..Known::default()
        }))
    }

    #[test]
    fn a_pod_that_is_heard_of_late_gets_what_it_asks_for() {
        let (mut waiting, mut store) = (PendingPodLookups::default(), Store::default());
        store.apply(heard_of("old", "10.1.0.4"));
        let (answer, mut answered) = oneshot::channel();
        waiting.ask(asked("new"), answer, true);
        let now = Instant::now();
        assert!(waiting.look(&store, now).is_some(), "what its predecessor asked for is nothing to it");
        assert!(answered.try_recv().is_err());
        store.apply(heard_of("new", "10.1.0.5"));
        assert_eq!(waiting.look(&store, now), None);
        assert_eq!(
            answered.try_recv().unwrap().unwrap().addresses,
            ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()]
        );
    }

    #[test]
    fn a_pod_nobody_tells_of_is_not_held_up() {
        let (mut waiting, store) = (PendingPodLookups::default(), Store::default());
        let (answer, mut answered) = oneshot::channel();
        waiting.ask(asked("u"), answer, true);
        assert!(waiting.look(&store, Instant::now()).is_some());
        assert_eq!(waiting.look(&store, Instant::now() + PATIENCE), None);
        assert_eq!(answered.try_recv().unwrap().unwrap(), PodAnnotations::default());
        let (answer, mut answered) = oneshot::channel();
        waiting.ask(asked("u"), answer, false);
        assert_eq!(waiting.look(&store, Instant::now()), None);
        assert_eq!(answered.try_recv().unwrap().unwrap(), PodAnnotations::default());
    }
}
