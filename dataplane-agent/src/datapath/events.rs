//! `EVENTS`: reads the datapath's packet events and forwards them to subscribers.
//!
//! The agent is the only reader of the ring buffer. A subscriber that is too slow loses the oldest
//! events. The ring is drained even without subscribers, so that it holds the newest events.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
};

use aya::maps::{MapData, RingBuf};
use dataplane_common::{
    abi::{Event, names::map},
    reason::{HookId, Outcome},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::broadcast,
    task::JoinHandle,
};

use super::{
    maps::{OpenError, open},
    pins::Pins,
};

/// Number of events a subscriber may lag behind.
const BACKLOG: usize = 4_096;

/// Why events cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("poll the ring buffer EVENTS: {0}")]
    Watch(#[from] io::Error),
}

/// What the datapath did with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketEvent {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub timestamp: u64,
    pub hook: HookId,
    pub outcome: Outcome,
    /// `::` if the packet could not be parsed.
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Device the program was attached to; 0 for socket hooks.
    pub ifindex: u32,
    /// Bytes.
    pub length: u32,
}

/// The reader of the ring buffer, until it is dropped.
#[derive(Debug)]
pub struct Events {
    sender: broadcast::Sender<PacketEvent>,
    task: JoinHandle<()>,
}

impl Events {
    /// Starts reading on the current runtime.
    pub fn start(pins: &Pins) -> Result<Self, EventsError> {
        let (ring, _): (RingBuf<MapData>, _) = open(pins, map::EVENTS)?;
        let mut ring = async_fd(ring)?;
        let (sender, _) = broadcast::channel(BACKLOG);
        let subscribers = sender.clone();
        let task = tokio::spawn(async move {
            while let Ok(mut guard) = ring.readable_mut().await {
                while let Some(record) = guard.get_inner_mut().next() {
                    if let Some(event) = Event::from_bytes(&record).and_then(|event| read(&event)) {
                        // fails without subscribers
                        let _no_subscribers = subscribers.send(event);
                    }
                }
                guard.clear_ready();
            }
        });
        Ok(Self { sender, task })
    }

    /// Subscribes to future events.
    pub fn subscribe(&self) -> broadcast::Receiver<PacketEvent> {
        self.sender.subscribe()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Registers a ring buffer with the runtime.
pub(super) fn async_fd<T: AsFd + AsRawFd>(ring: T) -> io::Result<AsyncFd<T>> {
    #[expect(
        deprecated,
        reason = "tokio's replacement is unsafe, which this crate forbids; its condition, that the object keeps the same \
                  descriptor open while it lives, holds for rings, which own theirs"
    )]
    AsyncFd::with_interest(ring, Interest::READABLE)
}

/// `None` for an unknown hook or outcome: an event of a newer program in an adopted ring.
fn read(event: &Event) -> Option<PacketEvent> {
    Some(PacketEvent {
        timestamp: event.timestamp,
        hook: HookId::from_number(event.hook)?,
        outcome: Outcome::from_number(event.outcome)?,
        source: event.tuple.src.to_ip(),
        source_port: event.tuple.src_port.get(),
        destination: event.tuple.dst.to_ip(),
        destination_port: event.tuple.dst_port.get(),
        protocol: event.tuple.protocol,
        ifindex: event.ifindex,
        length: event.length,
    })
}

#[cfg(test)]
mod tests {
    use dataplane_common::{
        abi::{FlowKey, Port},
        reason::DropReason,
    };

    use super::*;

    #[test]
    fn event_is_decoded_to_host_byte_order() {
        let source: IpAddr = "10.0.0.1".parse().unwrap();
        let destination: IpAddr = "fd00::1".parse().unwrap();
        let event = Event {
            tuple: FlowKey::new(6, source.into(), Port::new(1_234), destination.into(), Port::new(80)),
            hook: HookId::FromWire.number(),
            outcome: DropReason::NoBackend.number(),
            ..Event::default()
        };
        let read = read(&event).unwrap();
        assert_eq!((read.source, read.source_port), (source, 1_234));
        assert_eq!((read.destination, read.destination_port), (destination, 80));
        assert_eq!(read.outcome, Outcome::Dropped(DropReason::NoBackend));
    }

    #[test]
    fn event_of_a_newer_program_is_skipped() {
        assert_eq!(read(&Event { outcome: 255, ..Event::default() }), None);
    }
}
