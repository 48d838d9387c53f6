//! `sessionAffinity: ClientIP`: a client keeps its backend, whatever path it takes to the service.

use dataplane_common::{
    abi::{Addr, Affinity, AffinityKey, Service},
    hash,
};

use crate::{maps, skb};

/// Halvings that leave one of as many slots as `BACKENDS` can have.
const HALVINGS: u32 = 20;

/// The slot of the backend the client had, as long as the service has it and the client was not away for longer than the
/// timeout (a connection begins it anew); else the slot `hash` falls on, remembered. The service has a backend.
#[inline(never)]
pub(crate) fn slot(service: &Service, client: &Addr, hash: u32) -> u32 {
    let key = AffinityKey { service_id: service.id, client: *client };
    let now = skb::now();
    if let Some(last) = maps::affinity(&key)
        && now.wrapping_sub(last.last_used) < service.affinity_timeout
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
#[inline(always)]
fn find(service: &Service, backend_id: u32) -> Option<u32> {
    let (mut low, mut high) = (0, service.count);
    for _ in 0..HALVINGS {
        if low >= high {
            return None;
        }
        let middle = low + (high - low) / 2;
        let slot = service.first_slot + middle;
        let id = maps::backend(slot)?.id;
        if id == backend_id {
            return Some(slot);
        }
        if id < backend_id {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    None
}
