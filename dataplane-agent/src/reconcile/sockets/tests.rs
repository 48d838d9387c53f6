//! Which sockets are destroyed, in which namespace, and when.

use std::sync::{Arc, Mutex};

use tokio::sync::mpsc::{self, UnboundedSender};

use super::*;

/// A fake kernel and datapath that records destroyed sockets.
#[derive(Clone, Default)]
struct Fake {
    peers: Vec<(u64, ConnectedPeer)>,
    unsupported: Option<&'static str>,
    destroyed: Arc<Mutex<Vec<(Netns, u64)>>>,
    scanned: Arc<Mutex<Vec<Netns>>>,
}

impl SocketTable for Fake {
    async fn peers(&self) -> Result<Vec<(u64, ConnectedPeer)>, SocketsError> {
        Ok(self.peers.clone())
    }

    async fn netns(&self, netns: &Netns) -> Result<Option<u64>, SocketsError> {
        Ok(match netns {
            Netns::Host => Some(1),
            Netns::Pod(path) if path.ends_with("two") => Some(2),
            Netns::Pod(_) => None,
        })
    }

    async fn destroy(&self, netns: &Netns, cookies: HashSet<u64>) -> Result<usize, SocketsError> {
        self.scanned.lock().unwrap().push(netns.clone());
        if let Some(feature) = self.unsupported {
            return Err(SockDiagError::Unsupported(feature).into());
        }
        let count = cookies.len();
        self.destroyed.lock().unwrap().extend(cookies.into_iter().map(|cookie| (netns.clone(), cookie)));
        Ok(count)
    }
}

fn backend(last: u8) -> UdpBackend {
    UdpBackend { service: 7, addr: Addr::v4([10, 1, 0, last]), port: Port::new(53) }
}

fn peer(cookie: u64, netns: u64, last: u8) -> (u64, ConnectedPeer) {
    let UdpBackend { service, addr, port } = backend(last);
    (cookie, ConnectedPeer { backend: addr, netns, port, reserved: 0, service_id: service })
}

fn pod(name: &str) -> Netns {
    Netns::Pod(name.into())
}

fn start(fake: &Fake) -> (UnboundedSender<SocketUpdate>, watch::Receiver<Vec<ProblemView>>) {
    let (updates, receiver) = mpsc::unbounded_channel();
    let (sockets, problems) = Sockets::new(fake.clone(), receiver);
    tokio::spawn(sockets.run());
    (updates, problems)
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), wait).await.expect("condition holds in time");
}

#[tokio::test]
async fn only_sockets_of_removed_backends_are_destroyed() {
    let peers = vec![peer(11, 1, 1), peer(12, 1, 2), peer(21, 2, 1), peer(22, 2, 3)];
    let fake = Fake { peers, ..Fake::default() };
    let (updates, _) = start(&fake);
    for update in [
        SocketUpdate::PodAdded("quiet".to_owned(), "other/two".into()),
        SocketUpdate::PodRemoved("quiet".to_owned()),
        SocketUpdate::PodAdded("a".to_owned(), "two".into()),
        SocketUpdate::BackendRemoved(backend(1)),
        // removed and added in one batch: no change
        SocketUpdate::BackendRemoved(backend(2)),
        SocketUpdate::BackendAdded(backend(2)),
    ] {
        updates.send(update).unwrap();
    }
    // the second scan, for sockets that were being connected
    until(|| fake.destroyed.lock().unwrap().len() == 4).await;
    let once = [(Netns::Host, 11), (pod("two"), 21)];
    assert_eq!(*fake.destroyed.lock().unwrap(), [once.clone(), once].concat());
}

#[tokio::test]
async fn sockets_of_other_service_service_are_kept() {
    let (cookie, of_service) = peer(11, 1, 1);
    let of_other_service = ConnectedPeer { service_id: 8, ..of_service };
    let of_earlier_program = ConnectedPeer { service_id: 0, ..of_service };
    let peers = vec![(cookie, of_service), (12, of_other_service), (13, of_earlier_program)];
    let fake = Fake { peers, ..Fake::default() };
    let (updates, _) = start(&fake);
    updates.send(SocketUpdate::BackendRemoved(backend(1))).unwrap();
    until(|| !fake.destroyed.lock().unwrap().is_empty()).await;
    assert_eq!(fake.destroyed.lock().unwrap()[0], (Netns::Host, 11));
    // the second scan
    until(|| fake.destroyed.lock().unwrap().len() == 2).await;
    updates.send(SocketUpdate::BackendRemoved(UdpBackend { service: 0, ..backend(1) })).unwrap();
    until(|| fake.destroyed.lock().unwrap().contains(&(Netns::Host, 13))).await;
    assert!(!fake.destroyed.lock().unwrap().contains(&(Netns::Host, 12)));
}

#[tokio::test]
async fn all_namespaces_are_scanned_without_namespace_cookies() {
    let fake = Fake { peers: vec![peer(21, 2, 1)], ..Fake::default() };
    let (updates, _) = start(&fake);
    updates.send(SocketUpdate::PodAdded("a".to_owned(), "unknown".into())).unwrap();
    updates.send(SocketUpdate::BackendRemoved(backend(1))).unwrap();
    until(|| fake.destroyed.lock().unwrap().contains(&(pod("unknown"), 21))).await;
    assert!(!fake.scanned.lock().unwrap().contains(&Netns::Host), "its namespace is known to be another one");
}

#[tokio::test]
async fn backend_missing_from_full_list_is_removed() {
    let fake = Fake { peers: vec![peer(11, 1, 1), peer(12, 1, 2)], ..Fake::default() };
    let (updates, _) = start(&fake);
    updates.send(SocketUpdate::AllBackends([backend(2)].into())).unwrap();
    until(|| !fake.destroyed.lock().unwrap().is_empty()).await;
    assert_eq!(fake.destroyed.lock().unwrap()[0], (Netns::Host, 11));
}

#[tokio::test]
async fn missing_kernel_support_is_reported_once() {
    let fake = Fake {
        peers: vec![peer(11, 1, 1)],
        unsupported: Some("CONFIG_INET_DIAG_DESTROY"),
        ..Fake::default()
    };
    let (updates, mut problems) = start(&fake);
    updates.send(SocketUpdate::BackendRemoved(backend(1))).unwrap();
    problems.changed().await.unwrap();
    let message = problems.borrow_and_update()[0].message.clone();
    assert!(message.contains("the kernel has no CONFIG_INET_DIAG_DESTROY"), "{message}");
    updates.send(SocketUpdate::BackendRemoved(backend(2))).unwrap();
    until(|| fake.scanned.lock().unwrap().len() > 1).await;
    assert!(!problems.has_changed().unwrap(), "the problem is reported once");
}
