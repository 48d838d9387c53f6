//! Makes the next hops that flows have cached invalid when the kernel's network configuration
//! changes.

use std::time::Duration;

use tokio::{task::JoinHandle, time::sleep};

use crate::{datapath::ForwardingGeneration, netlink::ForwardingMonitor};

/// Time between two changes of the generation: each costs every flow one search, and others can
/// make neighbours change.
const PAUSE: Duration = Duration::from_millis(10);

/// The task that follows the kernel's changes, until it is dropped.
#[derive(Debug)]
pub(super) struct ForwardingWatch {
    task: JoinHandle<()>,
}

impl ForwardingWatch {
    pub(super) fn start(monitor: ForwardingMonitor, generation: ForwardingGeneration) -> Self {
        Self { task: tokio::spawn(watch(monitor, generation)) }
    }
}

impl Drop for ForwardingWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(mut monitor: ForwardingMonitor, generation: ForwardingGeneration) {
    while monitor.changed().await {
        if let Err(error) = generation.advance() {
            tracing::error!("cannot tell the datapath that routes or neighbours changed: {error}");
        }
        sleep(PAUSE).await;
    }
    tracing::error!(
        "the kernel no longer reports changes of routes and neighbours; flows follow them within a second"
    );
}
