//! Whether this node can run the agent: asked before anything is changed, answered with yes, no, or
//! "cannot tell", which is never "no".

mod others;

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use aya::{
    maps::MapType,
    sys::{SyscallError, is_map_supported},
};
use caps::{CapSet, Capability};
use nix::{
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::{AccessFlags, access},
};
use serde::Serialize;

use crate::{
    cni::install,
    dataplane::{
        Hooks, VMLINUX_BTF,
        probe::{self, Probes},
        sock_offsets,
    },
    kubelet::Kubelet,
    output::{self, Document, Format},
};

/// The oldest kernel with everything that the datapath needs: its socket iterators set `SO_REUSEADDR`.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// The check that says by what programs run on interfaces.
const HOOKS: &str = "programs on interfaces, by tcx or clsact";

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the agent is to keep its pins.
    pub bpffs_dir: PathBuf,
    /// Where the node has its CNI.
    pub cni: install::Dirs,
}

/// An answer to "is it there?".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is.
    Yes,
    /// It is not, for certain.
    No,
    /// It could not be asked, mostly for want of privileges.
    CannotTell,
}

impl Answer {
    /// The answer as people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Answer::Yes => "yes",
            Answer::No => "no",
            Answer::CannotTell => "cannot tell",
        }
    }
}

/// What was seen of something that was tried, or why it failed, and a hint.
type Attempt<'a> = Result<&'static str, (&'a anyhow::Error, &'static str)>;

fn tried<'a>(attempt: &'a Result<()>, hint: &'static str) -> Attempt<'a> {
    attempt.as_ref().map(|()| "").map_err(|error| (error, hint))
}

/// One question and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was asked for.
    pub name: String,
    /// The answer.
    pub answer: Answer,
    /// Whether the agent cannot do without it.
    pub required: bool,
    /// The kernel that first had it, or the option that it takes.
    pub since: Option<&'static str>,
    /// What was seen, and what to do about it.
    pub detail: String,
}

/// Everything that was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing that is required is missing.
    pub ok: bool,
    /// The running kernel's release.
    pub kernel: String,
    /// The answers, in a stable order.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(kernel: String, checks: Vec<Check>) -> Report {
        let ok = !checks.iter().any(Check::stops_us);
        Report { ok, kernel, checks }
    }

    /// The report as `check` prints it.
    ///
    /// # Errors
    ///
    /// Never in practice: when JSON cannot express it.
    pub fn print(&self, format: Format) -> Result<String> {
        if format == Format::Json {
            return output::json(&self.document());
        }
        let header = ["CHECK", "ANSWER", "NEEDED", "SINCE", "DETAIL"];
        let rows = self.checks.iter().map(|check| {
            vec![
                check.name.clone(),
                check.answer.as_str().to_owned(),
                if check.required { "yes" } else { "no" }.to_owned(),
                check.since.unwrap_or_default().to_owned(),
                check.detail.clone(),
            ]
        });
        let mut out = output::table(&header, rows);
        writeln!(out, "\n{}", self.verdict())?;
        Ok(out)
    }

    /// What `check` prints as JSON.
    pub fn document(&self) -> Document<&Self> {
        Document::new("Check", self)
    }

    /// One sentence; `run` says the same.
    pub fn verdict(&self) -> String {
        let missing: Vec<&str> =
            self.checks.iter().filter(|c| c.stops_us()).map(|c| c.name.as_str()).collect();
        if missing.is_empty() {
            return "this node can run redirect-agent".to_owned();
        }
        format!("this node cannot run redirect-agent: it lacks {}", missing.join(", "))
    }
}

impl Check {
    fn stops_us(&self) -> bool {
        self.required && self.answer == Answer::No
    }

    fn yes(name: impl Into<String>, detail: impl Into<String>) -> Check {
        Check {
            name: name.into(),
            answer: Answer::Yes,
            required: true,
            since: None,
            detail: detail.into(),
        }
    }

