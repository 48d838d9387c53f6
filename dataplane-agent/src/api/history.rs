//! The last events, so that who asks after something went wrong still sees it; and those to come, without a gap.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::StreamExt as _;
use tokio::sync::broadcast;

use super::{
    datapath::{Observation, Observations},
    views::EventView,
};

/// Events kept.
const KEPT: usize = 1_024;
/// Events a listener may lag behind.
const BACKLOG: usize = 1_024;

/// A ring of events and its listeners. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct History {
    events: Arc<Mutex<VecDeque<EventView>>>,
    sender: broadcast::Sender<Observation>,
}

impl Default for History {
    fn default() -> Self {
        Self { events: Arc::default(), sender: broadcast::channel(BACKLOG).0 }
    }
}

impl History {
    /// Records until the stream ends.
    pub(super) async fn record(self, mut observations: Observations) {
        while let Some(observation) = observations.next().await {
            self.push(observation);
        }
    }

    /// What is kept, oldest first, and everything after that, each once.
    pub(super) fn follow(&self) -> (Vec<EventView>, broadcast::Receiver<Observation>) {
        let events = self.lock();
        (events.iter().cloned().collect(), self.sender.subscribe())
    }

    fn push(&self, observation: Observation) {
        // one lock over both, or a follower between them would miss the event or see it twice
        let mut events = self.lock();
        if let Observation::Event(event) = &observation {
            if events.len() == KEPT {
                events.pop_front();
            }
            events.push_back(event.clone());
        }
        // fails if nobody listens
        let _listeners = self.sender.send(observation);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<EventView>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
