//! The sysctls of an enrolled pod's network namespace. Every function here runs inside it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read as _},
};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use redirect_ebpf::abi::{
    PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS, SYSCTL_ABSENT, SavedSysctls,
};

/// The value of each sysctl, in the order of [`SavedSysctls::values`]. The last of those is for
/// [`RESERVED_PORTS`].
///
/// - `tcp_fwmark_accept`: an accepted socket takes the mark of its SYN, so its replies go back where the SYN
///   came from.
/// - `src_valid_mark`: reverse-path validation considers the mark. Otherwise it would check what comes in on
///   the pod's interface against the redirection route.
/// - `fwmark_reflect`: answers without a socket, such as RST, go back where the packet came from.
/// - `accept_local` and `route_localnet` of `lo`: what the guard moves there has lost its route and is routed
///   again, with an address of the pod as its source and, for DNS, 127.0.0.1 as its destination.
///
/// `tcp_migrate_req` is not set: when the proxy's listener closes, the connections it has not accepted would
/// go, with the proxy's mark, to any socket of its reuseport group. An application with the same uid can join
/// that group.
const SYSCTLS: [(&str, i32); 6] = [
    ("net/ipv4/tcp_fwmark_accept", 1),
    ("net/ipv4/conf/all/src_valid_mark", 1),
    ("net/ipv4/fwmark_reflect", 1),
    ("net/ipv6/fwmark_reflect", 1),
    ("net/ipv4/conf/lo/accept_local", 1),
    ("net/ipv4/conf/lo/route_localnet", 1),
];

/// The proxy's ports are reserved, so that no connection of the application gets one as its ephemeral port.
const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";
const PROXY_PORTS: [u16; 4] = [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE, PORT_PROXY_DNS];

/// Shows the sysctls of the calling thread's network namespace.
const PROC_SYS: &str = "/proc/sys";

/// The present values.
pub(super) fn read() -> Result<SavedSysctls> {
    let mut saved = SavedSysctls { values: [SYSCTL_ABSENT; SYSCTLS.len() + 1] };
    for (value, (name, _)) in saved.values.iter_mut().zip(SYSCTLS) {
        *value = get(name)?;
    }
    if let Some(reserved) = reserved_ports()? {
        saved.values[SYSCTLS.len()] = (0..)
            .zip(PROXY_PORTS)
            .filter(|(_, port)| reserved.contains(port))
            .map(|(n, _)| 1 << n)
            .sum();
    }
    Ok(saved)
}

/// Their names, in the order of [`SavedSysctls::values`].
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SYSCTLS.into_iter().map(|(name, _)| name).chain([RESERVED_PORTS])
}

/// The present values as text; `None` where the kernel has no such sysctl.
pub(super) fn values() -> Result<BTreeMap<&'static str, Option<String>>> {
    let mut values = BTreeMap::new();
    for (name, _) in SYSCTLS {
        let value = get(name)?;
        values.insert(name, (value != SYSCTL_ABSENT).then(|| value.to_string()));
    }
    let reserved = reserved_ports()?.map(|ports| print_ports(&ports).trim().to_owned());
    values.insert(RESERVED_PORTS, reserved);
    Ok(values)
}

/// Sets all of them for an enrolled pod.
pub(super) fn set() -> Result<()> {
    SYSCTLS.iter().try_for_each(|(name, value)| put(name, *value))?;
    let Some(mut reserved) = reserved_ports()? else { return Ok(()) };
    let before = reserved.len();
    reserved.extend(PROXY_PORTS);
    if reserved.len() == before { Ok(()) } else { reserve_ports(&reserved) }
}

/// Restores saved values.
pub(super) fn restore(saved: &SavedSysctls) -> Result<()> {
    for (value, (name, _)) in saved.values.iter().zip(SYSCTLS) {
        if *value != SYSCTL_ABSENT {
            put(name, *value)?;
        }
    }
    // Others may have reserved more ports in the meantime.
    let (were, Some(mut reserved)) = (saved.values[SYSCTLS.len()], reserved_ports()?) else {
        return Ok(());
    };
    for (n, port) in (0..).zip(PROXY_PORTS) {
        if were != SYSCTL_ABSENT && were & (1 << n) == 0 {
            reserved.remove(&port);
        }
    }
    reserve_ports(&reserved)
}

