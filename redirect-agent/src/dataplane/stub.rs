//! A pod's own `sk_lookup` program, which says which pod it is and calls the program that all pods share.
//!
//! Nothing in a packet decides whose listeners it may reach: the kernel runs the program that is attached to
//! the network namespace, and that program has the namespace's pod as a constant. It never changes. An
//! upgrade replaces the shared program in the map `programs`, for all pods at once. While that map is empty,
//! every connection is refused.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use redirect_ebpf::abi::PodId;

use super::sys::{self, Insn};

/// The program's name.
pub(super) const NAME: &[u8] = b"redirect_pod";
/// The only slot of the map `programs`.
pub const SHARED: u32 = 0;

/// Loads the program of a pod. `this_pod` and `programs` are the maps of these names.
///
/// # Errors
///
/// Those of bpf(2), `BPF_PROG_LOAD`.
pub fn load(
    pod_id: PodId,
    this_pod: BorrowedFd<'_>,
    programs: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    sys::load_lookup(NAME, &code(pod_id, this_pod, programs))
}

/// As in C: `this = map_lookup(this_pod, &0); if (!this) return SK_DROP; this->context = ctx;
/// this->pod_id = POD_ID; tail_call(ctx, programs, SHARED); return SK_DROP;`
fn code(pod_id: PodId, this_pod: BorrowedFd<'_>, programs: BorrowedFd<'_>) -> [Insn; 18] {
    const MAP_LOOKUP: u32 = 1;
    const TAIL_CALL: u32 = 12;
    const SK_DROP: u32 = 0;
    let [this_pod_lo, this_pod_hi] = map(1, this_pod);
    let [programs_lo, programs_hi] = map(2, programs);
    [
        copy(6, 1),
        // The key, 0, at the top of the stack.
        insn(0x62, 10, 0, -4, 0),
        copy(2, 10),
        insn(0x07, 2, 0, 0, (-4_i32).cast_unsigned()),
        this_pod_lo,
        this_pod_hi,
        call(MAP_LOOKUP),
        // NULL: jump to the end.
        insn(0x15, 0, 0, 8, 0),
        // See `abi::ThisPod`.
        insn(0x7b, 0, 6, 0, 0),
        insn(0xb4, 1, 0, 0, pod_id),
        insn(0x63, 0, 1, 8, 0),
        copy(1, 6),
        programs_lo,
        programs_hi,
        insn(0xb4, 3, 0, 0, SHARED),
        call(TAIL_CALL),
        insn(0xb7, 0, 0, 0, SK_DROP),
        insn(0x95, 0, 0, 0, 0),
    ]
}

/// Source: Linux `include/uapi/linux/bpf.h`, `struct bpf_insn`.
fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: u32) -> Insn {
    let [o0, o1] = offset.to_ne_bytes();
    let [i0, i1, i2, i3] = immediate.to_ne_bytes();
    [code, src << 4 | dst, o0, o1, i0, i1, i2, i3]
}

fn copy(dst: u8, src: u8) -> Insn {
    insn(0xbf, dst, src, 0, 0)
}

fn call(helper: u32) -> Insn {
    insn(0x85, 0, 0, 0, helper)
}

/// A map as a 64-bit constant, which takes two instructions.
fn map(dst: u8, map: BorrowedFd<'_>) -> [Insn; 2] {
    const PSEUDO_MAP_FD: u8 = 1;
    let fd = map.as_raw_fd().cast_unsigned();
    [insn(0x18, dst, PSEUDO_MAP_FD, 0, fd), insn(0, 0, 0, 0, 0)]
}
