//! TCP by hand: segments in every wrapping that could get past a filter, put on a pod's veth as
//! they are, and a client that completes the handshake with whoever answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, MsgFlags, sendto};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::app::{Answer, read_greeting};
use crate::netns::{Family, Netns};
use crate::process::wait_for;
use crate::sniff::{Direction, PacketSocket};
use crate::topology::{Pod, Topology};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const ETHERTYPE_MPLS: u16 = 0x8847;
const ETHERTYPE_PPPOE: u16 = 0x8864;

const PROTO_HOP_BY_HOP: u8 = 0;
const PROTO_IPIP: u8 = 4;
const PROTO_TCP: u8 = 6;
const PROTO_IPV6: u8 = 41;
const PROTO_ROUTING: u8 = 43;
const PROTO_FRAGMENT: u8 = 44;
const PROTO_DEST_OPTS: u8 = 60;

const EXPERIMENTAL_OPTION: u8 = 0x1e;

/// What PPP calls them.
const PPP_IPV4: u16 = 0x0021;
const PPP_IPV6: u16 = 0x0057;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag PSH.
pub const PSH: u8 = 0x08;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;
/// TCP flag URG.
pub const URG: u8 = 0x20;
/// TCP flags ECE and CWR.
pub const ECN: u8 = 0xc0;

/// A TCP segment and the addresses it goes between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it comes from.
    pub src: SocketAddr,
    /// Where it goes.
    pub dst: SocketAddr,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Bits of [`FIN`] and so on.
    pub flags: u8,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Segment {
    /// Its TCP header and payload, with the checksum. A SYN has 12 bytes of options, so that there
    /// is something to cut off.
    pub fn tcp(&self) -> Vec<u8> {
        let options: &[u8] =
            if self.flags & SYN == 0 { &[] } else { &[2, 4, 0x05, 0xb4, 1, 1, 1, 1, 1, 1, 1, 1] };
        let header = u8::try_from(20 + options.len()).unwrap_or(20);
        let mut tcp = Vec::with_capacity(usize::from(header) + self.payload.len());
        tcp.extend(self.src.port().to_be_bytes());
        tcp.extend(self.dst.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([(header / 4) << 4, self.flags]);
        tcp.extend(0xffff_u16.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.extend(&self.payload);
        let sum = self.checksum(&tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }

    /// The segment in an ordinary IP packet.
    pub fn ip(&self) -> Vec<u8> {
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                Ipv4 { src, dst, ..Ipv4::default() }.packet(&self.tcp())
            }
            (src, dst) => ipv6(as_v6(src), as_v6(dst), PROTO_TCP, &self.tcp()),
        }
    }

    /// Reads an IP packet; none if there is no whole TCP header in it.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (src, dst, tcp): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
            4 => {
                let header = usize::from(packet[0] & 0xf) * 4;
                let length = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                if *packet.get(9)? != PROTO_TCP {
                    return None;
                }
                let src: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                let dst: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
                (src.into(), dst.into(), packet.get(header..length.min(packet.len()))?)
            }
            6 => {
                let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
                if *packet.get(6)? != PROTO_TCP {
                    return None;
                }
                let src: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                let dst: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
                (src.into(), dst.into(), packet.get(40..(40 + length).min(packet.len()))?)
            }
            _ => return None,
        };
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            src: SocketAddr::new(src, u16::from_be_bytes(tcp.get(0..2)?.try_into().ok()?)),
            dst: SocketAddr::new(dst, u16::from_be_bytes(tcp.get(2..4)?.try_into().ok()?)),
            seq: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
            ack: u32::from_be_bytes(tcp.get(8..12)?.try_into().ok()?),
            flags: *tcp.get(13)?,
            payload: tcp.get(header..)?.to_vec(),
        })
    }

    fn checksum(&self, tcp: &[u8]) -> u16 {
        let mut pseudo = Vec::new();
        for ip in [self.src.ip(), self.dst.ip()] {
            match ip {
                IpAddr::V4(ip) => pseudo.extend(ip.octets()),
                IpAddr::V6(ip) => pseudo.extend(ip.octets()),
            }
        }
        pseudo.extend([0, PROTO_TCP]);
        pseudo.extend(u16::try_from(tcp.len()).unwrap_or(u16::MAX).to_be_bytes());
        pseudo.extend(tcp);
        internet_checksum(&pseudo)
    }
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// An IPv4 header.
#[derive(Clone, Debug)]
struct Ipv4 {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    id: u16,
    /// In bytes.
    fragment_offset: usize,
    more_fragments: bool,
    options: Vec<u8>,
}