    fn no(name: impl Into<String>, detail: impl Into<String>) -> Check {
        Check { answer: Answer::No, ..Check::yes(name, detail) }
    }

    fn cannot_tell(name: impl Into<String>, detail: impl Into<String>) -> Check {
        Check { answer: Answer::CannotTell, ..Check::yes(name, detail) }
    }

    /// The answer of an attempt.
    fn tried(name: &str, attempt: Attempt<'_>) -> Check {
        match attempt {
            Ok(detail) => Check::yes(name, detail),
            Err((error, _)) if probe::is_denied(error) => {
                Check::cannot_tell(name, format!("{error:#}: run this as root"))
            }
            Err((error, hint)) => Check::no(name, format!("{}{hint}", probe::words(error))),
        }
    }

    fn since(self, since: &'static str) -> Check {
        Check { since: Some(since), ..self }
    }

    fn optional(self) -> Check {
        Check { required: false, ..self }
    }
}

/// Asks everything. Changes nothing that outlives it.
pub fn check(options: &Options) -> Report {
    let release = release();
    let probes = probe::probe();
    let mut checks = vec![kernel_release(&release, &probes), real_time(), btf()];
    checks.extend(maps());
    checks.extend(programs(&probes));
    checks.extend(capabilities());
    checks.push(bpffs(&options.bpffs_dir));
    checks.push(multicast());
    checks.push(cgroup2());
    checks.push(kubelet());
    checks.push(memlock());
    checks.extend(others::other_redirectors(&options.cni.conf));
    checks.push(others::cni_plugin(&options.cni));
    checks.push(others::calico());
    Report::new(release, checks)
}

/// What `run` asks first: fails with what `check` says where something required is missing.
///
/// # Errors
///
/// When it is.
pub fn require(options: &Options) -> Result<()> {
    let report = check(options);
    if report.ok {
        return Ok(());
    }
    let mut message = report.verdict();
    for check in report.checks.iter().filter(|check| check.stops_us()) {
        write!(message, "\n  {}: {}", check.name, check.detail)?;
        if let Some(since) = check.since {
            write!(message, " (since {since})")?;
        }
    }
    bail!("{message}\n`redirect-agent check` shows the whole list");
}

fn release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A distribution may have brought what is needed to an older kernel, so the attempt outranks the
/// number.
fn kernel_release(release: &str, probes: &Result<Probes>) -> Check {
    let name = "kernel release";
    let (major, minor) = OLDEST_KERNEL;
    let all_there = probes
        .as_ref()
        .is_ok_and(|p| p.hooks.is_ok() && p.sk_lookup.is_ok() && p.iterators.is_ok());
    let check = match version(release) {
        Some(running) if running >= OLDEST_KERNEL => Check::yes(name, release),
        Some(_) if all_there => {
            Check::yes(name, format!("{release}, with what later ones have brought to it"))
        }
        Some(_) => Check::no(
            name,
            format!(
                "{release} is too old: boot {major}.{minor} or later, or a distribution's kernel that has \
                 what is missing below: 6.1 was the first whose socket iterators set SO_REUSEADDR"
            ),
        ),
        None => Check::cannot_tell(name, format!("{release:?} does not begin with a version")),
    };
    check.since("6.1")
}

/// There, another task may run the programs on the same CPU in the middle of one, and overwrite what it notes
/// about its packet.
fn real_time() -> Check {
    let name = "no real-time kernel (PREEMPT_RT)";
    match fs::read_to_string("/sys/kernel/realtime") {
        Ok(on) if on.trim() == "1" => {
            Check::no(name, "its softirqs interrupt each other; boot another kernel")
        }
        _ => Check::yes(name, ""),
    }
}

