//! System calls that no library wraps. For links, bpf(2): open a pinned link as a file descriptor, replace a
//! link's program in place, detach a link at once. Also the socket options that are the interface of
//! `iptables-legacy`.
#![expect(unsafe_code, reason = "they take structs by address")]

use std::{
    ffi::CString,
    io,
    mem::{self, size_of},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{BPF_F_BEFORE, bpf_attach_type, bpf_attr, bpf_cmd, bpf_prog_type};

/// One instruction, as the kernel takes it.
pub(super) type Insn = [u8; 8];

/// Opens the object pinned at `path`.
///
/// # Errors
///
/// Those of bpf(2), `BPF_OBJ_GET`: `NotFound` when nothing is pinned there.
pub(super) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    let fd = bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins an object at `path`.
///
/// # Errors
///
/// Those of bpf(2), `BPF_OBJ_PIN`.
pub(super) fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = object.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Loads an `sk_lookup` program that does not come from an object file.
///
/// # Errors
///
/// Those of bpf(2), `BPF_PROG_LOAD`.
pub(super) fn load_lookup(name: &[u8], code: &[Insn]) -> io::Result<OwnedFd> {
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    // SAFETY: it is the member for this command, zeroed.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP as u32;
    load.expected_attach_type = bpf_attach_type::BPF_SK_LOOKUP as u32;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = u32::try_from(code.len()).map_err(io::Error::other)?;
    load.license = c"Dual BSD/GPL".as_ptr() as u64;
    for (to, from) in load.prog_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let fd = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches an `sk_lookup` program to a network namespace.
///
/// # Errors
///
/// Those of bpf(2), `BPF_LINK_CREATE`.
pub(super) fn link_lookup(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    attr.link_create.__bindgen_anon_2.target_fd = netns.as_raw_fd() as u32;
    attr.link_create.attach_type = bpf_attach_type::BPF_SK_LOOKUP as u32;
    let fd = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The ids of the `sk_lookup` programs of a network namespace.
///
/// # Errors
///
/// Those of bpf(2), `BPF_PROG_QUERY`.
pub(super) fn lookups(netns: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    // Source: Linux `kernel/bpf/net_namespace.c`, `netns_bpf_max_progs`.
    let mut programs = [0u32; 64];
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.query.__bindgen_anon_1.target_fd = netns.as_raw_fd() as u32;
    attr.query.attach_type = bpf_attach_type::BPF_SK_LOOKUP as u32;
    attr.query.prog_ids = programs.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.count = programs.len() as u32;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: it is the member for this command, which the kernel has written.
    let count = unsafe { attr.query.__bindgen_anon_2.count } as usize;
    Ok(programs.into_iter().take(count).collect())
}

/// Attaches a tcx program to an interface of the calling thread's network namespace, before all others.
///
/// # Errors
///
/// Those of bpf(2), `BPF_LINK_CREATE`.
pub(super) fn link_tcx(
    program: BorrowedFd<'_>,
    interface: u32,
    at: bpf_attach_type,
) -> io::Result<OwnedFd> {
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    attr.link_create.__bindgen_anon_2.target_ifindex = interface;
    attr.link_create.attach_type = at as u32;
    attr.link_create.flags = BPF_F_BEFORE;
    let fd = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The ids of the tcx links of an interface of the calling thread's network namespace, in the order in which
/// their programs run; 0 for a program without a link.
///
/// # Errors
///
/// Those of bpf(2), `BPF_PROG_QUERY`: there is no such interface, or it has more programs than the kernel
/// allows.
pub(super) fn tcx_links(interface: u32, at: bpf_attach_type) -> io::Result<Vec<u32>> {
    // Source: Linux `include/linux/bpf_mprog.h`, `BPF_MPROG_MAX`.
    let (mut programs, mut links) = ([0u32; 64], [0u32; 64]);
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.query.__bindgen_anon_1.target_ifindex = interface;
    attr.query.attach_type = at as u32;
    attr.query.prog_ids = programs.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.count = programs.len() as u32;
    attr.query.link_ids = links.as_mut_ptr() as u64;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: it is the member for this command, which the kernel has written.
    let count = unsafe { attr.query.__bindgen_anon_2.count } as usize;
    Ok(links.into_iter().take(count).collect())
}

/// Replaces the program of `link` atomically: at no moment does none run.
///
/// # Errors
///
/// Those of bpf(2), `BPF_LINK_UPDATE`.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.link_update.link_fd = link.as_raw_fd() as u32;
    attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches `link` before it returns. Removing its last pin would detach it some time later.
///
/// # Errors
///
/// Those of bpf(2), `BPF_LINK_DETACH`.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all zeros is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { mem::zeroed() };
    attr.link_detach.link_fd = link.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Returns freed memory, which the allocator keeps, to the kernel.
pub(super) fn release_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is a valid union of that size; what it points to outlives the call.
    let ret = unsafe {
        libc::syscall(libc::SYS_bpf, cmd as i32, std::ptr::from_mut(attr), size_of::<bpf_attr>())
    };
    match ret {
        ret if ret >= 0 => i32::try_from(ret).map_err(io::Error::other),
        _ => Err(io::Error::last_os_error()),
    }
}
