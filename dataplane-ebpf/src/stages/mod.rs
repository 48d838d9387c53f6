//! What a hook is made of. Each stage does one thing to a packet and may end its path with a named
//! reason.
//!
//! An `inline(never)` function is a BPF subprogram with a stack frame of its own (512 bytes for the
//! whole call chain). It returns one number, so that the verifier does not multiply the paths
//! through it with the paths after it.
//!
//! An `extern "C"` one is a [global function](crate::global): the verifier checks it once, for all
//! callers.

pub(crate) mod affinity;
pub(crate) mod egress;
pub(crate) mod flow;
pub(crate) mod icmp_error;
pub(crate) mod nat;
pub(crate) mod neighbour;
pub(crate) mod next_hop;
pub(crate) mod on_miss;
pub(crate) mod parse;
pub(crate) mod ping;
pub(crate) mod reject;
pub(crate) mod reorder;
pub(crate) mod rewrite;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod source;
