//! Tests of connections and packets through the attached programs: counters, events, logs.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    time::Duration,
};

use dataplane_agent::datapath::{Counters, Datapath, DatapathConfig, EbpfLog, Events, table::Table as _};
use dataplane_common::{
    abi::{Addr, BackendSlot, NodeFlags, Port, Scope, Service, ServiceKey},
    reason::{HookId, Outcome, Verdict},
};
use tokio::time::timeout;

use super::{Node, veth};
use crate::netns::{in_fresh_netns, ip};

#[test]
fn socket_translation_and_counters_survive_a_restart() {
    in_fresh_netns(|| async {
        let mut node = Node::new();
        let cgroup = node.cgroup();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let backend = listener.local_addr().unwrap();
        let service: SocketAddr = "10.96.0.1:80".parse().unwrap();

        let mut datapath = Datapath::load(&node.config()).unwrap();
        let mut tables = datapath.tables().unwrap();
        let slot = BackendSlot {
            addr: backend.ip().into(),
            port: Port::new(backend.port()),
            ..BackendSlot::default()
        };
        tables.backends.insert(&0, &slot).unwrap();
        let key = ServiceKey {
            addr: Addr::from(service.ip()),
            port: Port::new(service.port()),
            protocol: 6,
            scope: Scope::Any as u8,
        };
        let row = Service { id: 1, count: 1, ..Service::default() };
        tables.services.insert(&key, &row.with_checksum(&key)).unwrap();
        datapath.attach_cgroup(&cgroup).unwrap();
        let counters = Counters::open(datapath.pins()).unwrap();
        let translated =
            || counters.get(HookId::Connect, Outcome::Passed(Verdict::SocketTranslated)).unwrap();
        assert_eq!(translated(), 0);

        connect_from_cgroup(&cgroup, service);
        assert_eq!(translated(), 1);
        drop(datapath);
        connect_from_cgroup(&cgroup, service);
        assert_eq!(translated(), 2);
        // the programs of another agent replace those of the first
        let mut datapath = Datapath::load(&node.changed_config()).unwrap();
        datapath.attach_cgroup(&cgroup).unwrap();
        connect_from_cgroup(&cgroup, service);
        assert_eq!(translated(), 3);
        assert!(counters.read().unwrap().iter().any(|count| count.packets == 3));
        datapath.detach_cgroup().unwrap();
        assert_eq!(translated(), 3);
    });
}

/// Sends one UDP datagram from `dp1-peer` into `dp1`.
fn send_datagram(port: u16) {
    ip("addr replace 10.1.1.2/24 dev dp1-peer");
    ip("neigh replace 10.1.1.9 dev dp1-peer lladdr 0e:da:7a:00:00:01 nud permanent");
    let socket = UdpSocket::bind("10.1.1.2:4000").unwrap();
    socket.send_to(b"hello", ("10.1.1.9", port)).unwrap();
}

#[test]
fn packet_events_are_reported() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        let mut config = node.config();
        config.node.flags = NodeFlags::TRACE;
        // the second agent adopts the ring and continues where the first stopped
        for port in [5_001, 5_002] {
            let mut datapath = Datapath::load(&config).unwrap();
            let events = Events::start(datapath.pins()).unwrap();
            let listeners = [events.subscribe(), events.subscribe()];
            datapath.attach_pod("dp1").unwrap();
            send_datagram(port);
            for mut listener in listeners {
                let expected = async {
                    loop {
                        let event = listener.recv().await.unwrap();
                        if event.source_port == 4_000 {
                            return event;
                        }
                    }
                };
                let event = timeout(Duration::from_secs(10), expected).await.expect("an event in time");
                assert_eq!((event.hook, event.destination_port), (HookId::FromPod, port));
                assert_eq!(event.source, "10.1.1.2".parse::<IpAddr>().unwrap());
                assert_eq!(event.destination, "10.1.1.9".parse::<IpAddr>().unwrap());
                assert_eq!(event.protocol, 17);
                assert!(event.length >= 14 + 20 + 8 + 5);
            }
        }
    });
}

#[test]
fn log_of_the_programs_reaches_tracing() {
    in_fresh_netns(|| async {
        let node = Node::new();
        veth("dp1");
        let config = DatapathConfig { log: EbpfLog::Trace, ..node.config() };
        let (lines, mut logged) = tokio::sync::mpsc::unbounded_channel();
        let writer = move || Lines(lines.clone());
        let subscriber =
            tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(writer).finish();
        let _here = tracing::subscriber::set_default(subscriber);
        // the second agent uses the programs of the first
        for reused in [false, true] {
            let mut datapath = Datapath::load(&config).unwrap();
            assert_eq!(datapath.reuses_programs(), reused);
            let forwarding = datapath.forward_log().unwrap();
            datapath.attach_pod("dp1").unwrap();
            while logged.try_recv().is_ok() {}
            send_datagram(5_000);
            let found = async {
                while let Some(line) = logged.recv().await {
                    if line.contains("dataplane") && line.contains("hook 0 ") {
                        return;
                    }
                }
            };
            timeout(Duration::from_secs(10), found).await.expect("a log line in time");
            forwarding.abort();
        }
    });
}

struct Lines(tokio::sync::mpsc::UnboundedSender<String>);

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.send(String::from_utf8_lossy(line).into_owned()).map_err(io::Error::other)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Connects to the service from a process in the cgroup.
#[track_caller]
fn connect_from_cgroup(cgroup: &Path, service: SocketAddr) {
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec 3<>/dev/tcp/{}/{}",
        cgroup.display(),
        service.ip(),
        service.port()
    );
    let status = std::process::Command::new("bash").args(["-c", &script]).status().unwrap();
    assert!(status.success(), "connect to {service}");
}
