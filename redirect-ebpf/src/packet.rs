//! Reads and rewrites packets; nothing else touches their bytes.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT,
        bpf_hdr_start_off::BPF_HDR_START_NET,
    },
    cty::c_void,
    helpers::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh,
        bpf_skb_change_head, bpf_skb_change_type, bpf_skb_load_bytes_relative, bpf_skb_store_bytes,
        generated::bpf_probe_read_kernel,
    },
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{Addr, LOOPBACK_IFINDEX, PORT_DNS, PodId},
    dns::Message,
    verdict::{Hidden, Segment},
};

use crate::{config::offset, maps::ADDRESS};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
pub const IPPROTO_TCP: u8 = 6;
pub const IPPROTO_UDP: u8 = 17;
/// MF and the fragment's offset, in the IPv4 header's flags field.
const IPV4_FRAGMENT: u16 = 0x3fff;
/// The fragment's offset alone.
const IPV4_FRAGMENT_OFFSET: u16 = 0x1fff;
/// A fragment's offset, in the IPv6 fragment header.
const IPV6_FRAGMENT_OFFSET: u16 = 0xfff8;
/// IPv6 extension headers. Source: IANA, "IPv6 Extension Header Types". ESP is left out, because its content
/// is encrypted.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;
/// How many of them are parsed. Nobody needs more.
const EXTENSIONS: usize = 8;
const TCP_FIN: u8 = 0x01;
const TCP_RST: u8 = 0x04;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;
/// Source: Linux `include/uapi/linux/if_packet.h`.
const PACKET_MULTICAST: u32 = 2;
/// Offset of the checksum in the IPv4 header.
const IPV4_CHECKSUM: u32 = 10;
/// Flags of a DNS message: it is an answer; the bits that an answer keeps from its query; the response code.
const DNS_ANSWER: u8 = 0x80;
const DNS_TRUNCATED: u8 = 0x02;
const DNS_RECURSES: u8 = 0x80;
const DNS_UNCHECKED: u8 = 0x10;
const DNS_SERVFAIL: u8 = 2;
/// Length of an Ethernet header. What `lo` delivers has one, too, filled with zeros.
const ETHERNET: u32 = 14;
const LO_HEADER: u32 = ETHERNET;

/// The network protocol of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Network {
    V4,
    V6,
    Other,
}

/// A parsed segment or datagram, and its position in the packet.
pub struct Parsed {
    pub message: Message,
    pub network: Network,
    /// Offset of the transport header from the network header.
    offset: u32,
    /// The network header without options, ending at [`TRANSPORT`], and the beginning of the transport header,
    /// in network byte order. Here, the verifier knows nothing of what was read, whether or not it was.
    headers: [u32; HEADERS],
}

const IPV4_WORDS: usize = 5;
const IPV6_WORDS: usize = 10;
/// The place of the transport header in [`Parsed::headers`].
const TRANSPORT: usize = IPV6_WORDS;
const HEADERS: usize = TRANSPORT + 4;

impl Parsed {
    pub fn segment(&self) -> &Segment {
        &self.message.segment
    }

    /// The sequence number of a segment.
    #[inline(always)]
    pub fn sequence(&self) -> u32 {
        u32::from_be(self.transport()[1])
    }

    /// The beginning of the transport header. Of TCP: ports, sequence, acknowledgement; data offset, flags and
    /// window.
    #[inline(always)]
    fn transport(&self) -> [u32; 4] {
        let [.., t0, t1, t2, t3] = self.headers;
        [t0, t1, t2, t3]
    }

    /// Reads `count` words at `offset` from the network header, into the place `to`.
    #[inline(always)]
    fn read(&mut self, ctx: &TcContext, offset: u32, to: usize, count: usize) -> Option<()> {
        let words = self.headers.get_mut(to..to + count)?;
        // SAFETY: `words` are as many bytes as is said.
        unsafe { load_to(ctx, offset, words.as_mut_ptr().cast(), size_of_val(words)) }
    }
}

pub fn network(ctx: &TcContext) -> Network {
    match u16::from_be(ctx.skb.protocol() as u16) {
        ETH_P_IP => Network::V4,
        ETH_P_IPV6 => Network::V6,
        _ => Network::Other,
    }
}

