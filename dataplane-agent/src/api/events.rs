//! The answer to `events`: recorded events, then new ones, filtered and with names.

use std::{collections::VecDeque, sync::Arc};

use tokio::sync::broadcast::{self, error::RecvError};

use super::{
    answer::Api,
    datapath::Observation,
    request::{EventFilter, EventLine},
    views::EventView,
};

/// Stream of event lines for one client.
#[derive(Debug)]
pub struct EventStream {
    api: Arc<Api>,
    filter: EventFilter,
    recorded: VecDeque<EventView>,
    /// New events; `None` without `follow`, or after the stream has ended.
    live: Option<broadcast::Receiver<Observation>>,
    ended: bool,
}

impl EventStream {
    pub(super) fn new(api: Arc<Api>, filter: EventFilter) -> Self {
        let (recorded, live) = api.history().follow();
        let live = filter.follow.then_some(live);
        Self { api, filter, recorded: recorded.into(), live, ended: false }
    }

    /// The next line; `None` after [`EventLine::End`].
    pub(super) async fn next(&mut self) -> Option<EventLine> {
        while let Some(event) = self.recorded.pop_front() {
            if self.filter.matches(&event) {
                return Some(EventLine::Event(self.with_names(event).await));
            }
        }
        while let Some(live) = &mut self.live {
            match live.recv().await {
                Ok(Observation::Event(event)) if self.filter.matches(&event) => {
                    return Some(EventLine::Event(self.with_names(event).await));
                }
                Ok(Observation::Event(_)) => {}
                Ok(Observation::Lost(lost)) | Err(RecvError::Lagged(lost)) => {
                    return Some(EventLine::Lost(lost));
                }
                Err(RecvError::Closed) => self.live = None,
            }
        }
        if self.ended {
            return None;
        }
        self.ended = true;
        Some(EventLine::End)
    }

    async fn with_names(&self, mut event: EventView) -> EventView {
        let names = self.api.names().await;
        if !names.name_event(&mut event)
            && let Some(names) = self.api.fresher_names(&names).await
        {
            names.name_event(&mut event);
        }
        event
    }
}
