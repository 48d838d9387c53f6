//! Routes of the kernel: what the host's own processes reach pods by.
//!
//! A task of its own, because netlink answers when it likes and the tables must not wait for it. Only routes that are
//! ours (protocol 218) are seen, and none is removed that is not known to be unwanted.

use std::{
    collections::BTreeMap,
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

/// How often the kernel's routes are read again: somebody else may have removed one of ours.
const AUDIT: Duration = Duration::from_secs(60);

/// What the reconciler says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelUpdate {
    Want(KernelRoute),
    /// No route of ours to this destination any more.
    Unwant(IpNet),
    Sweep(KernelSweep),
}

/// Everything of a kind has been wanted by now: others of ours are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelSweep {
    /// Routes to single addresses.
    Pods,
    /// Routes to networks.
    Nodes,
}

/// The kernel, as far as it is needed here.
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

/// Wanted and actual routes.
#[derive(Debug)]
pub struct KernelRoutes<T> {
    table: T,
    updates: UnboundedReceiver<KernelUpdate>,
    problems: watch::Sender<Vec<ProblemView>>,
    wanted: BTreeMap<IpNet, KernelRoute>,
    actual: BTreeMap<IpNet, KernelRoute>,
    queue: WorkQueue<IpNet>,
    swept: Vec<KernelSweep>,
    read: Option<String>,
}

impl<T: RouteTable> KernelRoutes<T> {
    /// Does what comes through `updates`. Also gives what is wrong, whenever that changes.
    pub fn new(
        table: T,
        updates: UnboundedReceiver<KernelUpdate>,
    ) -> (Self, watch::Receiver<Vec<ProblemView>>) {
        let (problems, published) = watch::channel(Vec::new());
        let routes = Self {
            table,
            updates,
            problems,
            wanted: BTreeMap::new(),
            actual: BTreeMap::new(),
            queue: WorkQueue::default(),
            swept: Vec::new(),
            read: None,
        };
        (routes, published)
    }

    /// Until the reconciler is gone. Routes stay: the agent's end changes nothing for traffic.
    pub async fn run(mut self) {
        self.audit().await;
        let mut next_audit = Instant::now() + AUDIT;
        loop {
            self.work(Instant::now()).await;
            self.publish();
            let due = self.queue.next_due(Instant::now()).map_or(next_audit, |due| due.min(next_audit));
            tokio::select! {
                update = self.updates.recv() => {
                    let Some(update) = update else { return };
                    self.take(update);
                    self.take_waiting().await;
                }
                () = sleep_until(due.into()) => {
                    if Instant::now() >= next_audit {
                        self.audit().await;
                        next_audit = Instant::now() + AUDIT;
                    }
                }
            }
        }
    }

    /// A route that is replaced by an equal one in the same breath costs nothing, if both updates are taken first.
    async fn take_waiting(&mut self) {
        const BREATH: Duration = Duration::from_millis(5);
        while let Ok(Some(update)) = timeout(BREATH, self.updates.recv()).await {
            self.take(update);
        }
    }

    fn take(&mut self, update: KernelUpdate) {
        match update {
            KernelUpdate::Want(route) => {
                let destination = route.destination.trunc();
                self.wanted.insert(destination, route);
                self.queue.push(destination);
            }
            KernelUpdate::Unwant(destination) => {
                self.wanted.remove(&destination);
                self.queue.push(destination);
            }
            KernelUpdate::Sweep(sweep) => {
                self.swept.push(sweep);
                self.sweep();
            }
        }
    }

    fn sweep(&mut self) {
        for destination in self.actual.keys() {
            let kind = if destination.prefix_len() == destination.max_prefix_len() {
                KernelSweep::Pods
            } else {
                KernelSweep::Nodes
            };
            if self.swept.contains(&kind) && !self.wanted.contains_key(destination) {
                self.queue.push(*destination);
            }
        }
    }

    /// Reads what is there. What differs from what is wanted is repaired by later work.
    async fn audit(&mut self) {
        match self.table.list().await {
            Ok(routes) => {
                self.read = None;
                self.actual = routes.into_iter().map(|route| (route.destination.trunc(), route)).collect();
            }
            Err(error) => self.read = Some(error.to_string()),
        }
        for (destination, route) in &self.wanted {
            if self.actual.get(destination) != Some(route) {
                self.queue.push(*destination);
            }
        }
        self.sweep();
    }