/// Reads the TCP segment in the packet, or the UDP datagram if `udp` is set. `None` for anything else, for
/// fragments, and for IPv6 packets with extension headers or mapped IPv4 addresses: those are left to
/// `sk_lookup`, which sees them reassembled.
#[inline(always)]
pub fn parse(ctx: &TcContext, network: Network, udp: bool, parsed: &mut Parsed) -> Option<()> {
    let begin = match network {
        Network::V4 => TRANSPORT - IPV4_WORDS,
        Network::V6 => TRANSPORT - IPV6_WORDS,
        Network::Other => return None,
    };
    // Nearly every packet has no options, and is long enough to be read at once.
    let at_once = parsed.read(ctx, 0, begin, HEADERS - begin).is_some();
    if !at_once {
        parsed.read(ctx, 0, begin, TRANSPORT - begin)?;
    }
    let [_, h1, h2, h3, h4, h5, h6, h7, h8, h9, ..] = parsed.headers;
    let (src, dst, protocol, offset) = match network {
        Network::V4 => {
            if u32::from_be(h6) & u32::from(IPV4_FRAGMENT) != 0 {
                return None;
            }
            let protocol = (u32::from_be(h7) >> 16) as u8;
            (v4(h8), v4(h9), protocol, (u32::from_be(h5) >> 24 & 0xf) * 4)
        }
        _ => {
            let (src, dst) =
                (Addr::from_words([h2, h3, h4, h5]), Addr::from_words([h6, h7, h8, h9]));
            // In an IPv6 packet, the form that IPv4 addresses have in our maps is nobody's address.
            if src.is_v4() || dst.is_v4() {
                return None;
            }
            (src, dst, (u32::from_be(h1) >> 8) as u8, 40)
        }
    };
    let is_tcp = protocol == IPPROTO_TCP;
    if !is_tcp && !(udp && protocol == IPPROTO_UDP) {
        return None;
    }
    if !at_once || (network == Network::V4 && offset != 20) {
        // The header of a datagram has to be complete.
        parsed.read(ctx, offset, TRANSPORT, if is_tcp { HEADERS - TRANSPORT } else { 2 })?;
    }
    let [ports, tcp @ ..] = parsed.transport();
    let ports = u32::from_be(ports);
    let dst_port = ports as u16;
    // If several datagrams are merged into one packet, any of them may be a query. SAFETY: the context is
    // valid while the program runs.
    let is_query = is_tcp
        || dst_port != PORT_DNS
        || unsafe { (*ctx.skb.skb).gso_size } != 0
        || is_dns_query(ctx, offset + 8);
    let flags = if is_tcp { (u32::from_be(tcp[2]) >> 16) as u8 } else { 0 };
    let opening = flags & (TCP_SYN | TCP_ACK | TCP_RST);
    let segment = Segment {
        src,
        dst,
        src_port: (ports >> 16) as u16,
        dst_port,
        opens: !is_tcp || opening == TCP_SYN,
        accepts: opening == TCP_SYN | TCP_ACK,
        resets: opening & TCP_RST != 0,
    };
    let ends = flags & (TCP_FIN | TCP_RST) != 0;
    parsed.message = Message { segment, tcp: is_tcp, is_query, ends };
    parsed.network = network;
    parsed.offset = offset;
    Some(())
}

/// Whether what is at `offset` looks like a DNS query: not an answer, and exactly one question.
#[inline(always)]
fn is_dns_query(ctx: &TcContext, offset: u32) -> bool {
    let Some([_, _, flags, _, hi, lo]): Option<[u8; 6]> = load(ctx, offset) else { return false };
    flags & DNS_ANSWER == 0 && u16::from_be_bytes([hi, lo]) == 1
}

/// The addresses of an IP packet, whatever its payload.
#[inline(always)]
pub fn addresses(ctx: &TcContext, network: Network) -> Option<(Addr, Addr)> {
    match network {
        Network::V4 => {
            let [src, dst]: [u32; 2] = load(ctx, 12)?;
            Some((v4(src), v4(dst)))
        }
        Network::V6 => {
            let [src, dst]: [[u32; 4]; 2] = load(ctx, 8)?;
            Some((Addr::from_words(src), Addr::from_words(dst)))
        }
        Network::Other => None,
    }
}

