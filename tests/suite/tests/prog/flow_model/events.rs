//! What happens to the node: packets of clients and servers, time, changes of services.

use std::net::SocketAddr;

use dataplane_testkit::prog::{Family, World, at};
use proptest::{
    prelude::*,
    sample::{Index, select},
};

use super::{
    connection::{SCTP, Sign, TCP, UDP},
    services::{LOCAL_PORT, NODE_PORT, direct_ip},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Pod,
    OtherPod,
    Outside,
}

/// A socket of a client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client {
    pub(crate) family: Family,
    pub(crate) host: Host,
    /// Or its identifier.
    pub(crate) port: u16,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    ClusterIp(u16),
    NodePort(u16),
    DirectReturn,
    RemotePod,
    Pod,
    OtherPod,
    Outside(u16),
    Host,
}

/// How far the connections of a flood go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Depth {
    Opened,
    Answered,
    Confirmed,
    Closed,
}

/// `at_driver`: a packet from another machine passes XDP first.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Send {
        from: Client,
        to: Target,
        protocol: u8,
        sign: Sign,
        at_driver: bool,
    },
    /// A handshake, or an exchange.
    Connect {
        from: Client,
        to: Target,
        protocol: u8,
        depth: Depth,
        at_driver: bool,
    },
    /// Another packet of a client that has sent one.
    More {
        client: Index,
        sign: Sign,
        at_driver: bool,
    },
    /// A packet from where an earlier one went; `other_port`: not quite.
    Answer {
        peer: Index,
        sign: Sign,
        at_driver: bool,
        other_port: bool,
    },
    /// "Packet too big" about a packet that left; `from_end`: from the machine it went to.
    Error {
        peer: Index,
        from_end: bool,
    },
    /// A packet that left, once more, at a hook where its sender is not.
    Misdirected {
        peer: Index,
    },
    Wait {
        seconds: u32,
    },
    /// A backend of a service that the client has addressed is removed, or becomes ready.
    ToggleBackend {
        client: Index,
        backend: Index,
    },
    EgressByStack {
        enabled: bool,
    },
    Flood {
        from: Client,
        to: Target,
        protocol: u8,
        depth: Depth,
        count: u8,
    },
}

impl Client {
    pub(crate) fn addr(self) -> SocketAddr {
        let world = World::new(self.family);
        let ip = match self.host {
            Host::Pod => world.pod,
            Host::OtherPod => world.other_pod,
            Host::Outside => world.outside,
        };
        at(ip, self.port)
    }
}

impl Target {
    pub(crate) fn addr(self, family: Family) -> SocketAddr {
        let world = World::new(family);
        match self {
            Self::ClusterIp(port) => at(world.service.ip(), port),
            Self::NodePort(port) => at(world.host, port),
            Self::DirectReturn => at(direct_ip(family), 80),
            Self::RemotePod => at(world.wire_pod, 8_080),
            Self::Pod => at(world.pod, 8_080),
            Self::OtherPod => at(world.other_pod, 8_080),
            Self::Outside(port) => at(world.outside, port),
            Self::Host => at(world.host, 22),
        }
    }
}

fn client() -> impl Strategy<Value = Client> {
    let port = prop_oneof![8 => 40_000_u16..40_002, 1 => Just(8_080), 1 => Just(443)];
    (select(&Family::BOTH), select(&[Host::Pod, Host::OtherPod, Host::Outside]), port)
        .prop_map(|(family, host, port)| Client { family, host, port })
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        6 => select(&[80, 81, 83, 99]).prop_map(Target::ClusterIp),
        4 => select(&[NODE_PORT, LOCAL_PORT]).prop_map(Target::NodePort),
        3 => Just(Target::DirectReturn),
        2 => Just(Target::RemotePod),
        3 => select(&[Target::Pod, Target::OtherPod]),
        4 => select(&[443, 444]).prop_map(Target::Outside),
        1 => Just(Target::Host),
    ]
}

fn protocol() -> impl Strategy<Value = u8> {
    // 1: echo, of either family
    prop_oneof![5 => Just(TCP), 4 => Just(UDP), 1 => Just(SCTP), 2 => Just(1)]
}

fn sign() -> impl Strategy<Value = Sign> {
    prop_oneof![
        4 => Just(Sign::Open),
        3 => Just(Sign::OpenAnswer),
        8 => Just(Sign::Data),
        4 => Just(Sign::End),
        2 => Just(Sign::Reset),
        1 => Just(Sign::Void),
        1 => Just(Sign::VoidEnd),
    ]
}

fn depth() -> impl Strategy<Value = Depth> {
    select(&[Depth::Opened, Depth::Answered, Depth::Confirmed, Depth::Closed])
}

/// Often to a timeout, or a second before or behind it.
fn seconds() -> impl Strategy<Value = u32> {
    let timeout = prop_oneof![
        6 => select(&[1, 2, 5, 10, 30]),
        6 => select(&[60, 120, 180, 210]),
        1 => select(&[3_600, 8_000]),
    ];
    prop_oneof![
        6 => (timeout, 0_u32..3).prop_map(|(timeout, more)| timeout + more - 1),
        2 => 1_u32..12,
        1 => 1_u32..10_000,
    ]
}

pub(crate) fn event() -> impl Strategy<Value = Event> {
    let way = (client(), target(), protocol());
    let flood = (client(), target(), protocol(), depth(), 1_u8..100);
    prop_oneof![
        12 => (client(), target(), protocol(), sign(), any::<bool>()).prop_map(
            |(from, to, protocol, sign, at_driver)| Event::Send { from, to, protocol, sign, at_driver }),
        10 => (way, depth(), any::<bool>()).prop_map(
            |((from, to, protocol), depth, at_driver)| Event::Connect { from, to, protocol, depth, at_driver }),
        24 => (any::<Index>(), sign(), any::<bool>()).prop_map(
            |(client, sign, at_driver)| Event::More { client, sign, at_driver }),
        28 => (any::<Index>(), sign(), any::<bool>(), prop::bool::weighted(0.06)).prop_map(
            |(peer, sign, at_driver, other_port)| Event::Answer { peer, sign, at_driver, other_port }),
        5 => (any::<Index>(), any::<bool>()).prop_map(|(peer, from_end)| Event::Error { peer, from_end }),
        2 => any::<Index>().prop_map(|peer| Event::Misdirected { peer }),
        12 => seconds().prop_map(|seconds| Event::Wait { seconds }),
        5 => (any::<Index>(), any::<Index>())
            .prop_map(|(client, backend)| Event::ToggleBackend { client, backend }),
        2 => any::<bool>().prop_map(|enabled| Event::EgressByStack { enabled }),
        3 => flood.prop_map(
            |(from, to, protocol, depth, count)| Event::Flood { from, to, protocol, depth, count }),
    ]
}
