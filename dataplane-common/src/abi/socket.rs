//! `CONNECTED_ORIGINS`, `DATAGRAM_ORIGINS`, `CONNECTED_PEERS`: what a socket thinks it talks to, after connect-time translation.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Value of `CONNECTED_ORIGINS` (socket storage: dies with the socket) and of `DATAGRAM_ORIGINS`.
    pub struct SocketOrigin: 40 {
        /// Frontend the application named.
        pub frontend: Addr,
        /// Backend it got.
        pub backend: Addr,
        /// Port of the frontend.
        pub frontend_port: Port,
        /// Port of the backend.
        pub backend_port: Port,
        /// Must be 0.
        pub reserved: u32,
    }

    /// Value of `CONNECTED_PEERS`, whose key is `bpf_get_socket_cookie`: the backend of a connected UDP socket.
    pub struct ConnectedPeer: 32 {
        /// Backend it got.
        pub backend: Addr,
        /// `bpf_get_netns_cookie`: where the socket is to be looked for.
        pub netns: u64,
        /// Port of the backend.
        pub port: Port,
        /// Must be 0.
        pub reserved: [u8; 6],
    }

    /// Key of `DATAGRAM_ORIGINS` (LRU): one peer of an unconnected UDP socket.
    pub struct OriginKey: 32 {
        /// `bpf_get_socket_cookie`.
        pub cookie: u64,
        /// Backend the datagrams went to.
        pub backend: Addr,
        /// Its port.
        pub port: Port,
        /// Must be 0.
        pub reserved: [u8; 6],
    }
}