/// Gives a packet on `lo` other addresses and ports, checksums included.
#[inline(always)]
pub fn readdress(ctx: &TcContext, parsed: &Parsed, new: &Segment) -> Option<()> {
    let old = parsed.segment();
    let at = LO_HEADER + parsed.offset;
    let (checksum, flags) = if parsed.message.tcp {
        (at + 16, 0)
    } else {
        // 0 means no checksum, and stays 0.
        (at + 6, u64::from(BPF_F_MARK_MANGLED_0))
    };
    let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
    if parsed.network == Network::V4 {
        replace_v4(ctx, LO_HEADER + 12, checksum, pseudo, &old.src, &new.src)?;
        replace_v4(ctx, LO_HEADER + 16, checksum, pseudo, &old.dst, &new.dst)?;
    } else {
        replace_v6(ctx, LO_HEADER + 8, checksum, pseudo, &old.src, &new.src)?;
        replace_v6(ctx, LO_HEADER + 24, checksum, pseudo, &old.dst, &new.dst)?;
    }
    let ports = |segment: &Segment| {
        u32::from_ne_bytes(bytemuck::cast([
            segment.src_port.to_be_bytes(),
            segment.dst_port.to_be_bytes(),
        ]))
    };
    let (from, to) = (ports(old), ports(new));
    if from != to {
        csum_replace(ctx, checksum, from, to, flags | 4)?;
        store(ctx, at, &to)?;
    }
    Some(())
}

#[inline(always)]
fn replace_v4(
    ctx: &TcContext,
    at: u32,
    checksum: u32,
    flags: u64,
    old: &Addr,
    new: &Addr,
) -> Option<()> {
    let (from, to) = (old.words()[3], new.words()[3]);
    if from != to {
        ip_csum_replace(ctx, LO_HEADER + IPV4_CHECKSUM, from, to)?;
        csum_replace(ctx, checksum, from, to, flags)?;
        store(ctx, at, &to)?;
    }
    Some(())
}

#[inline(always)]
fn replace_v6(
    ctx: &TcContext,
    at: u32,
    checksum: u32,
    flags: u64,
    old: &Addr,
    new: &Addr,
) -> Option<()> {
    let (from, to) = (old.words(), new.words());
    if from != to {
        csum_replace(ctx, checksum, from[0], to[0], flags)?;
        csum_replace(ctx, checksum, from[1], to[1], flags)?;
        csum_replace(ctx, checksum, from[2], to[2], flags)?;
        csum_replace(ctx, checksum, from[3], to[3], flags)?;
        store(ctx, at, &to)?;
    }
    Some(())
}

/// Turns a DNS query on `lo` into the answer SERVFAIL. Fails if it is not a query.
#[inline(always)]
pub fn refuse_query(ctx: &TcContext, parsed: &Parsed) -> Option<()> {
    // The flags, after the UDP header and the id, and the record counts, which have to be there.
    let header: [u8; 10] = load(ctx, parsed.offset + 10)?;
    let old = [header[0], header[1]];
    if old[0] & DNS_ANSWER != 0 {
        return None;
    }
    let new = [
        old[0] & !DNS_TRUNCATED | DNS_ANSWER,
        old[1] & DNS_UNCHECKED | DNS_RECURSES | DNS_SERVFAIL,
    ];
    let Segment { src, dst, src_port, dst_port, .. } = parsed.segment();
    // Swapping addresses and ports leaves the checksums as they are.
    if parsed.network == Network::V4 {
        store(ctx, LO_HEADER + 12, &[dst.words()[3], src.words()[3]])?;
    } else {
        store(ctx, LO_HEADER + 8, &[dst.words(), src.words()])?;
    }
    let udp = LO_HEADER + parsed.offset;
    store(ctx, udp, &[dst_port.to_be_bytes(), src_port.to_be_bytes()])?;
    let (from, to) = (u32::from(u16::from_ne_bytes(old)), u32::from(u16::from_ne_bytes(new)));
    csum_replace(ctx, udp + 6, from, to, u64::from(BPF_F_MARK_MANGLED_0) | 2)?;
    store(ctx, udp + 10, &new)
}

