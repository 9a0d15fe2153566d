//! Packets, made so that it is known what is in them, and the RST that answers one.

use std::fmt;

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use fastrand::Rng;
use redirect_ebpf::{
    abi::{Addr, PORT_DNS, PORT_PROXY_DNS},
    dns::Message,
    verdict::{Hidden, Segment},
};

use crate::world;

/// Source: Linux `include/uapi/linux/if_ether.h`, `ETH_HLEN`.
pub const LINK_HEADER: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// A frame, and what the programs should find in it.
pub struct Packet {
    pub bytes: Vec<u8>,
    /// Whether it is IPv4 or IPv6.
    pub ip: bool,
    /// The TCP segment, unless it is one that the programs leave to `sk_lookup`.
    pub segment: Option<Segment>,
    /// That, or the UDP datagram.
    pub message: Option<Message>,
    /// The addresses of what is neither, but is IP.
    pub unread: Option<(Addr, Addr)>,
    /// What it is if it is IP, and neither of them.
    pub hidden: Hidden,
    /// Whether a datagram has a DNS query's header whole, and so can be answered.
    pub answerable: bool,
    /// Whether the TCP header reaches as far as its checksum.
    pub has_checksum: bool,
    /// Whether nothing is cut off.
    whole: bool,
    /// The segment's sequence number.
    sequence: u32,
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, ip, segment, has_checksum, .. } = self;
        write!(f, "ip {ip}, checksum {has_checksum}, {segment:?}\n  bytes")?;
        bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

impl Packet {
    pub fn random(rng: &mut Rng) -> Self {
        let v4 = rng.bool();
        let (src, dst) = world::addresses(rng, v4);
        let [src_port, dst_port] = [world::port(rng), world::port(rng)];
        // With or without the flags of ECN, which are no part of the question.
        let flags = match rng.u8(..10) {
            0..6 => SYN | choose(rng, &[0, 0, 0xc0]),
            6 | 7 => SYN | ACK | choose(rng, &[0, 0, 0x40]),
            _ => choose(rng, &[ACK, ACK, RST, RST | ACK, FIN | ACK, SYN | RST, SYN | FIN, 0]),
        };
        let sequence = rng.u32(..);
        let protocol = if rng.u8(..10) < 9 {
            choose(rng, &[TCP, TCP, UDP])
        } else {
            choose(rng, &[1, 58, 132, 0, 4])
        };
        let (src_port, dst_port, dst) = match rng.u8(..8) {
            0 => (PORT_PROXY_DNS, dst_port, dst),
            1 => (src_port, PORT_DNS, dst),
            2 => (src_port, PORT_PROXY_DNS, Addr::loopback(v4)),
            _ => (src_port, dst_port, dst),
        };
        let src = if src_port == PORT_PROXY_DNS { Addr::loopback(v4) } else { src };
        let is_query = rng.u8(..4) > 0;
        let tcp = match protocol {
            UDP => datagram(rng, [src, dst], [src_port, dst_port], is_query),
            _ => segment(rng, [src, dst], [src_port, dst_port], sequence, flags),
        };

        let (ethertype, header, plain) = if v4 {
            ipv4(rng, src, dst, protocol, &tcp)
        } else {
            ipv6(rng, src, dst, protocol, &tcp)
        };
        let ip = rng.u8(..20) > 0;
        let ethertype =
            if ip { ethertype } else { choose(rng, &[0x0806, 0x8100, 0x88a8, 0x8847, 0x05ff]) };
        let mut bytes: Vec<u8> = (0..LINK_HEADER as u8 - 2).collect();
        bytes.extend(u16::to_be_bytes(ethertype));
        bytes.extend(&header);
        bytes.extend(&tcp);
        let len = bytes.len();
        match rng.u8(..20) {
            0 => bytes.truncate(rng.usize(LINK_HEADER + 1..=len)),
            // Within the TCP header, before and behind what is read and what is rewritten.
            1..5 => bytes.truncate(LINK_HEADER + header.len() + rng.usize(12..=20)),
            _ => {}
        }
        // What the programs read: ports, sequence numbers, flags.
        let tcp_len = bytes.len().saturating_sub(LINK_HEADER + header.len());
        let opening = if protocol == UDP { SYN } else { flags & (SYN | ACK | RST) };
        let (opens, accepts) = (opening == SYN, opening == SYN | ACK);
        let resets = protocol == TCP && flags & RST != 0;
        let found = Segment { src, dst, src_port, dst_port, opens, accepts, resets };
        let segment = (ip && plain && protocol == TCP && tcp_len >= 16).then_some(found);
        let datagram = (ip && plain && protocol == UDP && tcp_len >= 8).then_some(found);
        // RFC 1035, 4.1.1: QR, and one question. Only what is for a resolver's port is looked at.
        let asks = dst_port != PORT_DNS
            || bytes
                .get(LINK_HEADER + header.len() + 8..)
                .is_some_and(|dns| matches!(dns, [_, _, flags, _, 0, 1, ..] if flags & 0x80 == 0));
        let ends = flags & (FIN | RST) != 0;
        let message = segment
            .map(|segment| Message { segment, tcp: true, is_query: true, ends })
            .or(datagram.map(|segment| Message {
                segment,
                tcp: false,
                is_query: asks,
                ends: false,
            }));
        let header_len = if v4 { 20 } else { 40 };
        let unread = (ip && message.is_none() && bytes.len() >= LINK_HEADER + header_len)
            .then_some((src, dst));
        let hidden = match ip && message.is_none() {
            true => hidden(&bytes[LINK_HEADER..], v4),
            false => Hidden::Nothing,
        };
        let has_checksum = protocol == UDP || tcp_len >= 18;
        let answerable = is_query && tcp_len >= 20;
        let whole = bytes.len() == len;
        Self {
            bytes,
            ip,
            segment,
            message,
            unread,
            hidden,
            answerable,
            has_checksum,
            whole,
            sequence,
        }
    }

