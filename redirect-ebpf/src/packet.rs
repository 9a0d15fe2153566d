//! Reads and rewrites packets; nothing else touches their bytes.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_hdr_start_off::BPF_HDR_START_NET,
    helpers::{bpf_l4_csum_replace, bpf_skb_load_bytes_relative, bpf_skb_store_bytes},
    programs::TcContext,
};
use redirect_ebpf::{abi::Addr, verdict::Segment};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPPROTO_TCP: u8 = 6;
/// MF and the fragment's offset, in the IPv4 header's flags field.
const IPV4_FRAGMENT: u16 = 0x3fff;
const TCP_RST: u8 = 0x04;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;
/// Length of the link header in front of what `lo` delivers: an Ethernet header of zeros.
const LO_HEADER: u32 = 14;

/// The network protocol of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Network {
    V4,
    V6,
    Other,
}

/// A parsed segment with where it lies in its packet.
pub struct Parsed {
    pub segment: Segment,
    pub network: Network,
    /// Offset of the TCP header from the network header.
    tcp_offset: u32,
    /// Bytes 4..14 of the TCP header: sequence, acknowledgement, data offset and flags.
    tcp: [u8; 10],
}

pub fn network(ctx: &TcContext) -> Network {
    match u16::from_be(ctx.skb.protocol() as u16) {
        ETH_P_IP => Network::V4,
        ETH_P_IPV6 => Network::V6,
        _ => Network::Other,
    }
}

/// The TCP segment in the packet; `None` for anything else, for fragments, and for IPv6 packets with
/// extension headers or mapped IPv4 addresses: those are left to `sk_lookup`, which sees them
/// reassembled.
#[inline(always)]
pub fn parse(ctx: &TcContext, network: Network) -> Option<Parsed> {
    let (src, dst, tcp_offset) = match network {
        Network::V4 => {
            let ip: [u8; 20] = load(ctx, 0)?;
            if ip[9] != IPPROTO_TCP || u16::from_be_bytes([ip[6], ip[7]]) & IPV4_FRAGMENT != 0 {
                return None;
            }
            let src = Addr::v4([ip[12], ip[13], ip[14], ip[15]]);
            let dst = Addr::v4([ip[16], ip[17], ip[18], ip[19]]);
            (src, dst, u32::from(ip[0] & 0xf) * 4)
        }
        Network::V6 => {
            let ip: [[u8; 8]; 5] = load(ctx, 0)?;
            if ip[0][6] != IPPROTO_TCP {
                return None;
            }
            let (src, dst) = (addr(ip[1], ip[2]), addr(ip[3], ip[4]));
            // The form that IPv4 addresses have in our maps names nobody in an IPv6 packet.
            if src.is_v4() || dst.is_v4() {
                return None;
            }
            (src, dst, 40)
        }
        Network::Other => return None,
    };
    let ports: [u8; 4] = load(ctx, tcp_offset)?;
    let tcp: [u8; 10] = load(ctx, tcp_offset + 4)?;
    let segment = Segment {
        src,
        dst,
        src_port: u16::from_be_bytes([ports[0], ports[1]]),
        dst_port: u16::from_be_bytes([ports[2], ports[3]]),
        opens: tcp[9] & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN,
    };
    Some(Parsed { segment, network, tcp_offset, tcp })
}

/// Turns a SYN on `lo` into the RST that answers it.
#[inline(always)]
pub fn reset(ctx: &TcContext, parsed: &Parsed) -> Option<()> {
    let Segment { src, dst, src_port, dst_port, .. } = &parsed.segment;
    // Swapping addresses and ports leaves the checksums as they are.
    if parsed.network == Network::V4 {
        let [s, d] = [tail(src), tail(dst)];
        store(ctx, LO_HEADER + 12, &[d, s])?;
    } else {
        store(ctx, LO_HEADER + 8, &[dst.octets, src.octets])?;
    }
    let tcp = LO_HEADER + parsed.tcp_offset;
    store(ctx, tcp, &[dst_port.to_be_bytes(), src_port.to_be_bytes()])?;

    let old = &parsed.tcp;
    let old_seq = u32::from_ne_bytes([old[0], old[1], old[2], old[3]]);
    let old_ack = u32::from_ne_bytes([old[4], old[5], old[6], old[7]]);
    let ack = u32::from_be(old_seq).wrapping_add(1).to_be();
    let old_flags = u16::from_ne_bytes([old[8], old[9]]);
    let flags = u16::from_ne_bytes([old[8], TCP_RST | TCP_ACK]);
    let checksum = tcp + 16;
    csum_replace(ctx, checksum, old_seq, 0, 4)?;
    csum_replace(ctx, checksum, old_ack, ack, 4)?;
    csum_replace(ctx, checksum, u32::from(old_flags), u32::from(flags), 2)?;
    store(ctx, tcp + 4, &[0u32, ack])?;
    store(ctx, tcp + 12, &flags)
}

/// The IPv4 address's octets.
#[inline(always)]
pub fn tail(addr: &Addr) -> [u8; 4] {
    let a = &addr.octets;
    [a[12], a[13], a[14], a[15]]
}

#[inline(always)]
fn addr(hi: [u8; 8], lo: [u8; 8]) -> Addr {
    let mut octets = [0; 16];
    octets[..8].copy_from_slice(&hi);
    octets[8..].copy_from_slice(&lo);
    Addr { octets }
}

#[inline(always)]
fn load<T: Copy>(ctx: &TcContext, offset: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills all of `value` or fails; T is an array of bytes.
    unsafe {
        let ret = bpf_skb_load_bytes_relative(
            ctx.as_ptr().cast(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            BPF_HDR_START_NET,
        );
        if ret != 0 {
            return None;
        }
        Some(value.assume_init())
    }
}

#[inline(always)]
fn store<T>(ctx: &TcContext, offset: u32, value: &T) -> Option<()> {
    // SAFETY: `value` is valid for its size, and the helper checks the offset.
    let ret = unsafe {
        bpf_skb_store_bytes(
            ctx.as_ptr().cast(),
            offset,
            core::ptr::from_ref(value).cast(),
            size_of::<T>() as u32,
            0,
        )
    };
    (ret == 0).then_some(())
}

#[inline(always)]
fn csum_replace(ctx: &TcContext, offset: u32, from: u32, to: u32, size: u64) -> Option<()> {
    // SAFETY: the helper checks the offset.
    let ret = unsafe {
        bpf_l4_csum_replace(ctx.as_ptr().cast(), offset, u64::from(from), u64::from(to), size)
    };
    (ret == 0).then_some(())
}