/// Keeps the kernel from sending an ICMP error for a packet.
#[inline(always)]
pub fn without_icmp(ctx: &TcContext) {
    // SAFETY: the context is valid while the program runs. The kernel refuses this for packets for which it
    // sends no error anyway.
    let _refused = unsafe { bpf_skb_change_type(ctx.skb.skb, PACKET_MULTICAST) };
}

/// Turns a SYN on `lo` into the RST that answers it.
#[inline(always)]
pub fn reset(ctx: &TcContext, parsed: &Parsed) -> Option<()> {
    reset_at(ctx, parsed, LO_HEADER)
}

/// The same where the link header has another length.
#[inline(always)]
fn reset_at(ctx: &TcContext, parsed: &Parsed, link: u32) -> Option<()> {
    let Segment { src, dst, src_port, dst_port, .. } = parsed.segment();
    // Swapping addresses and ports leaves the checksums as they are.
    if parsed.network == Network::V4 {
        store(ctx, link + 12, &[dst.words()[3], src.words()[3]])?;
    } else {
        store(ctx, link + 8, &[dst.words(), src.words()])?;
    }
    let tcp = link + parsed.offset;
    store(ctx, tcp, &[dst_port.to_be_bytes(), src_port.to_be_bytes()])?;

    let [_, old_seq, old_ack, _] = parsed.transport();
    let ack = u32::from_be(old_seq).wrapping_add(1).to_be();
    let checksum = tcp + 16;
    csum_replace(ctx, checksum, old_seq, 0, 4)?;
    csum_replace(ctx, checksum, old_ack, ack, 4)?;
    store(ctx, tcp + 4, &[0u32, ack])?;
    make_reset(ctx, tcp, parsed)
}

/// Sets the flags of the TCP header at `tcp` to RST and ACK.
#[inline(always)]
fn make_reset(ctx: &TcContext, tcp: u32, parsed: &Parsed) -> Option<()> {
    let [offset, old, ..] = parsed.transport()[3].to_ne_bytes();
    let old_flags = u16::from_ne_bytes([offset, old]);
    let flags = u16::from_ne_bytes([offset, TCP_RST | TCP_ACK]);
    csum_replace(ctx, tcp + 16, u32::from(old_flags), u32::from(flags), 2)?;
    store(ctx, tcp + 12, &flags)
}

/// Turns a SYN that came in on an interface into the RST that answers it, and sends it back there. Returns
/// what the program has to return.
#[inline(never)]
pub fn reset_back(ctx: &TcContext, parsed: &Parsed) -> i32 {
    send_reset_back(ctx, parsed).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn send_reset_back(ctx: &TcContext, parsed: &Parsed) -> Option<i32> {
    let link = link_header(ctx, parsed.network)?;
    reset_at(ctx, parsed, link)?;
    if link == ETHERNET {
        let macs: [u8; 12] = ctx.load(0).ok()?;
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = macs;
        store(ctx, 0, &[s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5])?;
    }
    // SAFETY: the context is valid while the program runs.
    let ret = unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) };
    Some(ret as i32)
}

/// Turns an outgoing SYN-ACK into a RST, which its receiver takes for a refusal.
#[inline(always)]
pub fn abort(ctx: &TcContext, parsed: &Parsed) -> Option<()> {
    let tcp = link_header(ctx, parsed.network)? + parsed.offset;
    // The RST hides the sequence number with which the receiver could continue the connection.
    csum_replace(ctx, tcp + 16, parsed.transport()[1], 0, 4)?;
    store(ctx, tcp + 4, &0u32)?;
    make_reset(ctx, tcp, parsed)
}

/// Moves a packet that is about to leave by an interface to `lo`, as if it came in there. Returns what the
/// program has to return. The kernel looks for its receiver in this namespace, according to the packet's
/// mark.
#[inline(never)]
pub fn to_lo(ctx: &TcContext) -> i32 {
    send_to_lo(ctx).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn send_to_lo(ctx: &TcContext) -> Option<i32> {
    let network = network(ctx);
    if link_header(ctx, network)? != ETHERNET {
        // SAFETY: the context is valid while the program runs.
        if unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET, 0) } != 0 {
            return None;
        }
    }
    // `lo`'s own MAC address. A packet for any other is not for this host.
    let ethertype = if network == Network::V4 { ETH_P_IP } else { ETH_P_IPV6 };
    let [hi, lo] = ethertype.to_be_bytes();
    store(ctx, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, hi, lo])?;
    // SAFETY: the context is valid while the program runs.
    let ret = unsafe { bpf_redirect(LOOPBACK_IFINDEX, u64::from(BPF_F_INGRESS)) };
    Some(ret as i32)
}