impl Default for Ipv4 {
    fn default() -> Self {
        Self {
            src: Ipv4Addr::UNSPECIFIED,
            dst: Ipv4Addr::UNSPECIFIED,
            id: 0,
            fragment_offset: 0,
            more_fragments: false,
            options: Vec::new(),
        }
    }
}

impl Ipv4 {
    fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        let header = 20 + options.len();
        let length = u16::try_from(header + payload.len()).unwrap_or(u16::MAX);
        let fragment = u16::try_from(self.fragment_offset / 8).unwrap_or(0)
            | if self.more_fragments { 0x2000 } else { 0 };
        let mut packet = vec![0x40 | u8::try_from(header / 4).unwrap_or(5), 0];
        packet.extend(length.to_be_bytes());
        packet.extend(self.id.to_be_bytes());
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, PROTO_TCP, 0, 0]);
        packet.extend(self.src.octets());
        packet.extend(self.dst.octets());
        packet.extend(options);
        let sum = internet_checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(payload);
        packet
    }
}

fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(src.octets());
    packet.extend(dst.octets());
    packet.extend(payload);
    packet
}

/// An extension header of IPv6.
#[derive(Clone, Copy, Debug)]
enum Extension {
    /// Hop-by-hop options of this many units of eight bytes.
    HopByHop(u8),
    /// Destination options of this many units of eight bytes.
    DestinationOptions(u8),
    /// A routing header of this type that has been used up.
    UsedRouting(u8),
    /// A fragment header of a packet that is whole.
    AtomicFragment,
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Extension::HopByHop(_) => PROTO_HOP_BY_HOP,
            Extension::DestinationOptions(_) => PROTO_DEST_OPTS,
            Extension::UsedRouting(_) => PROTO_ROUTING,
            Extension::AtomicFragment => PROTO_FRAGMENT,
        }
    }

    fn header(self, next: u8) -> Vec<u8> {
        match self {
            Extension::HopByHop(units) | Extension::DestinationOptions(units) => {
                // One option that whoever does not know it is to skip (RFC 4727); the kernel takes
                // at most seven bytes of padding.
                let length = units * 8 - 4;
                let mut header = vec![next, units - 1, EXPERIMENTAL_OPTION, length];
                header.resize(usize::from(units) * 8, 0);
                header
            }
            Extension::UsedRouting(kind) => vec![next, 0, kind, 0, 0, 0, 0, 0],
            Extension::AtomicFragment => fragment_header(next, 0, false, 0x1234),
        }
    }
}

fn fragment_header(next: u8, offset: usize, more: bool, id: u32) -> Vec<u8> {
    let mut header = vec![next, 0];
    let offset = u16::try_from(offset).unwrap_or(0) | u16::from(more);
    header.extend(offset.to_be_bytes());
    header.extend(id.to_be_bytes());
    header
}

/// The headers of `chain` in front of `payload`; the number of the first header, and the bytes.
fn chained(chain: &[Extension], last: u8, payload: &[u8]) -> (u8, Vec<u8>) {
    chain.iter().rev().fold((last, payload.to_vec()), |(next, rest), extension| {
        let mut bytes = extension.header(next);
        bytes.extend(rest);
        (extension.number(), bytes)
    })
}

/// What a frame is: the type of its payload, and the payload.
type Frame = (u16, Vec<u8>);

/// A way to wrap a TCP segment into frames.
#[derive(Clone, Copy)]
pub struct Wrapping {
    /// What it is called in a test's output.
    pub name: &'static str,
    /// Whether the kernel hands such segments to TCP; others it must drop by itself.
    pub valid: bool,
    wrap: fn(&Segment) -> Vec<Frame>,
}

impl std::fmt::Debug for Wrapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Wrapping {
    /// Every wrapping of a family.
    pub fn all(family: Family) -> Vec<Self> {
        match family {
            Family::V4 => WRAPPINGS_V4.to_vec(),
            Family::V6 => WRAPPINGS_V6.to_vec(),
        }
    }
}

const fn valid(name: &'static str, wrap: fn(&Segment) -> Vec<Frame>) -> Wrapping {
    Wrapping { name, valid: true, wrap }
}

const fn invalid(name: &'static str, wrap: fn(&Segment) -> Vec<Frame>) -> Wrapping {
    Wrapping { name, valid: false, wrap }
}

