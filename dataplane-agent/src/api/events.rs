//! The answer to `events`: what was kept, then what comes, filtered and named.

use std::{collections::VecDeque, sync::Arc};

use tokio::sync::broadcast::{self, error::RecvError};

use super::{
    answer::Api,
    datapath::Observation,
    request::{EventFilter, EventLine},
    views::EventView,
};

/// Lines for one client.
#[derive(Debug)]
pub struct EventStream {
    api: Arc<Api>,
    filter: EventFilter,
    kept: VecDeque<EventView>,
    /// Absent if the client wanted only what was kept; taken when the stream has ended.
    coming: Option<broadcast::Receiver<Observation>>,
    ended: bool,
}

impl EventStream {
    pub(super) fn new(api: Arc<Api>, filter: EventFilter) -> Self {
        let (kept, coming) = api.history().follow();
        let coming = filter.follow.then_some(coming);
        Self { api, filter, kept: kept.into(), coming, ended: false }
    }

    /// The next line; `None` after [`EventLine::End`].
    pub(super) async fn next(&mut self) -> Option<EventLine> {
        while let Some(event) = self.kept.pop_front() {
            if self.filter.matches(&event) {
                return Some(EventLine::Event(self.named(event).await));
            }
        }
        while let Some(coming) = &mut self.coming {
            match coming.recv().await {
                Ok(Observation::Event(event)) if self.filter.matches(&event) => {
                    return Some(EventLine::Event(self.named(event).await));
                }
                Ok(Observation::Event(_)) => {}
                Ok(Observation::Lost(lost)) | Err(RecvError::Lagged(lost)) => {
                    return Some(EventLine::Lost(lost));
                }
                Err(RecvError::Closed) => self.coming = None,
            }
        }
        if self.ended {
            return None;
        }
        self.ended = true;
        Some(EventLine::End)
    }

    async fn named(&self, mut event: EventView) -> EventView {
        let names = self.api.names().await;
        if !names.name_event(&mut event)
            && let Some(names) = self.api.fresher_names(&names).await
        {
            names.name_event(&mut event);
        }
        event
    }
}
