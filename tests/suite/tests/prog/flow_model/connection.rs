//! What a middle box knows of a connection from its packets, and how long it remembers it: from the
//! RFCs and the decision records, not from `dataplane_common::flow`.

use dataplane_common::{abi::Addr, flow::State};
use std::net::SocketAddr;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;

/// The tuple of a packet as it travels at some place. Of an echo, both ports are the identifier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tuple {
    pub(crate) protocol: u8,
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
}

impl Tuple {
    #[must_use]
    pub(crate) fn reversed(self) -> Self {
        Self { protocol: self.protocol, src: self.dst, dst: self.src }
    }

    pub(crate) fn of_key(key: &dataplane_common::abi::FlowKey) -> Self {
        let end = |ip: Addr, port: dataplane_common::abi::Port| SocketAddr::new(ip.to_ip(), port.get());
        Self { protocol: key.protocol, src: end(key.src, key.src_port), dst: end(key.dst, key.dst_port) }
    }
}

impl std::fmt::Debug for Tuple {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {} > {}", self.protocol, self.src, self.dst)
    }
}

/// What a packet says about its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// SYN, INIT.
    Open,
    /// SYN-ACK, INIT ACK.
    OpenAnswer,
    /// An acknowledgement, with or without data; any packet of a protocol without connections.
    Data,
    /// FIN with ACK, SHUTDOWN, SHUTDOWN ACK.
    End,
    /// RST, ABORT, SHUTDOWN COMPLETE.
    Reset,
    /// A TCP segment without SYN, ACK and RST, with or without FIN. Its receiver drops it (RFC 9293
    /// §3.10.7), but the datapath follows neither that nor sequence numbers.
    Void,
    VoidEnd,
    EchoRequest,
    EchoReply,
}

/// Who sent a packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client = 0,
    Server = 1,
}

/// What is known of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    protocol: u8,
    /// The server has sent a packet.
    answered: bool,
    /// The client has sent a packet since: it received the answer, so its address is not forged.
    confirmed: bool,
    /// Who has sent a FIN.
    ended: [bool; 2],
    /// After an RST: who has sent something since.
    reset: Option<[bool; 2]>,
}

impl Connection {
    /// After the client's first packet, whatever it says.
    pub(crate) fn new(protocol: u8) -> Self {
        Self { protocol, answered: false, confirmed: false, ended: [false; 2], reset: None }
    }

    pub(crate) fn on_packet(&mut self, side: Side, sign: Sign) {
        let other = 1 - side as usize;
        if self.ended == [true; 2] {
            return;
        }
        if sign == Sign::Reset {
            self.ended = [false; 2];
            self.reset = Some([false; 2]);
            return;
        }
        let opens = matches!(sign, Sign::Open | Sign::OpenAnswer);
        if let Some(received) = &mut self.reset {
            if opens {
                return;
            }
            // RFC 5961: the RST was not accepted, if both sides send more. Of a connection that was
            // never confirmed, the client may be forged; only the server's packets count
            if self.confirmed {
                received[side as usize] = true;
                if !received[other] {
                    return;
                }
            } else if side == Side::Client {
                return;
            }
            self.reset = None;
            self.answered = true;
        }
        if matches!(sign, Sign::End | Sign::VoidEnd) {
            // as in nf_conntrack, a FIN of the client before any answer is none
            self.answered |= side == Side::Server;
            self.ended[side as usize] |= self.answered;
            // a server ends no connection that it has not seen established
            self.confirmed |= self.answered;
        } else if self.ended == [false; 2] {
            match side {
                Side::Server => self.answered = true,
                Side::Client => self.confirmed |= self.answered && !opens,
            }
        }
    }

    /// Direct server return: the server's packets are not seen. An acknowledgement shows that there
    /// was one, and the client's FIN counts for both.
    pub(crate) fn on_direct_packet(&mut self, sign: Sign) {
        if self.protocol != UDP && matches!(sign, Sign::Data | Sign::End) {
            self.on_packet(Side::Server, Sign::Data);
        }
        if matches!(sign, Sign::End | Sign::VoidEnd) {
            self.on_packet(Side::Server, Sign::End);
        }
        self.on_packet(Side::Client, sign);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.reset.is_some() || self.ended == [true; 2]
    }

    /// Whether a side has closed the connection.
    pub(crate) fn is_ending(&self) -> bool {
        self.is_closed() || self.ended != [false; 2]
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.answered && !self.is_established() && !self.is_ending()
    }

    pub(crate) fn is_established(&self) -> bool {
        self.confirmed && !self.is_ending()
    }

    pub(crate) fn is_half_open(&self) -> bool {
        !self.answered && !self.is_ending()
    }

    /// Seconds of silence after which it counts as ended.
    fn timeout(&self) -> u32 {
        match self.protocol {
            _ if self.is_closed() => 30,
            TCP if self.is_ending() => 3_600,
            TCP if self.confirmed => 8_000,
            TCP => 60,
            UDP if self.answered => 180,
            SCTP if self.is_established() => 210,
            _ => 30,
        }
    }

    pub(crate) fn is_expired(&self, idle: u32) -> bool {
        idle > self.timeout()
    }

    /// Whether it is as if it did not exist. An established TCP connection may be silent for days.
    pub(crate) fn is_absent(&self, idle: u32) -> bool {
        self.is_expired(idle) && !(self.protocol == TCP && self.is_established())
    }

    pub(crate) fn class(&self, idle: u32, from_outside: bool) -> Class {
        let is_idle = match self.protocol {
            _ if self.is_closed() => idle >= 5,
            _ if self.is_ending() => idle >= 120,
            TCP | SCTP => self.is_expired(idle),
            _ => idle >= 120,
        };
        if self.is_absent(idle) {
            Class::Free
        } else if !self.confirmed && from_outside {
            Class::Outside
        } else if is_idle && (self.confirmed || self.is_ending()) {
            Class::Idle
        } else if !self.confirmed {
            Class::Inside
        } else {
            Class::Kept
        }
    }

    /// The state that the datapath writes for it.
    pub(crate) fn state(&self) -> State {
        match (self.reset, self.ended) {
            (Some(_), _) if !self.confirmed => State::Refused,
            (Some([client, server]), _) => match (client, server) {
                (false, false) => State::Reset,
                (true, _) => State::ResetForward,
                (_, true) => State::ResetReply,
            },
            (None, [true, true]) => State::Closing,
            (None, [true, false]) => State::EndedForward,
            (None, [false, true]) => State::EndedReply,
            (None, [false, false]) if self.confirmed => State::Established,
            _ if self.answered => State::Answered,
            _ => State::HalfOpen,
        }
    }
}

/// How readily a slot is given to a new flow: decision record 0010.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Free,
    /// Unconfirmed, from outside.
    Outside,
    Idle,
    /// Unconfirmed, from this node.
    Inside,
    Kept,
}
