//! The sysctls of an enrolled pod's network namespace. Every function here runs inside it.

use std::{fs, io};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use redirect_ebpf::abi::{SYSCTL_ABSENT, SavedSysctls};

/// What each sysctl is set to, in the order of [`SavedSysctls::values`].
///
/// - `tcp_fwmark_accept`: an accepted socket takes the mark of its SYN, so its replies go the way
///   the SYN came.
/// - `src_valid_mark`: reverse-path validation looks at the mark too, else what comes in on the
///   pod's interface would be validated against the redirection route.
/// - `fwmark_reflect`: answers without a socket, such as RST, go the way the packet came.
/// - `tcp_migrate_req`: while the proxy is replaced both listen; connections that the old one has
///   not accepted when it closes its listeners go to the new one, and are not reset.
pub(super) const SYSCTLS: [(&str, i32); 5] = [
    ("net/ipv4/tcp_fwmark_accept", 1),
    ("net/ipv4/conf/all/src_valid_mark", 1),
    ("net/ipv4/fwmark_reflect", 1),
    ("net/ipv6/fwmark_reflect", 1),
    ("net/ipv4/tcp_migrate_req", 1),
];

/// Where sysctls are: those of the network namespace of the thread that looks.
const PROC_SYS: &str = "/proc/sys";

/// The present values.
pub(super) fn read() -> Result<SavedSysctls> {
    let mut saved = SavedSysctls { values: [SYSCTL_ABSENT; 5] };
    for (value, (name, _)) in saved.values.iter_mut().zip(SYSCTLS) {
        *value = get(name)?;
    }
    Ok(saved)
}

/// Sets all of them for an enrolled pod.
pub(super) fn set() -> Result<()> {
    SYSCTLS.iter().try_for_each(|(name, value)| put(name, *value))
}

/// Puts former values back.
pub(super) fn restore(saved: &SavedSysctls) -> Result<()> {
    for (value, (name, _)) in saved.values.iter().zip(SYSCTLS) {
        if *value != SYSCTL_ABSENT {
            put(name, *value)?;
        }
    }
    Ok(())
}

/// Each sysctl, and whether it has the value that an enrolled pod needs.
pub(super) fn check() -> Result<Vec<(&'static str, bool)>> {
    SYSCTLS
        .iter()
        .map(|(name, wanted)| {
            let value = get(name)?;
            Ok((*name, value == *wanted || value == SYSCTL_ABSENT))
        })
        .collect()
}

/// Whether they look as if an enrolled pod's: nobody else sets `tcp_fwmark_accept`, and a new
/// namespace inherits it from nobody.
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
    let write = || fs::write(format!("{PROC_SYS}/{name}"), value.to_string());
    let written = match write() {
        Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            make_writable()?;
            write()
        }
        written => written,
    };
    match written {
        Ok(()) => Ok(()),
        // IPv6 is off.
        Err(e) if e.kind() == io::ErrorKind::NotFound && name.contains("ipv6") => Ok(()),
        Err(e) => Err(e).with_context(|| format!("write sysctl {name}")),
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
