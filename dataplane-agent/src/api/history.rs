//! The most recent packet events, for clients that connect after a problem, and a feed of new ones
//! without a gap.

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

/// Number of recorded events.
const CAPACITY: usize = 1_024;
/// Number of events that a subscriber may lag behind.
const BACKLOG: usize = 1_024;

/// A ring of events and its subscribers. Clones share it.
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

    /// Recorded events, oldest first, and a receiver of all later ones.
    pub(super) fn follow(&self) -> (Vec<EventView>, broadcast::Receiver<Observation>) {
        let events = self.lock();
        (events.iter().cloned().collect(), self.sender.subscribe())
    }

    fn push(&self, observation: Observation) {
        // one lock for both: a subscriber in between would miss the event or see it twice
        let mut events = self.lock();
        if let Observation::Event(event) = &observation {
            if events.len() == CAPACITY {
                events.pop_front();
            }
            events.push_back(event.clone());
        }
        // fails without subscribers
        let _no_subscribers = self.sender.send(observation);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<EventView>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
