//! `sessionAffinity: ClientIP`: a client keeps its backend, whatever path it takes to the service.

use dataplane_common::{
    abi::{Addr, Affinity, AffinityKey, Service},
    hash,
};

use super::opaque;
use crate::{maps, skb};

/// Halvings that leave one slot of the largest range.
const HALVINGS: u32 = 18;

/// The slot of the backend the client had, as long as the service has it and the client was not away for longer than the
/// timeout (a connection begins it anew); else the slot `hash` falls on, remembered. The service has a backend.
#[inline(never)]
pub(crate) fn slot(service: &Service, client: &Addr, hash: u32) -> u32 {
    let key = AffinityKey { service_id: service.id, client: *client };
    let now = skb::now();
    if let Some(last) = maps::affinity(&key)
        // another processor may be a second ahead
        && now.saturating_sub(last.last_used) < service.affinity_timeout
        && let Some(slot) = find(service, last.backend_id)
    {
        if last.last_used != now {
            maps::remember_affinity(&key, Affinity { last_used: now, ..last });
        }
        return slot;
    }
    let slot = service.first_slot + hash::scale(hash, service.count);
    if let Some(backend) = maps::backend(slot) {
        maps::remember_affinity(&key, Affinity { backend_id: backend.id, last_used: now });
    }
    slot
}

/// The slot of a backend in the service's range, which is in the order of their numbers.
///
/// A binary search without a branch: a verifier that cannot tell two states of the search apart would else walk every
/// combination of its turns (Linux 6.1 gives up). Every round halves what is left, rounds on a single slot change nothing.
#[inline(always)]
fn find(service: &Service, backend_id: u32) -> Option<u32> {
    let (mut base, mut left) = (0, u64::from(service.count));
    for _ in 0..HALVINGS {
        let half = left >> 1;
        // the last slot of the first half; the first one of all, if that is empty
        let last = base + half - is_positive(half);
        let id = maps::backend(service.first_slot.wrapping_add(last as u32))?.id;
        base += half & is_less(id, backend_id).wrapping_neg();
        left -= half;
    }
    let slot = service.first_slot.wrapping_add(base as u32);
    let id = maps::backend(slot)?.id;
    base += is_less(id, backend_id);
    if base >= u64::from(service.count) {
        return None;
    }
    let slot = service.first_slot.wrapping_add(base as u32);
    (maps::backend(slot)?.id == backend_id).then_some(slot)
}

// the compiler would make a comparison of the arithmetic below, and BPF has no comparison but a branch

/// 1 if `one` is less than `other`, else 0.
#[inline(always)]
fn is_less(one: u32, other: u32) -> u64 {
    opaque(u64::from(one).wrapping_sub(u64::from(other))) >> 63
}

/// 1 if `number`, of at most 32 bits, is not 0.
#[inline(always)]
fn is_positive(number: u64) -> u64 {
    opaque(number + 0xffff_ffff) >> 32
}