    async fn work(&mut self, now: Instant) {
        while let Some(destination) = self.queue.pop(now) {
            match self.apply(destination).await {
                Ok(()) => self.queue.settle(&destination),
                Err(error) => self.queue.fail(destination, error.to_string(), now),
            }
        }
    }

    async fn apply(&mut self, destination: IpNet) -> Result<(), NetlinkError> {
        let actual = self.actual.get(&destination);
        match self.wanted.get(&destination) {
            Some(wanted) if actual == Some(wanted) => {}
            Some(wanted) => {
                self.table.ensure(wanted).await?;
                self.actual.insert(destination, *wanted);
            }
            None if actual.is_some() => {
                self.table.remove(destination).await?;
                self.actual.remove(&destination);
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
        let unread = self.read.iter().map(|message| problem("kernel routes".to_owned(), message));
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

    /// Routes in memory; every change is logged.
    #[derive(Clone, Debug, Default)]
    struct Memory {
        inner: Arc<Mutex<Inner>>,
    }

    #[derive(Debug, Default)]
    struct Inner {
        routes: BTreeMap<IpNet, KernelRoute>,
        log: Vec<String>,
        refuse: Option<IpNet>,
    }

    impl RouteTable for Memory {
        async fn list(&self) -> Result<Vec<KernelRoute>, NetlinkError> {
            Ok(self.inner.lock().unwrap().routes.values().copied().collect())
        }

        async fn ensure(&self, route: &KernelRoute) -> Result<(), NetlinkError> {
            let mut inner = self.inner.lock().unwrap();
            if inner.refuse.take_if(|refused| *refused == route.destination).is_some() {
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

    /// What is done to the kernel for these updates.
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
    async fn a_route_that_is_there_is_not_written_and_a_stale_one_goes_only_after_the_sweep() {
        let memory = memory(&["10.1.1.0/24", "10.1.2.0/24", "10.1.0.9/32"]);
        let want = KernelUpdate::Want(route("10.1.1.0/24"));
        assert_eq!(after(&memory, std::slice::from_ref(&want)).await, [] as [&str; 0]);
        let updates = [want, KernelUpdate::Sweep(KernelSweep::Nodes)];
        assert_eq!(after(&memory, &updates).await, ["-10.1.2.0/24"]);
        let updates = [want, KernelUpdate::Sweep(KernelSweep::Pods)];
        assert_eq!(after(&memory, &updates).await, ["-10.1.0.9/32"]);
    }

    #[tokio::test]
    async fn a_refused_route_is_a_problem_until_it_is_made() {
        let memory = memory(&[]);
        memory.inner.lock().unwrap().refuse = Some("10.1.1.0/24".parse().unwrap());
        let (_sender, receiver) = mpsc::unbounded_channel();
        let (mut routes, problems) = KernelRoutes::new(memory.clone(), receiver);
        for destination in ["10.1.1.0/24", "10.1.2.0/24"] {
            routes.take(KernelUpdate::Want(route(destination)));
        }
        let now = Instant::now();
        routes.work(now).await;
        routes.publish();
        assert_eq!(problems.borrow()[0].subject, "route 10.1.1.0/24");
        assert_eq!(memory.inner.lock().unwrap().log, ["+10.1.2.0/24"], "the other is made all the same");
        routes.work(routes.queue.next_due(now).unwrap()).await;
        routes.publish();
        assert!(problems.borrow().is_empty());
        assert_eq!(memory.inner.lock().unwrap().routes.len(), 2);
    }

    #[tokio::test]
    async fn a_route_somebody_removed_comes_back_with_the_next_audit() {
        let memory = memory(&[]);
        let (_sender, receiver) = mpsc::unbounded_channel();
        let (mut routes, _problems) = KernelRoutes::new(memory.clone(), receiver);
        routes.take(KernelUpdate::Want(route("10.1.1.0/24")));
        routes.work(Instant::now()).await;
        memory.inner.lock().unwrap().routes.clear();
        routes.audit().await;
        routes.work(Instant::now()).await;
        assert_eq!(memory.inner.lock().unwrap().routes.len(), 1);
    }
}
