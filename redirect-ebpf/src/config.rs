//! Values that the agent fixes when it loads the programs. The verifier knows them, so code that they disable
//! costs nothing.

use core::ptr;

/// How long a pod's SYNs are dropped, before they are refused, when its proxy stops listening; ns.
#[unsafe(no_mangle)]
static PROXY_GRACE_NS: u64 = 3_000_000_000;

/// Offsets of what the programs read from a socket or a packet, from the kernel's BTF.
#[unsafe(no_mangle)]
pub static KERNEL_OFFSETS: KernelOffsets = KernelOffsets {
    family: 0,
    state: 0,
    local_port: 0,
    remote_port: 0,
    local_v4: 0,
    remote_v4: 0,
    local_v6: 0,
    remote_v6: 0,
    net: 0,
    net_inode: 0,
    packet_device: 0,
    device_net: 0,
    socket_cgroup: 0,
    cgroup_node: 0,
    node_id: 0,
    snd_una: 0,
    bytes_acked: 0,
    snt_isn: 0,
    ir_mark: 0,
};

pub use redirect_ebpf::abi::KernelOffsets;

pub fn proxy_grace_ns() -> u64 {
    // SAFETY: reads a static.
    unsafe { ptr::read_volatile(&raw const PROXY_GRACE_NS) }
}

/// One of [`KERNEL_OFFSETS`].
macro_rules! offset {
    ($field:ident) => {
        // SAFETY: reads a static.
        unsafe { core::ptr::read_volatile(&raw const $crate::config::KERNEL_OFFSETS.$field) }
    };
}
pub(crate) use offset;
