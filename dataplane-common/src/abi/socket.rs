//! `CONNECTED_ORIGINS`, `DATAGRAM_ORIGINS`, `CONNECTED_PEERS`: frontend and backend of sockets
//! translated at `connect()` or `sendmsg()`.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Value of `CONNECTED_ORIGINS` (socket storage: freed with the socket) and of
    /// `DATAGRAM_ORIGINS`.
    pub struct SocketOrigin: 40 {
        /// Frontend that the application used.
        pub frontend: Addr,
        /// Selected backend.
        pub backend: Addr,
        /// Port of the frontend.
        pub frontend_port: Port,
        /// Port of the backend.
        pub backend_port: Port,
        /// [`Service::id`](super::Service::id) of the frontend.
        pub service_id: u32,
    }

    /// Value of `CONNECTED_PEERS`, whose key is `bpf_get_socket_cookie`: the backend of a connected
    /// UDP socket.
    pub struct ConnectedPeer: 32 {
        /// Selected backend.
        pub backend: Addr,
        /// `bpf_get_netns_cookie`: network namespace of the socket.
        pub netns: u64,
        /// Port of the backend.
        pub port: Port,
        /// Must be 0.
        pub reserved: u16,
        /// [`Service::id`](super::Service::id) of the frontend; 0 in entries of earlier programs.
        pub service_id: u32,
    }

    /// Key of `DATAGRAM_ORIGINS` (LRU): one peer of an unconnected UDP socket.
    pub struct OriginKey: 32 {
        /// `bpf_get_socket_cookie`.
        pub cookie: u64,
        /// Backend that datagrams were sent to.
        pub backend: Addr,
        /// Its port.
        pub port: Port,
        /// Must be 0.
        pub reserved: [u8; 6],
    }
}