const WRAPPINGS_V4: &[Wrapping] = &[
    valid("plain", |s| frames4([s.ip()])),
    valid("followed by padding", |s| frames4([padded(s.ip())])),
    valid("priority tag", |s| tagged(&[ETHERTYPE_VLAN], ETHERTYPE_IPV4, s.ip())),
    valid("service tag", |s| tagged(&[ETHERTYPE_QINQ], ETHERTYPE_IPV4, s.ip())),
    valid("two priority tags", |s| {
        tagged(&[ETHERTYPE_QINQ, ETHERTYPE_VLAN], ETHERTYPE_IPV4, s.ip())
    }),
    valid("option: no operation", |s| options4(s, &[1, 1, 1, 1])),
    valid("option: router alert", |s| options4(s, &[148, 4, 0, 0])),
    valid("option: record route", |s| options4(s, &[7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0])),
    valid("40 bytes of options", |s| options4(s, &[1; 40])),
    invalid("option: source route", |s| options4(s, &[131, 7, 4, 192, 168, 77, 1])),
    valid("fragments of 8 bytes", |s| fragments4(s, 8, &[])),
    valid("fragments of 16 bytes", |s| fragments4(s, 16, &[])),
    valid("fragments of 8 bytes, last one first", |s| reversed(fragments4(s, 8, &[]))),
    valid("fragments of 8 bytes with options", |s| fragments4(s, 8, &[1, 1, 1, 1])),
    invalid("a second first fragment for another port", |s| {
        let innocent = Segment { dst: SocketAddr::new(s.dst.ip(), 15008), ..s.clone() };
        overlapped(fragments4(s, 8, &[]), fragments4(&innocent, 8, &[]))
    }),
    invalid("a first fragment of 16 bytes over one of 8", |s| {
        let innocent = Segment { dst: SocketAddr::new(s.dst.ip(), 15008), ..s.clone() };
        overlapped(fragments4(s, 8, &[]), fragments4(&innocent, 16, &[]))
    }),
    invalid("total length behind the end", |s| {
        let mut packet = s.ip();
        let length = u16::try_from(packet.len() + 8).unwrap_or(u16::MAX);
        patched4(&mut packet, 2, &length.to_be_bytes());
        frames4([packet])
    }),
    invalid("total length within the TCP header", |s| {
        let mut packet = s.ip();
        patched4(&mut packet, 2, &30_u16.to_be_bytes());
        frames4([packet])
    }),
    invalid("header length of 16", |s| {
        let mut packet = s.ip();
        patched4(&mut packet, 0, &[0x44]);
        frames4([packet])
    }),
    invalid("header length over the ports", |s| {
        let mut packet = s.ip();
        patched4(&mut packet, 0, &[0x46]);
        frames4([packet])
    }),
    invalid("version 6 in an IPv4 frame", |s| {
        let mut packet = s.ip();
        patched4(&mut packet, 0, &[0x65]);
        frames4([packet])
    }),
    invalid("wrong header checksum", |s| {
        let mut packet = s.ip();
        packet[10] ^= 0xff;
        frames4([packet])
    }),
    invalid("wrong TCP checksum", |s| {
        let mut packet = s.ip();
        packet[36] ^= 0xff;
        frames4([packet])
    }),
    invalid("TCP header longer than the packet", |s| {
        let mut packet = s.ip();
        packet[32] = 0xf0;
        frames4([packet])
    }),
    invalid("from the pod's own address", |s| {
        let src = SocketAddr::new(s.dst.ip(), s.src.port());
        frames4([Segment { src, ..s.clone() }.ip()])
    }),
    invalid("from 127.0.0.1", |s| {
        let src = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), s.src.port());
        frames4([Segment { src, ..s.clone() }.ip()])
    }),
    invalid("to 127.0.0.1", |s| {
        let dst = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), s.dst.port());
        frames4([Segment { dst, ..s.clone() }.ip()])
    }),
    invalid("mapped into IPv6", |s| {
        let IpAddr::V4(dst) = s.dst.ip() else {
            return Vec::new();
        };
        let src = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);
        let s = Segment {
            src: SocketAddr::new(src.into(), s.src.port()),
            dst: SocketAddr::new(dst.to_ipv6_mapped().into(), s.dst.port()),
            ..s.clone()
        };
        vec![(ETHERTYPE_IPV6, ipv6(src, dst.to_ipv6_mapped(), PROTO_TCP, &s.tcp()))]
    }),
    valid("three priority tags", |s| {
        tagged(&[ETHERTYPE_QINQ, ETHERTYPE_VLAN, ETHERTYPE_VLAN], ETHERTYPE_IPV4, s.ip())
    }),
    invalid("PPPoE", |s| vec![(ETHERTYPE_PPPOE, pppoe(PPP_IPV4, s.ip()))]),
    invalid("MPLS", |s| vec![(ETHERTYPE_MPLS, [&[0, 0, 0x11, 64], &s.ip()[..]].concat())]),
    invalid("SNAP", |s| vec![snap(ETHERTYPE_IPV4, s.ip())]),
    invalid("an IP packet in IPv4", |s| frames4([in_ipv4(s)])),
    invalid("an IP packet in IPv6", |s| frames6([in_ipv6(s)])),
    valid("SYN with data", |s| on_syn(s, 0, b"GET / HTTP/1.0\r\n\r\n")),
    valid("SYN with PSH, URG and ECN", |s| on_syn(s, PSH | URG | ECN, b"")),
    invalid("SYN with FIN", |s| on_syn(s, FIN, b"")),
    invalid("SYN with FIN and data", |s| on_syn(s, FIN | PSH, b"GET / HTTP/1.0\r\n\r\n")),
    invalid("SYN with RST", |s| on_syn(s, RST, b"")),
    invalid("a used source route", |s| options4(s, &[131, 7, 8, 192, 168, 77, 1])),
    invalid("a strict source route", |s| options4(s, &[137, 7, 4, 192, 168, 77, 1])),
];

