//! Tests whether the kernel can do what the datapath does, by doing it in a temporary network namespace.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::Path,
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{Btf, EbpfLoader, programs::ProgramError};
use nix::sched::{CloneFlags, unshare};

use super::{
    hook::Hooks,
    kernel::{ITERATORS, Kernel, OBJECT, TC_PROGRAMS},
    routes::Routing,
    sockets, sys, sysctl,
};
use crate::netns::Netns;

/// The outcome of each attempt. An error for which [`is_denied`] holds says nothing about the kernel.
#[derive(Debug)]
pub struct Probes {
    /// `sk_lookup` on a network namespace.
    pub sk_lookup: Result<()>,
    /// Programs on interfaces, and by what.
    pub hooks: Result<Hooks>,
    /// An iterator over TCP sockets that sets socket options.
    pub iterators: Result<()>,
    /// A rule by mark and protocol, for IPv4.
    pub rule_ipv4: Result<()>,
    /// The same for IPv6.
    pub rule_ipv6: Result<()>,
    /// The sysctls of an enrolled pod.
    pub sysctls: Result<()>,
}

/// Tries everything.
///
/// # Errors
///
/// When no network namespace can be created to try it in.
pub fn probe() -> Result<Probes> {
    let inside = thread::Builder::new()
        .name("probe".to_owned())
        .spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
            Ok(Probes {
                sk_lookup: sk_lookup(),
                hooks: hooks(),
                iterators: iterators(),
                rule_ipv4: rule(Ipv4Addr::LOCALHOST.into()),
                rule_ipv6: rule(Ipv6Addr::LOCALHOST.into()),
                sysctls: sysctl::set(),
            })
        })
        .context("start a thread")?;
    inside.join().map_err(|_| anyhow!("a probe of the kernel panicked"))?
}

/// What an attempt says on one line: of a program that the verifier refuses, its last words.
pub fn words(error: &anyhow::Error) -> String {
    match verifier_log(error) {
        Some(log) => format!("{error}: the kernel's verifier says: {}", last_words(&log)),
        None => format!("{error:#}"),
    }
}

/// What the verifier says of a program that it refuses; without privileges it says nothing.
fn verifier_log(error: &anyhow::Error) -> Option<String> {
    let log = error.chain().find_map(|cause| match cause.downcast_ref() {
        Some(ProgramError::LoadError { verifier_log, .. }) => Some(verifier_log.to_string()),
        _ => None,
    });
    log.filter(|log| !log.trim().is_empty())
}

/// Behind the reason there are statistics.
fn last_words(log: &str) -> &str {
    let is_reason = |line: &&str| {
        !["verification time", "stack depth", "processed"].iter().any(|s| line.starts_with(s))
    };
    log.lines().map(str::trim).filter(|line| !line.is_empty()).rfind(is_reason).unwrap_or_default()
}

/// Whether the attempt failed because of missing privileges, so that it says nothing about the kernel.
pub fn is_denied(error: &anyhow::Error) -> bool {
    // The verifier may call it so, too.
    if verifier_log(error).is_some() {
        return false;
    }
    error.chain().any(|cause| {
        if let Some(rtnetlink::Error::NetlinkError(error)) = cause.downcast_ref() {
            return matches!(-error.raw_code(), libc::EPERM | libc::EACCES);
        }
        let errno = cause.downcast_ref::<nix::Error>().map(|e| *e as i32);
        let code = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        matches!(errno.or(code), Some(libc::EPERM | libc::EACCES))
    })
}

/// The programs, with private maps.
fn kernel() -> Result<Kernel> {
    EbpfLoader::new().btf(None).load(OBJECT).map(Kernel::new).context("load the eBPF object")
}

fn sk_lookup() -> Result<()> {
    let mut kernel = kernel()?;
    kernel.lookup()?.load().context("load the sk_lookup program")?;
    kernel.share_lookup()?;
    let here = Netns::open(Path::new("/proc/thread-self/ns/net"))?;
    let program = kernel.load_stub(&here)?;
    sys::link_lookup(program.as_fd(), here.as_fd()).context("attach the sk_lookup program")?;
    Ok(())
}

fn hooks() -> Result<Hooks> {
    let mut kernel = kernel()?;
    let hooks = Hooks::of_kernel()?;
    for name in TC_PROGRAMS {
        kernel.classifier(name)?.load().with_context(|| format!("load program {name}"))?;
        hooks.try_on_lo(&kernel.tc_program(name)?)?;
    }
    Ok(hooks)
}

fn iterators() -> Result<()> {
    let mut kernel = kernel()?;
    let btf = Btf::from_sys_fs().context("read the kernel's BTF")?;
    for name in ITERATORS {
        let program = kernel.iterator(name)?;
        program.load("tcp", &btf).with_context(|| format!("load program {name}"))?;
        sockets::run(sockets::open(program)?)?;
    }
    Ok(())
}

fn rule(family: IpAddr) -> Result<()> {
    Routing::open()?.add_keep_rule(family)
}

#[cfg(test)]
mod tests {
    use super::last_words;

    #[test]
    fn the_verifiers_reason_comes_before_its_statistics() {
        let log = "0: (85) call bpf_getsockopt#57\nunknown func bpf_getsockopt#57\n\
                   verification time 874482 usec\nstack depth 336+48\n\
                   processed 5555 insns (limit 1000000)\n\0";
        assert_eq!(last_words(log.trim_end_matches('\0')), "unknown func bpf_getsockopt#57");
        assert_eq!(last_words(""), "");
    }
}
