//! Reconciles the kernel routes that processes of the host need to reach pods.
//!
//! A task of its own, because netlink requests may be slow and tables must not wait for them. Only
//! routes of this agent (protocol 218) are read, and a route is removed only when it is known to be
//! undesired.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::{
    sync::{mpsc::UnboundedReceiver, watch},
    time::{sleep_until, timeout},
};

use super::backoff::WorkQueue;
use crate::{
    api::views::{Origin, ProblemView},
    netlink::{KernelRoute, Netlink, NetlinkError},
};

/// How often the kernel's routes are compared, in case another program changed one.
const AUDIT_INTERVAL: Duration = Duration::from_secs(60);

/// An update from the reconciler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelUpdate {
    Ensure(KernelRoute),
    /// Remove the agent's route to this destination.
    Remove(IpNet),
    Sweep(KernelSweep),
}

/// All desired routes of a kind were sent: other routes of the agent are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelSweep {
    /// Routes to single addresses.
    Pods,
    /// Routes to networks.
    Nodes,
}

/// The kernel's route table.
pub trait RouteTable: Send + Sync {
    fn list(&self) -> impl Future<Output = Result<Vec<KernelRoute>, NetlinkError>> + Send;
    fn ensure(&self, route: &KernelRoute) -> impl Future<Output = Result<(), NetlinkError>> + Send;
    fn remove(&self, destination: IpNet) -> impl Future<Output = Result<(), NetlinkError>> + Send;
}

impl RouteTable for Netlink {
    async fn list(&self) -> Result<Vec<KernelRoute>, NetlinkError> {
        self.agent_routes().await
    }

    async fn ensure(&self, route: &KernelRoute) -> Result<(), NetlinkError> {
        self.ensure_route(route).await
    }

    async fn remove(&self, destination: IpNet) -> Result<(), NetlinkError> {
        self.remove_route(destination).await
    }
}

/// The routes of the agent that are in the kernel. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct InstalledRoutes(Arc<Mutex<BTreeMap<IpNet, KernelRoute>>>);

impl InstalledRoutes {
    pub fn contains(&self, route: &KernelRoute) -> bool {
        self.lock().get(&route.destination.trunc()) == Some(route)
    }

