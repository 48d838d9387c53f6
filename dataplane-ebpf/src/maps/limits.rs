//! Limits in time: refusals, and checks of neighbours. None of these maps is pinned.

use aya_ebpf::{
    bindings::BPF_ANY,
    btf_maps::{Array, LruHashMap},
    macros::btf_map,
};
use dataplane_common::{abi::Addr, budget::Budget, hash};

use crate::helpers::time;

/// When XDP last left a packet to tc for the sake of a neighbour, by hash of its address: 32 bits
/// of the hash, 32 of seconds. Written by the datapath, not pinned.
#[btf_map]
static NEIGHBOUR_CHECKS: Array<u64, { NEIGHBOUR_CHECK_SLOTS as usize }> = Array::new();

/// When the next refusal to a client outside would be in time at one a second: nanoseconds of
/// `CLOCK_MONOTONIC`. Written by the datapath, not pinned.
#[btf_map]
static REFUSAL_CLIENTS: LruHashMap<Addr, u64, 1_024> = LruHashMap::new();

/// As `REFUSAL_CLIENTS`, of all refusals: to pods, and to others. Not pinned.
#[btf_map]
static REFUSAL_TOTALS: Array<u64, 2> = Array::new();

/// Slots of [`NEIGHBOUR_CHECKS`].
const NEIGHBOUR_CHECK_SLOTS: u32 = 256;
/// Refusals to one client outside: the kernel's `icmp_ratelimit` and its burst
/// (`net/ipv4/inetpeer.c`, `inet_peer_xrlim_allow`).
const CLIENT_REFUSALS: Budget = Budget::per_second(1, 6);
/// Refusals of the node: the kernel's `icmp_msgs_per_sec` and `icmp_msgs_burst`.
const NODE_REFUSALS: Budget = Budget::per_second(1_000, 50);

/// Whether the neighbour has not been checked in this second. Then it counts as checked.
#[inline(always)]
pub(crate) fn is_neighbour_check_due(neighbour: &Addr) -> bool {
    let hash = hash::client(*neighbour);
    let Some(last) = NEIGHBOUR_CHECKS.get_ptr_mut(hash % NEIGHBOUR_CHECK_SLOTS) else { return true };
    let now = u64::from(hash) << 32 | u64::from(time::now());
    // SAFETY: array values live as long as the map. CPUs may race: then more than one packet is
    // left to tc.
    unsafe {
        let is_due = last.read_volatile() != now;
        if is_due {
            last.write_volatile(now);
        }
        is_due
    }
}

/// Whether one more refusal to a client outside is within its budget.
#[inline(always)]
pub(crate) fn spend_client_refusal(client: &Addr, now: u64) -> bool {
    // SAFETY: copied at once.
    let due = unsafe { REFUSAL_CLIENTS.get(client) }.copied().unwrap_or(0);
    let Some(next) = CLIENT_REFUSALS.spend(due, now) else { return false };
    // on failure the client gets one refusal more
    let _best_effort = REFUSAL_CLIENTS.insert(client, next, BPF_ANY.into());
    true
}

/// Whether one more refusal, to a pod or to another client, is within the budget of the node.
#[inline(always)]
pub(crate) fn spend_refusal(to_pod: bool, now: u64) -> bool {
    let Some(due) = REFUSAL_TOTALS.get_ptr_mut(u32::from(!to_pod)) else { return false };
    // SAFETY: array values live as long as the map. CPUs may race: then one refusal is not counted.
    unsafe {
        let Some(next) = NODE_REFUSALS.spend(due.read_volatile(), now) else { return false };
        due.write_volatile(next);
    }
    true
}