fn btf() -> Check {
    let name = "the kernel's BTF";
    let file = VMLINUX_BTF;
    let check = match fs::File::open(file) {
        Ok(_) => match sock_offsets() {
            Ok(_) => Check::yes(name, file),
            Err(error) => Check::no(name, format!("{error:#}")),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::no(
            name,
            format!("there is no {file}: the kernel needs CONFIG_DEBUG_INFO_BTF, and /sys mounted"),
        ),
        Err(error) => Check::cannot_tell(name, format!("open {file}: {error}")),
    };
    check.since("5.4")
}

fn maps() -> Vec<Check> {
    [
        (MapType::Hash, "map type hash", "3.19", true),
        (MapType::ProgramArray, "map type program array", "4.2", true),
        (MapType::PerCpuHash, "map type per-CPU hash", "4.6", true),
        (MapType::PerCpuArray, "map type per-CPU array", "4.6", true),
        (MapType::LruHash, "map type LRU hash", "4.10", true),
        (MapType::LpmTrie, "map type LPM trie", "4.11", true),
        (MapType::SockHash, "map type sockhash", "4.18", true),
        (MapType::SkStorage, "map type socket storage", "5.2", true),
        (MapType::RingBuf, "map type ring buffer", "5.8", true),
    ]
    .into_iter()
    .map(|(kind, name, since, required)| {
        let check = match is_map_supported(kind) {
            Ok(true) => Check::yes(name, ""),
            Ok(false) => Check::no(name, "the kernel does not know it"),
            Err(SyscallError { io_error, .. }) => {
                Check::cannot_tell(name, format!("create a map: {io_error}"))
            }
        };
        Check { required, ..check.since(since) }
    })
    .collect()
}

fn programs(probes: &Result<Probes>) -> Vec<Check> {
    let names = [
        // Which tells the interface that a packet came by.
        ("sk_lookup on a network namespace", "5.17"),
        // Which compare and exchange.
        (HOOKS, "5.12"),
        ("TCP socket iterators that set options", "6.1"),
        ("rules by mark and protocol, IPv4", "4.17"),
        ("rules by mark and protocol, IPv6", "4.17"),
        ("sysctls of a network namespace", "3.15"),
    ];
    let probes = match probes {
        Ok(probes) => probes,
        Err(error) => {
            return names
                .map(|(name, since)| {
                    Check::cannot_tell(name, format!("{error:#}: run this as root")).since(since)
                })
                .into();
        }
    };
    let no_tables = ": the kernel needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES";
    let attempts = [
        tried(&probes.sk_lookup, ""),
        match &probes.hooks {
            Ok(Hooks::Tcx) => Ok("tcx"),
            Ok(Hooks::Clsact) => {
                Ok("clsact filters, which a pod with NET_ADMIN can delete; 6.6 has tcx")
            }
            Err(error) => Err((error, "")),
        },
        tried(&probes.iterators, ""),
        tried(&probes.rule_ipv4, no_tables),
        tried(&probes.rule_ipv6, no_tables),
        tried(&probes.sysctls, ""),
    ];
    let ipv6 = Path::new("/proc/sys/net/ipv6").exists();
    names
        .into_iter()
        .zip(attempts)
        .map(|((name, since), attempt)| {
            let check = Check::tried(name, attempt).since(since);
            // A node without IPv6 has no pods with IPv6.
            if name.ends_with("IPv6") && !ipv6 { check.optional() } else { check }
        })
        .collect()
}

fn capabilities() -> Vec<Check> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability);
    let admin = has(Capability::CAP_SYS_ADMIN).unwrap_or(false);
    [
        (Capability::CAP_SYS_ADMIN, "enters the pods' network namespaces"),
        (Capability::CAP_NET_ADMIN, "sets routes, rules and marks, and attaches programs"),
        (Capability::CAP_BPF, "loads programs and creates maps"),
        (Capability::CAP_PERFMON, "loads programs that read the kernel's sockets"),
    ]
    .into_iter()
    .map(|(capability, what)| {
        let name = capability.to_string();
        // The kernel's bpf_capable() and perfmon_capable() take CAP_SYS_ADMIN for either.
        let implied = admin && matches!(capability, Capability::CAP_BPF | Capability::CAP_PERFMON);
        match has(capability) {
            Ok(true) => Check::yes(name, what),
            Ok(false) if implied => Check::yes(name, format!("{what}; CAP_SYS_ADMIN will do")),
            Ok(false) => Check::no(
                name,
                format!("{what}: run this as root, or give the container this capability"),
            ),
            Err(error) => Check::cannot_tell(name, error.to_string()),
        }
    })
    .collect()
}