const WRAPPINGS_V6: &[Wrapping] = &[
    valid("plain", |s| frames6([s.ip()])),
    valid("followed by padding", |s| frames6([padded(s.ip())])),
    valid("priority tag", |s| tagged(&[ETHERTYPE_VLAN], ETHERTYPE_IPV6, s.ip())),
    valid("service tag", |s| tagged(&[ETHERTYPE_QINQ], ETHERTYPE_IPV6, s.ip())),
    valid("two priority tags", |s| {
        tagged(&[ETHERTYPE_QINQ, ETHERTYPE_VLAN], ETHERTYPE_IPV6, s.ip())
    }),
    valid("hop-by-hop options", |s| chain6(s, &[Extension::HopByHop(1)])),
    valid("destination options", |s| chain6(s, &[Extension::DestinationOptions(1)])),
    valid("destination options of 64 bytes", |s| chain6(s, &[Extension::DestinationOptions(8)])),
    valid("a used routing header", |s| chain6(s, &[Extension::UsedRouting(0)])),
    valid("an atomic fragment", |s| chain6(s, &[Extension::AtomicFragment])),
    valid("an atomic fragment between options", |s| {
        chain6(
            s,
            &[Extension::HopByHop(1), Extension::AtomicFragment, Extension::DestinationOptions(1)],
        )
    }),
    valid("a chain of seven headers", |s| {
        chain6(
            s,
            &[
                Extension::HopByHop(2),
                Extension::DestinationOptions(1),
                Extension::UsedRouting(0),
                Extension::DestinationOptions(3),
                Extension::DestinationOptions(1),
                Extension::AtomicFragment,
                Extension::DestinationOptions(2),
            ],
        )
    }),
    valid("fragments with options behind their header", |s| {
        // The first fragment has to hold the whole TCP header: RFC 7112.
        fragments6(s, &[], &[Extension::DestinationOptions(1)], 32)
    }),
    valid("fragments of 24 bytes, last one first", |s| reversed(fragments6(s, &[], &[], 24))),
    valid("fragments behind hop-by-hop options", |s| {
        fragments6(s, &[Extension::HopByHop(1)], &[], 24)
    }),
    invalid("fragments of 8 bytes", |s| fragments6(s, &[], &[], 8)),
    invalid("a first fragment without a TCP header", |s| {
        fragments6(s, &[], &[Extension::DestinationOptions(2)], 16)
    }),
    invalid("a second first fragment for another port", |s| {
        let innocent = Segment { dst: SocketAddr::new(s.dst.ip(), 15008), ..s.clone() };
        overlapped(fragments6(s, &[], &[], 24), fragments6(&innocent, &[], &[], 24))
    }),
    invalid("hop-by-hop options that are not first", |s| {
        chain6(s, &[Extension::DestinationOptions(1), Extension::HopByHop(1)])
    }),
    invalid("an unknown header", |s| {
        let (src, dst) = (as_v6(s.src.ip()), as_v6(s.dst.ip()));
        frames6([ipv6(src, dst, 253, &[&[PROTO_TCP, 0, 0, 0, 0, 0, 0, 0], &s.tcp()[..]].concat())])
    }),
    invalid("payload length behind the end", |s| {
        let mut packet = s.ip();
        let length = u16::try_from(packet.len() - 40 + 8).unwrap_or(u16::MAX);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        frames6([packet])
    }),
    invalid("payload length within the TCP header", |s| {
        let mut packet = s.ip();
        packet[4..6].copy_from_slice(&10_u16.to_be_bytes());
        frames6([packet])
    }),
    invalid("version 4 in an IPv6 frame", |s| {
        let mut packet = s.ip();
        packet[0] = 0x45;
        frames6([packet])
    }),
    invalid("wrong TCP checksum", |s| {
        let mut packet = s.ip();
        packet[56] ^= 0xff;
        frames6([packet])
    }),
    invalid("from the pod's own address", |s| {
        let src = SocketAddr::new(s.dst.ip(), s.src.port());
        frames6([Segment { src, ..s.clone() }.ip()])
    }),
    invalid("from ::1", |s| {
        let src = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), s.src.port());
        frames6([Segment { src, ..s.clone() }.ip()])
    }),
    invalid("to ::1", |s| {
        let dst = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), s.dst.port());
        frames6([Segment { dst, ..s.clone() }.ip()])
    }),
    invalid("from a mapped address", |s| {
        let src =
            SocketAddr::new(Ipv4Addr::new(203, 0, 113, 9).to_ipv6_mapped().into(), s.src.port());
        frames6([Segment { src, ..s.clone() }.ip()])
    }),
    valid("three priority tags", |s| {
        tagged(&[ETHERTYPE_QINQ, ETHERTYPE_VLAN, ETHERTYPE_VLAN], ETHERTYPE_IPV6, s.ip())
    }),
    invalid("PPPoE", |s| vec![(ETHERTYPE_PPPOE, pppoe(PPP_IPV6, s.ip()))]),
    invalid("MPLS", |s| vec![(ETHERTYPE_MPLS, [&[0, 0, 0x11, 64], &s.ip()[..]].concat())]),
    invalid("SNAP", |s| vec![snap(ETHERTYPE_IPV6, s.ip())]),
    invalid("an IP packet in IPv4", |s| frames4([in_ipv4(s)])),
    invalid("an IP packet in IPv6", |s| frames6([in_ipv6(s)])),
    valid("SYN with data", |s| on_syn(s, 0, b"GET / HTTP/1.0\r\n\r\n")),
    valid("SYN with PSH, URG and ECN", |s| on_syn(s, PSH | URG | ECN, b"")),
    invalid("SYN with FIN", |s| on_syn(s, FIN, b"")),
    invalid("SYN with FIN and data", |s| on_syn(s, FIN | PSH, b"GET / HTTP/1.0\r\n\r\n")),
    invalid("SYN with RST", |s| on_syn(s, RST, b"")),
    invalid("a routing header to be used", |s| routed6(s, 0, 1)),
    invalid("a segment routing header", |s| routed6(s, 4, 1)),
    invalid("a used segment routing header", |s| routed6(s, 4, 0)),
];