    #[cfg(test)]
    pub(super) fn insert(&self, route: KernelRoute) {
        self.lock().insert(route.destination.trunc(), route);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpNet, KernelRoute>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Desired and actual routes.
#[derive(Debug)]
pub struct KernelRoutes<T> {
    table: T,
    updates: UnboundedReceiver<KernelUpdate>,
    problems: watch::Sender<Vec<ProblemView>>,
    desired: BTreeMap<IpNet, KernelRoute>,
    actual: InstalledRoutes,
    queue: WorkQueue<IpNet>,
    sweeps: Vec<KernelSweep>,
    list_error: Option<String>,
}

impl<T: RouteTable> KernelRoutes<T> {
    /// Creates the reconciler, and a receiver of its current problems.
    pub fn new(
        table: T,
        updates: UnboundedReceiver<KernelUpdate>,
    ) -> (Self, watch::Receiver<Vec<ProblemView>>) {
        let (problems, published) = watch::channel(Vec::new());
        let routes = Self {
            table,
            updates,
            problems,
            desired: BTreeMap::new(),
            actual: InstalledRoutes::default(),
            queue: WorkQueue::default(),
            sweeps: Vec::new(),
            list_error: None,
        };
        (routes, published)
    }

    /// The routes that are in the kernel, for the sender of updates.
    pub fn installed(&self) -> InstalledRoutes {
        self.actual.clone()
    }

    /// Runs until the sender of updates is gone. Routes stay: stopping the agent does not affect
    /// traffic.
    pub async fn run(mut self) {
        self.audit().await;
        let mut next_audit = Instant::now() + AUDIT_INTERVAL;
        loop {
            self.work(Instant::now()).await;
            self.publish();
            let due = self.queue.next_due(Instant::now()).map_or(next_audit, |due| due.min(next_audit));
            tokio::select! {
                update = self.updates.recv() => {
                    let Some(update) = update else { return };
                    self.on_update(update);
                    self.drain_updates().await;
                }
                () = sleep_until(due.into()) => {
                    if Instant::now() >= next_audit {
                        self.audit().await;
                        next_audit = Instant::now() + AUDIT_INTERVAL;
                    }
                }
            }
        }
    }

    /// Takes further updates first: a route that is removed and added at once then costs nothing.
    async fn drain_updates(&mut self) {
        const BATCH_WINDOW: Duration = Duration::from_millis(5);
        while let Ok(Some(update)) = timeout(BATCH_WINDOW, self.updates.recv()).await {
            self.on_update(update);
        }
    }

    fn on_update(&mut self, update: KernelUpdate) {
        match update {
            KernelUpdate::Ensure(route) => {
                let destination = route.destination.trunc();
                self.desired.insert(destination, route);
                self.queue.push(destination);
            }
            KernelUpdate::Remove(destination) => {
                self.desired.remove(&destination);
                self.queue.push(destination);
            }
            KernelUpdate::Sweep(sweep) => {
                self.sweeps.push(sweep);
                self.sweep();
            }
        }
    }

    fn sweep(&mut self) {
        for destination in self.actual.lock().keys() {
            let kind = if destination.prefix_len() == destination.max_prefix_len() {
                KernelSweep::Pods
            } else {
                KernelSweep::Nodes
            };
            if self.sweeps.contains(&kind) && !self.desired.contains_key(destination) {
                self.queue.push(*destination);
            }
        }
    }

    /// Reads the kernel's routes. Differences are repaired by later work.
    async fn audit(&mut self) {
        match self.table.list().await {
            Ok(routes) => {
                self.list_error = None;
                *self.actual.lock() =
                    routes.into_iter().map(|route| (route.destination.trunc(), route)).collect();
            }
            Err(error) => self.list_error = Some(error.to_string()),
        }
        for (destination, route) in &self.desired {
            if !self.actual.contains(route) {
                self.queue.push(*destination);
            }
        }
        self.sweep();
    }

    async fn work(&mut self, now: Instant) {
        while let Some(destination) = self.queue.pop(now) {
            match self.apply(destination).await {
                Ok(()) => self.queue.done(&destination),
                Err(error) => self.queue.fail(destination, error.to_string(), now),
            }
        }
    }

    async fn apply(&mut self, destination: IpNet) -> Result<(), NetlinkError> {
        let actual = self.actual.lock().get(&destination).copied();
        match self.desired.get(&destination) {
            Some(desired) if actual == Some(*desired) => {}
            Some(desired) => {
                self.table.ensure(desired).await?;
                self.actual.lock().insert(destination, *desired);
            }
            None if actual.is_some() => {
                self.table.remove(destination).await?;
                self.actual.lock().remove(&destination);
            }
            None => {}
        }
        Ok(())
    }

    fn publish(&self) {
        let problem = |subject: String, message: &str| ProblemView {
            origin: Origin::Reconcile,
            subject,
            message: message.to_owned(),
        };
        let unread = self.list_error.iter().map(|message| problem("kernel routes".to_owned(), message));
        let failed = self.queue.problems().map(|(key, message)| problem(format!("route {key}"), message));
        let mut problems: Vec<_> = unread.chain(failed).collect();
        problems.sort_by(|a, b| a.subject.cmp(&b.subject));
        self.problems.send_if_modified(|published| {
            let changed = *published != problems;
            *published = problems;
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use tokio::sync::mpsc;

    use super::*;

    /// Routes in memory; logs every change.
    #[derive(Clone, Debug, Default)]
    struct Memory {
        inner: Arc<Mutex<Inner>>,
    }

    #[derive(Debug, Default)]
    struct Inner {
        routes: BTreeMap<IpNet, KernelRoute>,
        log: Vec<String>,
        reject: Option<IpNet>,
    }

    impl RouteTable for Memory {
        async fn list(&self) -> Result<Vec<KernelRoute>, NetlinkError> {
            Ok(self.inner.lock().unwrap().routes.values().copied().collect())
        }

        async fn ensure(&self, route: &KernelRoute) -> Result<(), NetlinkError> {
            let mut inner = self.inner.lock().unwrap();
            if inner.reject.take_if(|rejected| *rejected == route.destination).is_some() {
                let source = io::Error::from(io::ErrorKind::NetworkUnreachable);
                let object = route.to_string();
                return Err(NetlinkError::Kernel { operation: "add route", object, source });
            }
            inner.routes.insert(route.destination, *route);
            inner.log.push(format!("+{}", route.destination));
            Ok(())
        }

        async fn remove(&self, destination: IpNet) -> Result<(), NetlinkError> {
            let mut inner = self.inner.lock().unwrap();
            inner.routes.remove(&destination);
            inner.log.push(format!("-{destination}"));
            Ok(())
        }
    }

    fn route(destination: &str) -> KernelRoute {
        KernelRoute::on_link(destination.parse().unwrap(), 7)
    }

    /// The changes made to the kernel for these updates.
    async fn after(memory: &Memory, updates: &[KernelUpdate]) -> Vec<String> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let (routes, _problems) = KernelRoutes::new(memory.clone(), receiver);
        for update in updates {
            sender.send(*update).unwrap();
        }
        drop(sender);
        routes.run().await;
        std::mem::take(&mut memory.inner.lock().unwrap().log)
    }

    fn memory(destinations: &[&str]) -> Memory {
        let memory = Memory::default();
        for destination in destinations {
            memory.inner.lock().unwrap().routes.insert(destination.parse().unwrap(), route(destination));
        }
        memory
    }

    #[tokio::test]
    async fn existing_route_is_not_written_and_stale_route_is_removed_after_sweep() {
        let memory = memory(&["10.1.1.0/24", "10.1.2.0/24", "10.1.0.9/32"]);
        let ensure = KernelUpdate::Ensure(route("10.1.1.0/24"));
        assert_eq!(after(&memory, std::slice::from_ref(&ensure)).await, [] as [&str; 0]);
        let updates = [ensure, KernelUpdate::Sweep(KernelSweep::Nodes)];
        assert_eq!(after(&memory, &updates).await, ["-10.1.2.0/24"]);
        let updates = [ensure, KernelUpdate::Sweep(KernelSweep::Pods)];
        assert_eq!(after(&memory, &updates).await, ["-10.1.0.9/32"]);
    }

    #[tokio::test]
    async fn rejected_route_is_a_problem_until_added() {
        let memory = memory(&[]);
        memory.inner.lock().unwrap().reject = Some("10.1.1.0/24".parse().unwrap());
        let (_sender, receiver) = mpsc::unbounded_channel();
        let (mut routes, problems) = KernelRoutes::new(memory.clone(), receiver);
        for destination in ["10.1.1.0/24", "10.1.2.0/24"] {
            routes.on_update(KernelUpdate::Ensure(route(destination)));
        }
        let now = Instant::now();
        routes.work(now).await;
        routes.publish();
        assert_eq!(problems.borrow()[0].subject, "route 10.1.1.0/24");
        assert_eq!(memory.inner.lock().unwrap().log, ["+10.1.2.0/24"], "the other route is still added");
        routes.work(routes.queue.next_due(now).unwrap()).await;
        routes.publish();
        assert!(problems.borrow().is_empty());
        assert_eq!(memory.inner.lock().unwrap().routes.len(), 2);
    }

    #[tokio::test]
    async fn route_removed_by_others_is_restored_by_audit() {
        let memory = memory(&[]);
        let (_sender, receiver) = mpsc::unbounded_channel();
        let (mut routes, _problems) = KernelRoutes::new(memory.clone(), receiver);
        routes.on_update(KernelUpdate::Ensure(route("10.1.1.0/24")));
        routes.work(Instant::now()).await;
        memory.inner.lock().unwrap().routes.clear();
        routes.audit().await;
        routes.work(Instant::now()).await;
        assert_eq!(memory.inner.lock().unwrap().routes.len(), 1);
    }
}