fn bpffs(dir: &Path) -> Check {
    let name = "bpffs";
    let Some(existing) = dir.ancestors().find(|ancestor| ancestor.exists()) else {
        return Check::no(name, format!("{} is nowhere", dir.display()));
    };
    let there = existing.display();
    match statfs(existing) {
        Err(error) => Check::cannot_tell(name, format!("stat {there}: {error}")),
        Ok(fs) if fs.filesystem_type() == BPF_FS_MAGIC => {
            match access(existing, AccessFlags::W_OK) {
                Ok(()) => Check::yes(name, format!("at {there}")),
                Err(nix::Error::EROFS) => {
                    Check::no(name, format!("{there} is mounted read-only: mount it read-write"))
                }
                Err(error) => Check::cannot_tell(name, format!("write to {there}: {error}")),
            }
        }
        Ok(_) if dir.starts_with("/sys/fs/bpf") => Check::cannot_tell(
            name,
            "not mounted at /sys/fs/bpf; `run` mounts it there, which a container's host does not \
             see: better mount it on the host",
        ),
        Ok(_) => Check::no(
            name,
            format!("{there} is not on a bpffs: `mount -t bpf bpf DIR`, or another --bpffs-dir"),
        ),
    }
}

/// What the proxy's DNS answers is marked as multicast on the pod's `lo`, because the kernel sends no ICMP error
/// for that.
fn multicast() -> Check {
    let name = "unicast packets in multicast frames";
    let sysctl = "/proc/sys/net/ipv4/conf/all/drop_unicast_in_l2_multicast";
    let check = match fs::read_to_string(sysctl) {
        Ok(drops) if drops.trim() != "0" => Check::no(
            name,
            "pods inherit net.ipv4.conf.all.drop_unicast_in_l2_multicast=1, and with it get no answer from the \
             proxy's DNS: set it to 0, in running pods too, or run with --dns-capture false",
        ),
        Ok(_) => Check::yes(name, ""),
        Err(error) => Check::cannot_tell(name, format!("read {sysctl}: {error}")),
    };
    check.optional()
}

fn cgroup2() -> Check {
    let name = "cgroup v2";
    let check = match fs::read_to_string("/proc/self/mounts") {
        Ok(mounts) => match mount_point(&mounts, "cgroup2") {
            Some(at) => Check::yes(name, format!("at {at}")),
            None => Check::no(
                name,
                "not mounted: kubelet's probes go to the proxy, except those from --probe-sources, and any \
                 socket with the mark 0x539 passes for the proxy's",
            ),
        },
        Err(error) => Check::cannot_tell(name, format!("read /proc/self/mounts: {error}")),
    };
    check.optional().since("4.5")
}

fn kubelet() -> Check {
    let name = "kubelet";
    let check = match Kubelet::find() {
        Ok(kubelet) => Check::yes(name, kubelet.to_string()),
        Err(error) if probe::is_denied(&error) => {
            Check::cannot_tell(name, format!("{error:#}: run this as root"))
        }
        Err(error) => Check::no(
            name,
            format!(
                "{error:#}; probes go to the proxy, except those from --probe-sources, and a STRICT policy \
                 refuses them"
            ),
        ),
    };
    check.optional()
}

fn mount_point<'a>(mounts: &'a str, kind: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == kind).then_some(at)
    })
}