    /// Checks that `rewritten` differs from this packet by its addresses and ports only.
    pub fn check_readdressed(&self, rewritten: &[u8], new: &Segment) -> Result<()> {
        self.check_changed(rewritten, new, |_| {})
    }

    /// Checks that `reply` is the answer SERVFAIL to this query.
    pub fn check_refused(&self, reply: &[u8]) -> Result<()> {
        let Some(Message { segment: asked, .. }) = self.message else { bail!("no message") };
        let new = Segment {
            src: asked.dst,
            dst: asked.src,
            src_port: asked.dst_port,
            dst_port: asked.src_port,
            ..asked
        };
        self.check_changed(reply, &new, |udp| {
            // RFC 1035, 4.1.1: QR, no TC; RA and the code, and RFC 4035's CD as it was.
            udp[10] = udp[10] & 0x7d | 0x80;
            udp[11] = udp[11] & 0x10 | 0x82;
        })
    }

    /// Checks that `frame` is this packet with other addresses and ports, and what `change` makes of
    /// its transport header and payload, with the right checksums.
    fn check_changed(&self, frame: &[u8], new: &Segment, change: impl Fn(&mut [u8])) -> Result<()> {
        if !self.whole {
            return Ok(());
        }
        let mut expected = self.bytes.clone();
        let v4 = expected[LINK_HEADER] >> 4 == 4;
        let (addresses, skip) = if v4 { (LINK_HEADER + 12, 12) } else { (LINK_HEADER + 8, 0) };
        let both = [&new.src.octets[skip..], &new.dst.octets[skip..]].concat();
        expected[addresses..addresses + both.len()].copy_from_slice(&both);
        if v4 {
            let end = LINK_HEADER + tcp_offset(frame);
            expected[LINK_HEADER + 10..LINK_HEADER + 12].fill(0);
            let sum = checksum(&expected[LINK_HEADER..end]);
            expected[LINK_HEADER + 10..LINK_HEADER + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let transport = &mut expected[LINK_HEADER + tcp_offset(frame)..];
        transport[..2].copy_from_slice(&new.src_port.to_be_bytes());
        transport[2..4].copy_from_slice(&new.dst_port.to_be_bytes());
        change(transport);
        match self.message {
            Some(Message { tcp: true, .. }) => seal(transport, TCP, 16, &new.src, &new.dst),
            // No checksum, and so it stays.
            _ if transport[6..8] == [0, 0] => {}
            _ => seal(transport, UDP, 6, &new.src, &new.dst),
        }
        ensure!(frame == expected, "{frame:02x?} where {expected:02x?} should be");
        Ok(())
    }

    /// Checks that `frame` is this packet as if `lo` had delivered it.
    pub fn check_to_lo(&self, frame: &[u8]) -> Result<()> {
        let mut expected = self.bytes.clone();
        expected[..12].fill(0);
        ensure!(frame == expected, "{frame:02x?} where {expected:02x?} should be");
        Ok(())
    }

    /// Checks that `frame` is this SYN with ACK, made a RST with ACK that tells no sequence number.
    pub fn check_aborted(&self, frame: &[u8]) -> Result<()> {
        let asked = self.segment.context("no segment")?;
        self.check_changed(frame, &asked, |tcp| {
            tcp[4..8].fill(0);
            tcp[13] = RST | ACK;
        })
    }

    /// Checks that `reply` is that RST on its way back to where this SYN came from.
    pub fn check_sent_back(&self, reply: &[u8]) -> Result<()> {
        let mut reply = reply.to_vec();
        let (to, from) = reply[..12].split_at_mut(6);
        to.swap_with_slice(from);
        self.check_reset(&reply)
    }

    /// Checks that `reply` is the RST that makes the sender of this SYN give up; nobody takes one
    /// that is cut off.
    pub fn check_reset(&self, reply: &[u8]) -> Result<()> {
        let asked = self.segment.context("no segment")?;
        if !self.whole {
            return Ok(());
        }
        let (header, _) = self.bytes.split_at(LINK_HEADER);
        ensure!(reply.starts_with(header), "the link header has changed");
        ensure!(reply.len() == self.bytes.len(), "the length has changed");
        let packet = SlicedPacket::from_ethernet(reply)?;
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else { bail!("it is not TCP") };
        let (src, dst, checksum) = match &packet.net {
            Some(NetSlice::Ipv4(ip)) => {
                let ip = ip.header();
                ensure!(
                    ip.header_checksum() == ip.to_header().calc_header_checksum(),
                    "the IPv4 header's checksum is wrong"
                );
                let checksum = tcp.calc_checksum_ipv4(ip.source(), ip.destination())?;
                (Addr::v4(ip.source()), Addr::v4(ip.destination()), checksum)
            }
            Some(NetSlice::Ipv6(ip)) => {
                let ip = ip.header();
                let checksum = tcp.calc_checksum_ipv6(ip.source(), ip.destination())?;
                (Addr { octets: ip.source() }, Addr { octets: ip.destination() }, checksum)
            }
            _ => bail!("it is not IP"),
        };
        ensure!(
            tcp.checksum() == checksum,
            "the TCP checksum is wrong, it should be {checksum:04x}"
        );
        ensure!((src, dst) == (asked.dst, asked.src), "the addresses are wrong");
        ensure!(
            (tcp.source_port(), tcp.destination_port()) == (asked.dst_port, asked.src_port),
            "the ports are wrong"
        );
        // RFC 9293, 3.10.7.1: sequence 0, and it acknowledges the SYN.
        ensure!(tcp.sequence_number() == 0, "the sequence number is wrong");
        ensure!(
            tcp.acknowledgment_number() == self.sequence.wrapping_add(1),
            "the acknowledgement is wrong"
        );
        ensure!(reply[LINK_HEADER + tcp_offset(reply) + 13] == RST | ACK, "the flags are wrong");
        Ok(())
    }
}

fn tcp_offset(frame: &[u8]) -> usize {
    match frame[LINK_HEADER] >> 4 {
        4 => usize::from(frame[LINK_HEADER] & 0xf) * 4,
        _ => 40,
    }
}

/// The ethertype, the IPv4 header, and whether TCP follows it in plain sight.
fn ipv4(rng: &mut Rng, src: Addr, dst: Addr, protocol: u8, tcp: &[u8]) -> (u16, Vec<u8>, bool) {
    let words = if rng.u8(..8) == 0 { rng.usize(6..=15) } else { 5 };
    // The flags DF and MF, and offsets.
    let fragment: u16 = match rng.u8(..16) {
        0 => 0x2000,
        1 => 0x2000 | rng.u16(1..0x2000),
        2 => rng.u16(1..0x2000),
        3..8 => 0,
        _ => 0x4000,
    };
    let mut header = vec![0x40 | words as u8, 0];
    header.extend(((words * 4 + tcp.len()) as u16).to_be_bytes());
    header.extend(rng.u16(..).to_be_bytes());
    header.extend(fragment.to_be_bytes());
    header.extend([64, protocol, 0, 0]);
    header.extend(&src.octets[12..]);
    header.extend(&dst.octets[12..]);
    // Options: no operation.
    header.resize(words * 4, 1);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    (0x0800, header, fragment & 0x3fff == 0)
}

/// The ethertype, the IPv6 header with those that extend it, and whether TCP follows the first,
/// between addresses of IPv6.
fn ipv6(rng: &mut Rng, src: Addr, dst: Addr, protocol: u8, tcp: &[u8]) -> (u16, Vec<u8>, bool) {
    let mapped = src.is_v4() || dst.is_v4();
    let count = if rng.u8(..6) == 0 { choose(rng, &[1, 1, 1, 2, 7, 8]) } else { 0 };
    // Hop-by-hop options, routing, fragment, authentication, destination options.
    let mut next: Vec<u8> = (0..count).map(|_| choose(rng, &[0, 43, 44, 51, 60])).collect();
    next.push(protocol);
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(((tcp.len() + count * 8) as u16).to_be_bytes());
    header.extend([next[0], 64]);
    header.extend(src.octets);
    header.extend(dst.octets);
    for pair in next.windows(2) {
        // A fragment's offset.
        let offset = if pair[0] == 44 && rng.bool() { rng.u8(1..) } else { 0 };
        header.extend([pair[1], 0, offset, 0, 0, 0, 0, 0]);
    }
    (0x86dd, header, count == 0 && !mapped)
}

/// What begins with this IP header, and is no plain segment or datagram, may be all the same: by RFC
/// 791 and RFC 8200, as far as the headers are there. Of what is in doubt the worst.
fn hidden(ip: &[u8], v4: bool) -> Hidden {
    if v4 {
        let offset = ip.get(6..8).map_or(0, |field| u16::from_be_bytes([field[0], field[1]]));
        return match ip.get(9) {
            Some(&TCP) => Hidden::Tcp,
            Some(&UDP) if offset & 0x1fff == 0 => {
                let header = usize::from(ip[0] & 0xf) * 4;
                hidden_datagram(ip.get(header..).unwrap_or_default())
            }
            _ => Hidden::Nothing,
        };
    }
    let Some(&(mut next)) = ip.get(6) else { return Hidden::Nothing };
    let mut rest = ip.get(40..).unwrap_or_default();
    for _ in 0..8 {
        let len = match (next, rest) {
            (TCP, _) => return Hidden::Tcp,
            (UDP, _) => return hidden_datagram(rest),
            (44, [after, _, hi, lo, ..]) if u16::from_be_bytes([*hi, *lo]) & 0xfff8 != 0 => {
                return if *after == TCP { Hidden::Tcp } else { Hidden::Nothing };
            }
            (44, [_, _, _, _, ..]) => 8,
            (51, [_, len, ..]) => (usize::from(*len) + 2) * 4,
            (0 | 43 | 60 | 135 | 139 | 140, [_, len, ..]) => (usize::from(*len) + 1) * 8,
            (0 | 43 | 44 | 51 | 60 | 135 | 139 | 140, _) => return Hidden::Tcp,
            _ => return Hidden::Nothing,
        };
        next = rest[0];
        rest = rest.get(len..).unwrap_or_default();
    }
    Hidden::Tcp
}

/// A datagram whose header may be cut off.
fn hidden_datagram(udp: &[u8]) -> Hidden {
    match udp.get(2..4) {
        Some(port) if port != PORT_DNS.to_be_bytes() => Hidden::Nothing,
        _ => Hidden::Dns,
    }
}

fn segment(
    rng: &mut Rng,
    [src, dst]: [Addr; 2],
    ports: [u16; 2],
    sequence: u32,
    flags: u8,
) -> Vec<u8> {
    let words = choose(rng, &[5, 5, 8, 10, 15]);
    let mut tcp = Vec::new();
    tcp.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(rng.u32(..).to_be_bytes());
    tcp.extend([(words as u8) << 4, flags]);
    tcp.extend(rng.u16(..).to_be_bytes());
    tcp.extend([0; 4]);
    tcp.resize(words * 4, 1);
    for _ in 0..choose(rng, &[0, 0, 1, 8, 33]) {
        tcp.push(rng.u8(..));
    }
    seal(&mut tcp, TCP, 16, &src, &dst);
    tcp
}

/// A UDP datagram, mostly with what begins as a DNS message does.
fn datagram(rng: &mut Rng, [src, dst]: [Addr; 2], ports: [u16; 2], query: bool) -> Vec<u8> {
    let mut udp: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
    let payload = choose(rng, &[0, 5, 11, 12, 13, 60, 61]);
    udp.extend((8 + payload as u16).to_be_bytes());
    udp.extend([0; 2]);
    udp.extend((0..payload).map(|_| rng.u8(..)));
    if let Some(flags) = udp.get_mut(10) {
        *flags = if query { *flags & 0x7f } else { *flags | 0x80 };
    }
    // Mostly it asks one question.
    if let Some(questions) = udp.get_mut(12..14)
        && rng.u8(..8) > 0
    {
        questions.copy_from_slice(&[0, 1]);
    }
    if rng.u8(..6) > 0 {
        seal(&mut udp, UDP, 6, &src, &dst);
    }
    udp
}

/// Writes the checksum of a transport header and its payload.
fn seal(transport: &mut [u8], protocol: u8, at: usize, src: &Addr, dst: &Addr) {
    transport[at..at + 2].fill(0);
    // A pseudo-header of IPv6 has the same sum as that of IPv4: it is longer by zeros only.
    let skip = if src.is_v4() && dst.is_v4() { 12 } else { 0 };
    let mut sum = [&src.octets[skip..], &dst.octets[skip..]].concat();
    sum.extend((transport.len() as u32).to_be_bytes());
    sum.extend([0, 0, 0, protocol]);
    sum.extend(&*transport);
    let sum = match checksum(&sum) {
        // RFC 768: 0 is for none.
        0 if protocol == UDP => 0xffff,
        sum => sum,
    };
    transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The Internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub fn choose<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.usize(..of.len())]
}