fn frames4<const N: usize>(packets: [Vec<u8>; N]) -> Vec<Frame> {
    packets.into_iter().map(|packet| (ETHERTYPE_IPV4, packet)).collect()
}

fn frames6<const N: usize>(packets: [Vec<u8>; N]) -> Vec<Frame> {
    packets.into_iter().map(|packet| (ETHERTYPE_IPV6, packet)).collect()
}

fn padded(mut packet: Vec<u8>) -> Vec<u8> {
    packet.extend([0xaa; 18]);
    packet
}

/// Behind VLAN tags of number 0, which say nothing but a priority.
fn tagged(tags: &[u16], ethertype: u16, packet: Vec<u8>) -> Vec<Frame> {
    let mut frame = Vec::new();
    for inner in tags.iter().skip(1).copied().chain([ethertype]) {
        frame.extend(0_u16.to_be_bytes());
        frame.extend(inner.to_be_bytes());
    }
    frame.extend(packet);
    vec![(tags[0], frame)]
}

/// In a session of PPPoE.
fn pppoe(protocol: u16, packet: Vec<u8>) -> Vec<u8> {
    let mut frame = vec![0x11, 0, 0, 1];
    frame.extend(u16::try_from(2 + packet.len()).unwrap_or(u16::MAX).to_be_bytes());
    frame.extend(protocol.to_be_bytes());
    frame.extend(packet);
    frame
}