/// Sends a packet that came in on `lo` out by an interface. Returns what the program has to return. No rule
/// of ours may route its mark to `lo`.
#[inline(always)]
pub fn leave(interface: u32) -> i32 {
    // SAFETY: no parameters: the kernel looks for the next hop itself.
    unsafe { bpf_redirect_neigh(interface, core::ptr::null_mut(), 0, 0) as i32 }
}

/// The length of the link header that the packet begins with: an Ethernet header, or none.
#[inline(always)]
fn link_header(ctx: &TcContext, network: Network) -> Option<u32> {
    let start: [u8; 15] = ctx.load(0).ok()?;
    let (ethertype, version) = if network == Network::V4 { (ETH_P_IP, 4) } else { (ETH_P_IPV6, 6) };
    if u16::from_be_bytes([start[12], start[13]]) == ethertype && start[14] >> 4 == version {
        Some(ETHERNET)
    } else if start[0] >> 4 == version {
        Some(0)
    } else {
        None
    }
}

/// What kind of IP packet it is that [`parse`] could not parse.
#[inline(always)]
pub fn hidden(ctx: &TcContext, network: Network) -> Hidden {
    match network {
        Network::V4 => hidden_v4(ctx),
        Network::V6 => hidden_v6(ctx),
        Network::Other => Hidden::Nothing,
    }
}

#[inline(always)]
fn hidden_v4(ctx: &TcContext) -> Hidden {
    let Some(ip): Option<[u8; 10]> = load(ctx, 0) else { return Hidden::Nothing };
    match ip[9] {
        // This holds for every fragment.
        IPPROTO_TCP => Hidden::Tcp,
        // The first fragment has the ports; without it, the others are useless.
        IPPROTO_UDP if u16::from_be_bytes([ip[6], ip[7]]) & IPV4_FRAGMENT_OFFSET == 0 => {
            hidden_udp(ctx, u32::from(ip[0] & 0xf) * 4)
        }
        _ => Hidden::Nothing,
    }
}

#[inline(always)]
fn hidden_udp(ctx: &TcContext, offset: u32) -> Hidden {
    match load::<[u8; 2]>(ctx, offset + 2) {
        Some(port) if u16::from_be_bytes(port) != PORT_DNS => Hidden::Nothing,
        _ => Hidden::Dns,
    }
}

#[inline(never)]
fn hidden_v6(ctx: &TcContext) -> Hidden {
    let Some([mut next]): Option<[u8; 1]> = load(ctx, 6) else { return Hidden::Nothing };
    let mut offset = 40;
    for _ in 0..EXTENSIONS {
        let [after, len]: [u8; 2] = match next {
            IPPROTO_TCP => return Hidden::Tcp,
            IPPROTO_UDP => return hidden_udp(ctx, offset),
            HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY | HIP | SHIM6 | AUTHENTICATION => {
                match load(ctx, offset) {
                    Some(header) => header,
                    // The rest is in another fragment.
                    None => return Hidden::Tcp,
                }
            }
            FRAGMENT => {
                let Some([after, _, hi, lo]): Option<[u8; 4]> = load(ctx, offset) else {
                    return Hidden::Tcp;
                };
                if u16::from_be_bytes([hi, lo]) & IPV6_FRAGMENT_OFFSET != 0 {
                    // What follows another header is in the first fragment.
                    return if after == IPPROTO_TCP { Hidden::Tcp } else { Hidden::Nothing };
                }
                [after, 0]
            }
            _ => return Hidden::Nothing,
        };
        offset += match next {
            AUTHENTICATION => (u32::from(len) + 2) * 4,
            _ => (u32::from(len) + 1) * 8,
        };
        next = after;
    }
    Hidden::Tcp
}

