//! Whose sockets are ended, where, and when.

use std::sync::{Arc, Mutex};

use tokio::sync::mpsc::{self, UnboundedSender};

use super::*;

/// What the kernel and the datapath have, and what was ended.
#[derive(Clone, Default)]
struct Fake {
    peers: Vec<(u64, ConnectedPeer)>,
    lacks: Option<&'static str>,
    ended: Arc<Mutex<Vec<(Place, u64)>>>,
    asked: Arc<Mutex<Vec<Place>>>,
}

impl SocketTable for Fake {
    async fn peers(&self) -> Result<Vec<(u64, ConnectedPeer)>, SocketsError> {
        Ok(self.peers.clone())
    }

    async fn netns(&self, place: &Place) -> Result<Option<u64>, SocketsError> {
        Ok(match place {
            Place::Host => Some(1),
            Place::Pod(path) if path.ends_with("two") => Some(2),
            Place::Pod(_) => None,
        })
    }

    async fn end(&self, place: &Place, cookies: HashSet<u64>) -> Result<usize, SocketsError> {
        self.asked.lock().unwrap().push(place.clone());
        if let Some(what) = self.lacks {
            return Err(SockDiagError::Unsupported(what).into());
        }
        let count = cookies.len();
        self.ended.lock().unwrap().extend(cookies.into_iter().map(|cookie| (place.clone(), cookie)));
        Ok(count)
    }
}

fn backend(last: u8) -> UdpBackend {
    UdpBackend { addr: Addr::v4([10, 1, 0, last]), port: Port::new(53) }
}

fn peer(cookie: u64, netns: u64, last: u8) -> (u64, ConnectedPeer) {
    let UdpBackend { addr, port } = backend(last);
    (cookie, ConnectedPeer { backend: addr, netns, port, reserved: [0; 6] })
}

fn pod(name: &str) -> Place {
    Place::Pod(name.into())
}

fn start(fake: &Fake) -> (UnboundedSender<SocketUpdate>, watch::Receiver<Vec<ProblemView>>) {
    let (updates, heard) = mpsc::unbounded_channel();
    let (sockets, problems) = Sockets::new(fake.clone(), heard);
    tokio::spawn(sockets.run());
    (updates, problems)
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), wait).await.expect("it happens");
}

#[tokio::test]
async fn sockets_of_who_is_gone_end_where_they_are_and_no_others() {
    let peers = vec![peer(11, 1, 1), peer(12, 1, 2), peer(21, 2, 1), peer(22, 2, 3)];
    let fake = Fake { peers, ..Fake::default() };
    let (updates, _) = start(&fake);
    for update in [
        SocketUpdate::Pod("quiet".to_owned(), "other/two".into()),
        SocketUpdate::PodGone("quiet".to_owned()),
        SocketUpdate::Pod("a".to_owned(), "two".into()),
        SocketUpdate::Gone(backend(1)),
        // gone and back within a breath: nothing has happened
        SocketUpdate::Gone(backend(2)),
        SocketUpdate::Back(backend(2)),
    ] {
        updates.send(update).unwrap();
    }
    // a second look follows, for who was just being connected
    until(|| fake.ended.lock().unwrap().len() == 4).await;
    let once = [(Place::Host, 11), (pod("two"), 21)];
    assert_eq!(*fake.ended.lock().unwrap(), [once.clone(), once].concat());
}

#[tokio::test]
async fn where_the_kernel_does_not_number_namespaces_all_are_looked_at() {
    let fake = Fake { peers: vec![peer(21, 2, 1)], ..Fake::default() };
    let (updates, _) = start(&fake);
    updates.send(SocketUpdate::Pod("a".to_owned(), "unknown".into())).unwrap();
    updates.send(SocketUpdate::Gone(backend(1))).unwrap();
    until(|| fake.ended.lock().unwrap().contains(&(pod("unknown"), 21))).await;
    assert!(!fake.asked.lock().unwrap().contains(&Place::Host), "it is known to be elsewhere");
}

#[tokio::test]
async fn whoever_is_not_among_all_backends_is_gone() {
    let fake = Fake { peers: vec![peer(11, 1, 1), peer(12, 1, 2)], ..Fake::default() };
    let (updates, _) = start(&fake);
    updates.send(SocketUpdate::Only([backend(2)].into())).unwrap();
    until(|| !fake.ended.lock().unwrap().is_empty()).await;
    assert_eq!(fake.ended.lock().unwrap()[0], (Place::Host, 11));
}

#[tokio::test]
async fn a_kernel_that_cannot_end_sockets_is_a_problem_and_nobody_waits() {
    let fake =
        Fake { peers: vec![peer(11, 1, 1)], lacks: Some("CONFIG_INET_DIAG_DESTROY"), ..Fake::default() };
    let (updates, mut problems) = start(&fake);
    updates.send(SocketUpdate::Gone(backend(1))).unwrap();
    problems.changed().await.unwrap();
    let message = problems.borrow_and_update()[0].message.clone();
    assert!(message.contains("the kernel has no CONFIG_INET_DIAG_DESTROY"), "{message}");
    updates.send(SocketUpdate::Gone(backend(2))).unwrap();
    until(|| fake.asked.lock().unwrap().len() > 1).await;
    assert!(!problems.has_changed().unwrap(), "it is said once");
}