/// With a length in the type's place, and the type behind it (RFC 1042).
fn snap(ethertype: u16, packet: Vec<u8>) -> Frame {
    let mut frame = vec![0xaa, 0xaa, 3, 0, 0, 0];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    (u16::try_from(frame.len()).unwrap_or(u16::MAX), frame)
}

/// What a packet in another one is called by.
fn inner(segment: &Segment) -> u8 {
    if segment.dst.is_ipv4() { PROTO_IPIP } else { PROTO_IPV6 }
}

/// In an IPv4 packet between the same ends, or ends that stand for them.
fn in_ipv4(segment: &Segment) -> Vec<u8> {
    let (src, dst) = match (segment.src.ip(), segment.dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => (src, dst),
        _ => (Ipv4Addr::new(203, 0, 113, 9), Ipv4Addr::new(10, 64, 0, 10)),
    };
    let mut packet = Ipv4 { src, dst, ..Ipv4::default() }.packet(&segment.ip());
    patched4(&mut packet, 9, &[inner(segment)]);
    packet
}

/// The same in an IPv6 packet.
fn in_ipv6(segment: &Segment) -> Vec<u8> {
    let (src, dst) = match (segment.src.ip(), segment.dst.ip()) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => (src, dst),
        _ => (
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9),
            Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, 10),
        ),
    };
    ipv6(src, dst, inner(segment), &segment.ip())
}

/// A SYN with more flags and data; other segments as they are.
fn on_syn(segment: &Segment, flags: u8, payload: &[u8]) -> Vec<Frame> {
    let mut segment = segment.clone();
    if segment.flags & SYN != 0 {
        segment.flags |= flags;
        segment.payload = payload.to_vec();
    }
    let ethertype = if segment.dst.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    vec![(ethertype, segment.ip())]
}

/// Behind a routing header of this type with one address, the packet's own, and so many left.
fn routed6(segment: &Segment, kind: u8, left: u8) -> Vec<Frame> {
    let (src, dst) = (as_v6(segment.src.ip()), as_v6(segment.dst.ip()));
    let mut header = vec![PROTO_TCP, 2, kind, left, 0, 0, 0, 0];
    header.extend(dst.octets());
    header.extend(segment.tcp());
    frames6([ipv6(src, dst, PROTO_ROUTING, &header)])
}

fn header4(segment: &Segment, options: &[u8]) -> Ipv4 {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (segment.src.ip(), segment.dst.ip()) else {
        return Ipv4::default();
    };
    // Each segment's fragments have an id of their own.
    let id = u16::from_be_bytes([segment.src.port().to_be_bytes()[1], segment.flags]);
    Ipv4 { src, dst, id, options: options.to_vec(), ..Ipv4::default() }
}

fn options4(segment: &Segment, options: &[u8]) -> Vec<Frame> {
    frames4([header4(segment, options).packet(&segment.tcp())])
}

fn fragments4(segment: &Segment, size: usize, options: &[u8]) -> Vec<Frame> {
    let tcp = segment.tcp();
    let header = header4(segment, options);
    tcp.chunks(size)
        .enumerate()
        .map(|(i, part)| {
            let fragment_offset = i * size;
            let more_fragments = fragment_offset + part.len() < tcp.len();
            let header = Ipv4 { fragment_offset, more_fragments, ..header.clone() };
            (ETHERTYPE_IPV4, header.packet(part))
        })
        .collect()
}

fn chain6(segment: &Segment, chain: &[Extension]) -> Vec<Frame> {
    let (next, payload) = chained(chain, PROTO_TCP, &segment.tcp());
    frames6([ipv6(as_v6(segment.src.ip()), as_v6(segment.dst.ip()), next, &payload)])
}

fn fragments6(
    segment: &Segment,
    before: &[Extension],
    behind: &[Extension],
    size: usize,
) -> Vec<Frame> {
    let (next, whole) = chained(behind, PROTO_TCP, &segment.tcp());
    let id = segment.seq.wrapping_add(u32::from(segment.flags) << 24);
    whole
        .chunks(size)
        .enumerate()
        .map(|(i, part)| {
            let offset = i * size;
            let mut fragment = fragment_header(next, offset, offset + part.len() < whole.len(), id);
            fragment.extend(part);
            let (next, payload) = chained(before, PROTO_FRAGMENT, &fragment);
            let (src, dst) = (as_v6(segment.src.ip()), as_v6(segment.dst.ip()));
            (ETHERTYPE_IPV6, ipv6(src, dst, next, &payload))
        })
        .collect()
}

fn reversed(mut frames: Vec<Frame>) -> Vec<Frame> {
    frames.reverse();
    frames
}