/// Each sysctl, and whether it has the value that an enrolled pod needs.
pub(super) fn check() -> Result<Vec<(&'static str, bool)>> {
    let mut checked = SYSCTLS
        .iter()
        .map(|(name, wanted)| {
            let value = get(name)?;
            Ok((*name, value == *wanted || value == SYSCTL_ABSENT))
        })
        .collect::<Result<Vec<_>>>()?;
    let reserved = reserved_ports()?;
    let all = reserved.is_none_or(|r| PROXY_PORTS.iter().all(|port| r.contains(port)));
    checked.push((RESERVED_PORTS, all));
    Ok(checked)
}

/// The ports that are never used as ephemeral ports; `None` if the kernel has no such sysctl.
fn reserved_ports() -> Result<Option<BTreeSet<u16>>> {
    // In a single read: at any other position than 0 the kernel returns nothing.
    let mut text = vec![0; MAX_PORTS_TEXT];
    let read = fs::File::open(format!("{PROC_SYS}/{RESERVED_PORTS}"))
        .and_then(|mut file| file.read(&mut text));
    let length = match read {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("read sysctl {RESERVED_PORTS}"))?,
    };
    text.truncate(length);
    let text = String::from_utf8_lossy(&text);
    parse_ports(text.trim())
        .map(Some)
        .with_context(|| format!("parse sysctl {RESERVED_PORTS}: {:?}", text.trim()))
}

/// Every other port, each with five digits and a comma.
const MAX_PORTS_TEXT: usize = 6 * 32768;

fn reserve_ports(ports: &BTreeSet<u16>) -> Result<()> {
    write(RESERVED_PORTS, &print_ports(ports))
        .with_context(|| format!("write sysctl {RESERVED_PORTS}"))
}

/// Source: Linux `kernel/sysctl.c`, `proc_do_large_bitmap`: `1,3-5`.
fn parse_ports(text: &str) -> Result<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        ports.extend(first.parse::<u16>()?..=last.parse()?);
    }
    Ok(ports)
}

fn print_ports(ports: &BTreeSet<u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for &port in ports {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(port) => *last = port,
            _ => ranges.push((port, port)),
        }
    }
    let ranges: Vec<String> =
        ranges.iter().map(|(first, last)| format!("{first}-{last}")).collect();
    // The kernel ignores an empty write.
    if ranges.is_empty() { "\n".to_owned() } else { ranges.join(",") }
}

/// Whether the sysctls look like those of an enrolled pod: nobody else sets `tcp_fwmark_accept`, and a new
/// namespace does not inherit it.
pub(super) fn look_set() -> Result<bool> {
    let [(name, wanted), ..] = SYSCTLS;
    Ok(get(name)? == wanted)
}

fn get(name: &str) -> Result<i32> {
    match fs::read_to_string(format!("{PROC_SYS}/{name}")) {
        Ok(text) => {
            text.trim().parse().with_context(|| format!("parse sysctl {name}: {:?}", text.trim()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(SYSCTL_ABSENT),
        Err(e) => Err(e).with_context(|| format!("read sysctl {name}")),
    }
}

fn put(name: &str, value: i32) -> Result<()> {
    match write(name, &value.to_string()) {
        // IPv6 is off.
        Err(e) if is_absent(&e) && name.contains("ipv6") => Ok(()),
        written => written.with_context(|| format!("write sysctl {name}")),
    }
}

fn is_absent(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::NotFound)
}

fn write(name: &str, value: &str) -> Result<()> {
    let path = format!("{PROC_SYS}/{name}");
    match fs::write(&path, value) {
        Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            make_writable()?;
            Ok(fs::write(&path, value)?)
        }
        written => Ok(written?),
    }
}

/// Mounts `/proc/sys` writable, in our mount namespace: runtimes mount it read-only in containers
/// that are not privileged.
fn make_writable() -> Result<()> {
    let flags = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(None::<&str>, PROC_SYS, None::<&str>, flags, None::<&str>)
        .context("mount /proc/sys writable; mount it so for this container")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_read_and_written_as_the_kernel_has_them() {
        for (text, ports, printed) in [
            ("", &[][..], "\n"),
            ("15001", &[15001], "15001-15001"),
            ("1-3,8,65535", &[1, 2, 3, 8, 65535], "1-3,8-8,65535-65535"),
        ] {
            let parsed = parse_ports(text).unwrap();
            assert_eq!(parsed, ports.iter().copied().collect());
            assert_eq!(print_ports(&parsed), printed);
        }
        for nonsense in ["a", "1-", "70000"] {
            assert!(parse_ports(nonsense).is_err(), "{nonsense}");
        }
    }
}