fn memlock() -> Check {
    let name = "locked memory";
    let check = match fs::read_to_string("/proc/self/limits") {
        Ok(limits) => match limits.lines().find(|line| line.starts_with("Max locked memory")) {
            Some(line) => {
                let limit = line.split_whitespace().nth(3).unwrap_or("?");
                Check::yes(name, format!("limit {limit}; since 5.11 maps do not count against it"))
            }
            None => Check::cannot_tell(name, "/proc/self/limits does not say"),
        },
        Err(error) => Check::cannot_tell(name, format!("read /proc/self/limits: {error}")),
    };
    check.optional()
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn probes(hooks: Result<Hooks>, iterators: Result<()>) -> Result<Probes> {
        Ok(Probes {
            sk_lookup: Ok(()),
            hooks,
            iterators,
            rule_ipv4: Ok(()),
            rule_ipv6: Ok(()),
            sysctls: Ok(()),
        })
    }

    fn denied() -> anyhow::Error {
        anyhow::Error::from(io::Error::from_raw_os_error(libc::EPERM)).context("load a program")
    }

    #[test]
    fn a_kernel_that_is_too_old_is_named_with_what_it_lacks() {
        let old =
            probes(Ok(Hooks::Clsact), Err(anyhow!("load program mark_all: invalid argument")));
        let check = kernel_release("5.10.0-28-cloud-amd64", &old);
        assert_eq!(check.answer, Answer::No);
        assert!(check.detail.contains("boot 6.1 or later"), "{check:?}");
        let report = Report::new("5.10.0".into(), [vec![check], programs(&old)].concat());
        assert!(!report.ok);
        assert_eq!(
            report.verdict(),
            "this node cannot run redirect-agent: it lacks kernel release, TCP socket iterators that \
             set options"
        );
    }

    #[test]
    fn a_kernel_without_tcx_will_do_and_is_told_what_that_means() {
        for (hooks, detail) in [(Hooks::Tcx, "tcx"), (Hooks::Clsact, "clsact filters")] {
            let probes = probes(Ok(hooks), Ok(()));
            let checks = [vec![kernel_release("6.1.0-48", &probes)], programs(&probes)].concat();
            let check = checks.iter().find(|check| check.name == HOOKS).unwrap();
            assert!(check.detail.starts_with(detail), "{check:?}");
            assert!(Report::new(String::new(), checks).ok);
        }
    }

    #[test]
    fn an_old_kernel_with_everything_brought_to_it_will_do() {
        let all = |hooks| probes(Ok(hooks), Ok(()));
        for hooks in [Hooks::Tcx, Hooks::Clsact] {
            assert_eq!(kernel_release("5.14.0-503.el9", &all(hooks)).answer, Answer::Yes);
        }
        assert_eq!(kernel_release("6.1.0", &Err(denied())).answer, Answer::Yes);
        assert_eq!(kernel_release("7.0-rc1", &Err(denied())).answer, Answer::Yes);
        assert_eq!(kernel_release("strange", &all(Hooks::Tcx)).answer, Answer::CannotTell);
    }

    #[test]
    fn what_could_not_be_asked_is_never_a_no() {
        for probes in [Err(denied()), probes(Err(denied()), Ok(()))] {
            let checks = programs(&probes);
            let hooks = checks.iter().find(|check| check.name == HOOKS).unwrap();
            assert_eq!(hooks.answer, Answer::CannotTell, "{hooks:?}");
            assert!(hooks.detail.contains("run this as root"), "{hooks:?}");
            assert!(Report::new(String::new(), checks).ok);
        }
    }

    #[test]
    fn what_is_not_required_stops_nobody() {
        let report = Report::new(String::new(), vec![Check::no("cgroup v2", "").optional()]);
        assert!(report.ok);
    }

    #[test]
    fn cgroup_v2_is_found_beside_version_one() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(mounts, "cgroup2"), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point("proc /proc proc rw 0 0\n", "cgroup2"), None);
    }

    #[test]
    fn a_directory_on_another_file_system_is_no_bpffs() {
        let dir = tempfile::tempdir().unwrap();
        let check = bpffs(&dir.path().join("redirect/v1"));
        assert_eq!(check.answer, Answer::No);
        assert!(check.detail.contains("mount -t bpf"), "{check:?}");
    }
}