/// The first fragment of `innocent` comes first, then all of `real`.
fn overlapped(real: Vec<Frame>, innocent: Vec<Frame>) -> Vec<Frame> {
    innocent.into_iter().take(1).chain(real).collect()
}

fn patched4(packet: &mut [u8], at: usize, bytes: &[u8]) {
    packet[at..at + bytes.len()].copy_from_slice(bytes);
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = internet_checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// The node's end of a pod's veth: frames are sent to the pod, and what the pod sends is seen.
#[derive(Debug)]
pub struct Wire {
    socket: PacketSocket,
    interface: LinkAddr,
    pod_mac: [u8; 6],
    own_mac: [u8; 6],
}

impl Wire {
    /// Opens a pod's veth.
    pub fn open(topology: &Topology, pod: &Pod) -> Result<Self> {
        let node = topology.node(pod.node);
        let interface = link_addr(node, &pod.host_interface)?;
        let pod_mac = link_addr(&pod.netns, "eth0")?.addr().context("read the pod's MAC")?;
        let socket = PacketSocket::open(node)?;
        let own_mac = interface.addr().context("read the own MAC")?;
        Ok(Self { socket, interface, pod_mac, own_mac })
    }

    /// Opens the `lo` of a namespace, as a raw socket in it can.
    fn loopback(netns: &Netns) -> Result<Self> {
        let interface = link_addr(netns, "lo")?;
        let socket = PacketSocket::open(netns)?;
        Ok(Self { socket, interface, pod_mac: [0; 6], own_mac: [0; 6] })
    }

    /// Has these MAC addresses in the frames that it sends.
    pub fn with_macs(self, to: [u8; 6], from: [u8; 6]) -> Self {
        Self { pod_mac: to, own_mac: from, ..self }
    }

    /// The MAC addresses of the pod and of the node's end.
    pub fn macs(&self) -> ([u8; 6], [u8; 6]) {
        (self.pod_mac, self.own_mac)
    }

    /// Sends a segment in an ordinary IP packet.
    pub fn send_segment(&self, segment: &Segment) -> Result<()> {
        let ethertype = if segment.src.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        self.send(ethertype, &segment.ip())
    }

    /// Sends a frame to the pod.
    pub fn send(&self, ethertype: u16, payload: &[u8]) -> Result<()> {
        let mut frame = self.pod_mac.to_vec();
        frame.extend(self.own_mac);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        // Short frames are padded, as hardware does it.
        frame.resize(frame.len().max(60), 0);
        let sent = sendto(self.socket.fd().as_raw_fd(), &frame, &self.interface, MsgFlags::empty())
            .context("send a frame")?;
        ensure!(sent == frame.len(), "sent {sent} of {} bytes", frame.len());
        Ok(())
    }

    /// The next TCP segment that the pod sends between these two; none if it does not come before
    /// the deadline.
    fn receive(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        deadline: Instant,
    ) -> Result<Option<Segment>> {
        loop {
            let patience = deadline.saturating_duration_since(Instant::now());
            let Some(frame) = self.socket.receive(patience)? else {
                return Ok(None);
            };
            if frame.interface != self.interface.ifindex() || frame.direction != Direction::In {
                continue;
            }
            match frame.segment() {
                Some(segment) if segment.src == from && segment.dst == to => {
                    return Ok(Some(segment));
                }
                _ => {}
            }
        }
    }
}

fn link_addr(netns: &Netns, interface: &str) -> Result<LinkAddr> {
    netns.run(|| {
        getifaddrs()
            .context("list the interfaces")?
            .filter(|entry| entry.interface_name == interface)
            .find_map(|entry| entry.address?.as_link_addr().copied())
            .with_context(|| format!("find interface {interface}"))
    })
}

/// Sends a segment by a raw socket of the namespace, from whatever address it says: NET_RAW, which
/// containers have, is all that it takes.
pub fn send_from(netns: &Netns, segment: &Segment) -> Result<()> {
    let bare = |addr: SocketAddr| SockAddr::from(SocketAddr::new(addr.ip(), 0));
    netns.run(|| {
        let socket = Socket::new(Domain::for_address(segment.dst), Type::RAW, Some(Protocol::TCP))?;
        match segment.src {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
        }
        socket.bind(&bare(segment.src)).context("bind a raw socket")?;
        socket.send_to(&segment.tcp(), &bare(segment.dst)).context("send a segment")?;
        Ok(())
    })
}

/// The SYN cookie that the kernel answers this SYN with. It has one secret for all namespaces, so
/// whoever has one of their own can learn the cookies of others' listeners.
pub fn syn_cookie(topology: &Topology, syn: &Segment) -> Result<u32> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let oracle = Netns::new(&topology.dir().subdir("nodes")?, &format!("oracle{number}"))?;
    let (src, dst) = (syn.src.ip(), syn.dst.ip());
    // The answer has to appear on `lo`: IPv6 has no route over it but to itself.
    let (nodad, local) = if dst.is_ipv4() { ("", "") } else { ("nodad", "local") };
    if !dst.is_loopback() {
        oracle.ip(&format!("addr add {dst} dev lo {nodad}"))?;
    }
    if src != dst && !src.is_loopback() {
        oracle.ip(&format!("route add {local} {src} dev lo"))?;
    }
    for allowed in ["accept_local", "route_localnet"] {
        oracle.set_sysctl(&format!("net/ipv4/conf/all/{allowed}"), "1")?;
    }
    oracle.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
    let _listener = oracle.run(|| std::net::TcpListener::bind(syn.dst).context("listen"))?;
    let wire = Wire::loopback(&oracle)?;
    // As a client does it: a namespace that has just been made may lose the first one.
    let answer = wait_for("a SYN-ACK", Duration::from_secs(10), || {
        wire.send_segment(syn)?;
        wire.receive(syn.dst, syn.src, Instant::now() + Duration::from_millis(500))
    })?;
    ensure!(answer.flags & (SYN | ACK | RST) == SYN | ACK, "not a SYN-ACK: {answer:?}");
    Ok(answer.seq)
}

