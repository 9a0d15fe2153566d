//! The calls of bpf(2) on links that no library wraps: opening a pinned link for its file
//! descriptor, replacing the program of any link in place, and detaching it at once.
#![expect(unsafe_code, reason = "bpf(2) takes a union by address")]

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

use aya_obj::generated::{bpf_attr, bpf_cmd};

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

/// Replaces the program of `link`, without a moment in which none runs.
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

/// Detaches `link` before it returns; removing its last pin would do so some time later.
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