/// The IP header, its length, and the TCP header, both without options.
#[inline(always)]
pub fn headers(ctx: &TcContext) -> Option<([u8; 40], u32, [u8; 20])> {
    let mut ip = [0; 40];
    match network(ctx) {
        Network::V4 => {
            let header: [u8; 20] = load(ctx, 0)?;
            ip[..20].copy_from_slice(&header);
            Some((ip, 20, load(ctx, u32::from(header[0] & 0xf) * 4)?))
        }
        Network::V6 => {
            ip = load(ctx, 0)?;
            Some((ip, 40, load(ctx, 40)?))
        }
        Network::Other => None,
    }
}

/// The address of the `struct net_device` that the packet is on; 0 if it cannot be read.
#[inline(always)]
pub fn device(ctx: &TcContext) -> u64 {
    // The verifier forbids arithmetic on the context's address, but a value read from a map is a plain
    // number.
    let Some(slot) = ADDRESS.get_ptr_mut(0) else { return 0 };
    // SAFETY: the pointer is to this CPU's own value.
    let skb = unsafe {
        slot.write_volatile(ctx.skb.skb as u64);
        slot.read_volatile()
    };
    kernel(skb + u64::from(offset!(packet_device)))
}

/// The address of the packet's `struct net`; 0 if it cannot be read.
#[inline(always)]
pub fn netns(ctx: &TcContext) -> u64 {
    netns_on(device(ctx))
}

/// The pod that the packet is in; 0 if it cannot be read.
#[inline(always)]
pub fn pod_id(ctx: &TcContext) -> PodId {
    pod_on(device(ctx))
}

/// The pod that has this `struct net_device`: the inode number of its network namespace; 0 if it cannot be
/// read.
#[inline(always)]
pub fn pod_on(device: u64) -> PodId {
    kernel(netns_on(device) + u64::from(offset!(net_inode)))
}

#[inline(always)]
fn netns_on(device: u64) -> u64 {
    kernel(device + u64::from(offset!(device_net)))
}

/// A number in the kernel's memory; 0 if it cannot be read. Nothing depends on whether it could: that would be
/// two paths for the verifier each time.
#[inline(always)]
pub fn kernel<T: bytemuck::Pod>(address: u64) -> T {
    let mut number = T::zeroed();
    // SAFETY: the helper copes with any address, and writes as many bytes as is said: zeros if it fails.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut number).cast(),
            size_of::<T>() as u32,
            address as *const c_void,
        );
    }
    number
}

/// The IPv4 address in this word of a header.
#[inline(always)]
fn v4(word: u32) -> Addr {
    Addr::v4(word.to_ne_bytes())
}

#[inline(always)]
fn load<T: Copy>(ctx: &TcContext, offset: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: all of `value` is filled, or it fails; T is an array of numbers.
    unsafe {
        load_to(ctx, offset, value.as_mut_ptr().cast(), size_of::<T>())?;
        Some(value.assume_init())
    }
}

/// Reads `len` bytes of the packet at `offset` from the network header.
///
/// # Safety
///
/// So many may be written at `to`.
#[inline(always)]
unsafe fn load_to(ctx: &TcContext, offset: u32, to: *mut c_void, len: usize) -> Option<()> {
    let skb = ctx.as_ptr().cast();
    // SAFETY: the caller's promise.
    let ret =
        unsafe { bpf_skb_load_bytes_relative(skb, offset, to, len as u32, BPF_HDR_START_NET) };
    (ret == 0).then_some(())
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
fn ip_csum_replace(ctx: &TcContext, offset: u32, from: u32, to: u32) -> Option<()> {
    // SAFETY: the helper checks the offset.
    let ret = unsafe {
        bpf_l3_csum_replace(ctx.as_ptr().cast(), offset, u64::from(from), u64::from(to), 4)
    };
    (ret == 0).then_some(())
}

/// `flags` begin with the size.
#[inline(always)]
fn csum_replace(ctx: &TcContext, offset: u32, from: u32, to: u32, flags: u64) -> Option<()> {
    // SAFETY: the helper checks the offset.
    let ret = unsafe {
        bpf_l4_csum_replace(ctx.as_ptr().cast(), offset, u64::from(from), u64::from(to), flags)
    };
    (ret == 0).then_some(())
}
