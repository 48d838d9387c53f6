//! `sessionAffinity: ClientIP`: a client keeps its backend, whichever frontend of the service it
//! uses.

use dataplane_common::{
    abi::{Addr, Affinity, AffinityKey, Service},
    hash,
};

use crate::{
    helpers::{opaque, time},
    maps,
};

/// Steps of the binary search that leave one slot of the largest range.
const SEARCH_STEPS: u32 = 18;

/// Returns the slot of the client's last backend, if the service still has it and the timeout since
/// the client's last connection has not expired. Otherwise selects the slot at `hash` and remembers
/// it. The service must have a backend.
#[inline(always)]
pub(crate) fn select_slot(service: &Service, client: &Addr, hash: u32) -> u32 {
    let key = AffinityKey { service_id: service.id, client: *client };
    let now = time::now();
    if let Some(last) = maps::affinity(&key)
        // saturating, because the clock of another CPU may be a second ahead
        && now.saturating_sub(last.last_used) < service.affinity_timeout
        && let Some(slot) = find(service, last.backend_id)
    {
        if last.last_used != now {
            maps::store_affinity(&key, Affinity { last_used: now, ..last });
        }
        return slot;
    }
    let slot = service.first_slot + hash::scale(hash, service.count);
    if let Some(backend) = maps::backend(slot) {
        maps::store_affinity(&key, Affinity { backend_id: backend.id, last_used: now });
    }
    slot
}

/// The slot of a backend in the service's range, which is sorted by backend number.
///
/// A branchless binary search: otherwise a verifier that cannot merge the states of the search
/// would follow every combination of turns (Linux 6.1 gives up). Each step halves the range; steps
/// on a single slot change nothing.
#[inline(always)]
fn find(service: &Service, backend_id: u32) -> Option<u32> {
    let (mut base, mut left) = (0, u64::from(service.count));
    for _ in 0..SEARCH_STEPS {
        let half = left >> 1;
        // the last slot of the first half, or the first slot if that half is empty
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

// `opaque`, or the compiler turns the arithmetic below into comparisons, which in BPF are branches

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
