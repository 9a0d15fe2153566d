//! The calls of bpf(2) that the tests need and that aya does not wrap: running an `sk_lookup`
//! program, attaching one that is not from an object file, reading a program as the verifier left it,
//! loading a few instructions. And its clock.
#![expect(unsafe_code, reason = "system calls that take structs by address")]

use std::{
    io,
    mem::{self, size_of},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_prog_type};

/// One instruction, as the kernel takes it.
pub type Insn = [u8; 8];

/// What a program has done.
pub struct Ran {
    pub ret: u32,
    /// The packet; empty when the program takes none.
    pub packet: Vec<u8>,
    pub context: Vec<u8>,
}

/// Runs a program on a packet (none for `sk_lookup`) and a context, so often in a row: each run finds
/// what the one before has left, and the same socket.
pub fn run(program: BorrowedFd<'_>, packet: &[u8], context: &[u8], times: u32) -> io::Result<Ran> {
    let mut ran = Ran { ret: 0, packet: packet.to_vec(), context: context.to_vec() };
    let mut attr = zeroed();
    attr.test.prog_fd = program.as_raw_fd() as u32;
    attr.test.repeat = if packet.is_empty() { 0 } else { times };
    attr.test.ctx_in = context.as_ptr() as u64;
    attr.test.ctx_size_in = context.len() as u32;
    attr.test.ctx_out = ran.context.as_mut_ptr() as u64;
    attr.test.ctx_size_out = context.len() as u32;
    if !packet.is_empty() {
        attr.test.data_in = packet.as_ptr() as u64;
        attr.test.data_size_in = packet.len() as u32;
        attr.test.data_out = ran.packet.as_mut_ptr() as u64;
        attr.test.data_size_out = packet.len() as u32;
    }
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: the kernel has filled in this member.
    let (ret, size) = unsafe { (attr.test.retval, attr.test.data_size_out) };
    ran.ret = ret;
    ran.packet.truncate(size as usize);
    Ok(ran)
}

/// Loads a `tc` program.
pub fn load_tc(program: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    attr.__bindgen_anon_3.insns = program.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = program.len() as u32;
    attr.__bindgen_anon_3.license = c"GPL".as_ptr() as u64;
    let fd = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches an `sk_lookup` program to a network namespace, for as long as the link is held.
pub fn link_lookup(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    attr.link_create.__bindgen_anon_2.target_fd = netns.as_raw_fd() as u32;
    attr.link_create.attach_type = bpf_attach_type::BPF_SK_LOOKUP as u32;
    let fd = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The time that the programs go by: CLOCK_MONOTONIC, ns.
pub fn now() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing; the call cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn zeroed() -> bpf_attr {
    // SAFETY: all zeros is a valid `bpf_attr`.
    unsafe { mem::zeroed() }
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
