//! Direct connections that have no socket yet.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_ktime_get_ns};
use redirect_ebpf::abi::{Connection, HALF_OPEN_CHOICES, HALF_OPEN_NS, HalfOpenKey, PodId};

use crate::maps::{HALF_OPEN, pod_entry};

/// Whether the capture of the pod began so recently that SYNs from before may still be answered.
#[inline(always)]
pub fn may_have(pod_id: PodId) -> bool {
    let Some(entry) = pod_entry(pod_id) else { return false };
    // SAFETY: the pointer is to a live map value; the helper has no arguments.
    let (began, now) = unsafe { ((*entry).captured_at_ns, bpf_ktime_get_ns()) };
    began != 0 && now.wrapping_sub(began) < HALF_OPEN_NS
}

/// Records a direct connection that has no socket yet. Without memory, it ends.
#[inline(never)]
pub fn enter(pod_id: PodId, connection: &Connection) {
    // If all places are taken, it takes one at random: most of the others have been open for long.
    let mut place = HalfOpenKey::new(pod_id, &connection.flow, connection.first_seq);
    for choice in 0..u32::from(HALF_OPEN_CHOICES) {
        let key = HalfOpenKey::new(pod_id, &connection.flow, choice);
        // SAFETY: the pointer is to a live map value; entries are replaced as a whole.
        if HALF_OPEN.get_ptr(&key).is_none_or(|known| unsafe { (*known).flow == connection.flow }) {
            place = key;
            break;
        }
    }
    let _full = HALF_OPEN.insert(&place, connection, u64::from(BPF_ANY));
}

/// Whether the connection that a socket has now was recorded before it had the socket.
#[inline(never)]
pub fn was(pod_id: PodId, connection: &Connection) -> bool {
    for choice in 0..u32::from(HALF_OPEN_CHOICES) {
        let known = HALF_OPEN.get_ptr(&HalfOpenKey::new(pod_id, &connection.flow, choice));
        // SAFETY: the pointer is to a live map value; entries are replaced as a whole.
        if known.is_some_and(|known| unsafe { *known == *connection }) {
            return true;
        }
    }
    false
}