/// What came of a handshake by hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawOutcome {
    /// The handshake was completed and an application has said who it is.
    Answered(Answer),
    /// The handshake was completed; then the other end closed, or said nothing.
    Accepted,
    /// RST.
    Refused,
    /// Nothing came back.
    Silence,
}

/// A TCP client without a kernel: every segment it sends is wrapped in the same way.
#[derive(Debug)]
pub struct RawClient<'a> {
    wire: &'a Wire,
    wrapping: Wrapping,
    src: SocketAddr,
    dst: SocketAddr,
}

impl<'a> RawClient<'a> {
    /// A client with the address `src`.
    pub fn new(wire: &'a Wire, wrapping: Wrapping, src: SocketAddr, dst: SocketAddr) -> Self {
        Self { wire, wrapping, src, dst }
    }

    /// Sends a SYN, and if it is answered the rest of the handshake; then reads who is there.
    /// `patience` is for each answer.
    pub fn connect(&self, patience: Duration) -> Result<RawOutcome> {
        let seq = 0x1000_0000 + u32::from(self.src.port());
        self.send(seq, 0, SYN, b"")?;
        let deadline = Instant::now() + patience;
        let Some(reply) = self.wire.receive(self.dst, self.src, deadline)? else {
            return Ok(RawOutcome::Silence);
        };
        if reply.flags & RST != 0 {
            return Ok(RawOutcome::Refused);
        }
        ensure!(reply.flags & (SYN | ACK) == SYN | ACK, "expected SYN-ACK, got {reply:?}");
        let seq = seq.wrapping_add(1);
        let mut ack = reply.seq.wrapping_add(1);
        self.send(seq, ack, ACK, b"")?;
        let mut said = Vec::new();
        let deadline = Instant::now() + patience;
        while let Some(reply) = self.wire.receive(self.dst, self.src, deadline)? {
            if reply.seq == ack && reply.flags & SYN == 0 {
                said.extend(&reply.payload);
                ack = ack.wrapping_add(u32::try_from(reply.payload.len()).unwrap_or(0));
                self.send(seq, ack, ACK, b"")?;
            }
            let answer = std::str::from_utf8(&said).ok().and_then(read_greeting);
            if let Some(answer) = answer {
                self.send(seq, ack, RST | ACK, b"")?;
                return Ok(RawOutcome::Answered(answer));
            }
            if reply.flags & (FIN | RST) != 0 {
                break;
            }
        }
        self.send(seq, ack, RST | ACK, b"")?;
        Ok(RawOutcome::Accepted)
    }

    fn send(&self, seq: u32, ack: u32, flags: u8, payload: &[u8]) -> Result<()> {
        let (src, dst, payload) = (self.src, self.dst, payload.to_vec());
        let segment = Segment { src, dst, seq, ack, flags, payload };
        for (ethertype, packet) in (self.wrapping.wrap)(&segment) {
            self.wire.send(ethertype, &packet)?;
        }
        Ok(())
    }
}
