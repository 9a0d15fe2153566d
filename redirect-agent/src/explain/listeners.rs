//! The TCP sockets that listen in the network namespace of the calling thread.

use std::{
    io::{self, BufRead},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};

/// A table for each family.
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];

/// `TCP_LISTEN`, as the tables have it. Source: Linux `include/net/tcp_states.h`.
const LISTEN: &str = "0A";

/// Reads both tables, opened by `open`, up to the last listener: listeners come before all connections. On a
/// kernel without IPv6, one of the tables does not exist. Source: Linux `net/ipv4/tcp_ipv4.c`, `tcp_get_idx`.
///
/// # Errors
///
/// When a table cannot be read.
pub fn read<R: BufRead>(open: impl Fn(&str) -> io::Result<R>) -> Result<Vec<SocketAddr>> {
    let mut listeners = Vec::new();
    for path in TABLES {
        let table = match open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            table => table.with_context(|| format!("read {path}"))?,
        };
        for line in table.lines().skip(1) {
            let line = line.with_context(|| format!("read {path}"))?;
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next(), fields.nth(1));
            if state != Some(LISTEN) {
                break;
            }
            listeners.extend(local.and_then(address));
        }
    }
    listeners.sort_by_key(|at| (at.port(), at.ip()));
    listeners.dedup();
    Ok(listeners)
}

/// An address and port as in the tables: words in host byte order, in hexadecimal. Source: Linux
/// `net/ipv4/tcp_ipv4.c`, `get_tcp4_sock`; `net/ipv6/tcp_ipv6.c`, `get_tcp6_sock`.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |n: usize| {
        let digits = address.get(8 * n..8 * (n + 1))?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let octets: [u8; 16] = words.concat().try_into().ok()?;
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Whether a socket that listens at `at` accepts calls to this address: it listens at that address, or at any
/// of the family. One at `::` also accepts IPv4, unless it is IPV6_V6ONLY, which the tables do not show.
pub fn is_called(at: SocketAddr, ip: IpAddr, port: u16) -> bool {
    let any = match at.ip() {
        IpAddr::V4(any) => any.is_unspecified() && ip.is_ipv4(),
        IpAddr::V6(any) => any.is_unspecified(),
    };
    at.port() == port && (any || at.ip().to_canonical() == ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_of_both_families_are_read_and_nothing_behind_them() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let line = |local: &str, state: &str| format!("  1: {local} 00000000:0000 {state} 0 0\n");
        let v4 = [
            head.to_owned(),
            line("00000000:1F90", "0A"),
            line("0100007F:3A99", "0A"),
            line("0100007F:3A99", "01"),
            line("00000000:0001", "0A"),
        ]
        .concat();
        let v6 = [
            head.to_owned(),
            line("00000000000000000000000001000000:1F90", "0A"),
            line("B80D0120000000000000000002000000:0050", "0A"),
        ]
        .concat();
        let read = |v6: Option<&str>| {
            read(|path| match (path.ends_with("tcp6"), v6) {
                (false, _) => Ok(v4.as_bytes()),
                (true, Some(v6)) => Ok(v6.as_bytes()),
                (true, None) => Err(io::ErrorKind::NotFound.into()),
            })
            .unwrap()
            .iter()
            .map(SocketAddr::to_string)
            .collect::<Vec<_>>()
        };
        if cfg!(target_endian = "little") {
            let all = ["[2001:db8::2]:80", "0.0.0.0:8080", "[::1]:8080", "127.0.0.1:15001"];
            assert_eq!(read(Some(&v6)), all);
            assert_eq!(read(None), ["0.0.0.0:8080", "127.0.0.1:15001"]);
        }
    }

    #[test]
    fn who_listens_everywhere_is_called_at_each_address_and_who_does_not_is_not() {
        for (at, ip, port, expected) in [
            ("0.0.0.0:80", "10.0.0.2", 80, true),
            ("0.0.0.0:80", "fd00::2", 80, false),
            ("[::]:80", "fd00::2", 80, true),
            ("[::]:80", "10.0.0.2", 80, true),
            ("[::]:80", "10.0.0.2", 81, false),
            ("127.0.0.1:80", "10.0.0.2", 80, false),
            ("[::1]:80", "fd00::2", 80, false),
            ("[::ffff:10.0.0.2]:80", "10.0.0.2", 80, true),
            ("10.0.0.2:80", "10.0.0.2", 80, true),
        ] {
            let called = is_called(at.parse().unwrap(), ip.parse().unwrap(), port);
            assert_eq!(called, expected, "{at} at {ip}:{port}");
        }
    }
}
