//! What a slice of time cost the machine.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::{SysconfVar, sysconf};

use crate::netns::Netns;

/// What was spent between [`Meter::start`] and [`Meter::stop`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spent {
    /// How long all processors together were not idle, in user space and in the kernel, for whomever.
    pub(super) busy: Duration,
    /// The share of the machine's time, from 0 to 1, that neither this process nor the kernel's packet
    /// threads had.
    pub(super) others: f64,
    /// The share of the machine's time, from 0 to 1, that the hypervisor gave to other machines.
    pub(super) steal: f64,
}

/// A running measurement.
///
/// Time in use is all time less idle time, as the kernel measures only the latter exactly; user and
/// system time are what the timer's ticks happened to find.
pub(super) struct Meter {
    began: Instant,
    machine: Machine,
    own: Duration,
}

impl Meter {
    pub(super) fn start() -> Result<Self> {
        Ok(Self { own: own()?, machine: Machine::read()?, began: Instant::now() })
    }

    pub(super) fn stop(&self) -> Result<Spent> {
        let (wall, machine) = (self.began.elapsed(), Machine::read()?);
        let own = own()?.saturating_sub(self.own);
        let all = wall * machine.processors;
        let steal = machine.steal.saturating_sub(self.machine.steal);
        let idle = machine.idle.saturating_sub(self.machine.idle);
        let busy = all.saturating_sub(idle).saturating_sub(steal);
        let share = |part: Duration| part.as_secs_f64() / all.as_secs_f64();
        Ok(Spent { busy, others: share(busy.saturating_sub(own)), steal: share(steal) })
    }
}

/// Of `/proc/stat`, since the machine started, all processors together.
struct Machine {
    processors: u32,
    idle: Duration,
    steal: Duration,
}

impl Machine {
    fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        let per_second = u32::try_from(per_second).context("read the length of a tick")?;
        let mut lines = text.lines();
        let all = lines.next().context("read /proc/stat: it is empty")?;
        let ticks = |column: usize| -> Result<Duration> {
            let ticks =
                all.split_whitespace().nth(column).context("read a column of /proc/stat")?;
            Ok(Duration::from_secs(ticks.parse()?) / per_second)
        };
        let processors = lines.take_while(|line| line.starts_with("cpu")).count();
        Ok(Self {
            processors: u32::try_from(processors)?,
            // Waiting for a disk is idling.
            idle: ticks(4)? + ticks(5)?,
            steal: ticks(8)?,
        })
    }
}

/// The processor time of this process, and of the threads by which the kernel handles packets when
/// there are many.
fn own() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("read the usage of this process")?;
    let micros = |time: nix::sys::time::TimeVal| {
        Duration::from_micros(
            u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0),
        )
    };
    Ok(micros(usage.user_time()) + micros(usage.system_time()) + packet_threads())
}

/// None are seen from a container with process ids of its own.
fn packet_threads() -> Duration {
    let Ok(entries) = fs::read_dir("/proc") else { return Duration::ZERO };
    let threads = entries.flatten().map(|entry| entry.path()).filter(|path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with("ksoftirqd/"))
    });
    let nanos = threads.filter_map(|path| {
        let text = fs::read_to_string(path.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}

/// How many packets a namespace has received and sent. One packet is what the kernel handles as one: up
/// to 64 KiB of TCP.
pub(super) fn packets(netns: &Netns) -> Result<u64> {
    netns.run(|| {
        let text =
            fs::read_to_string("/proc/thread-self/net/dev").context("read the interfaces")?;
        let mut sum = 0;
        for (name, counts) in text.lines().filter_map(|line| line.split_once(':')) {
            let counts: Vec<u64> =
                counts.split_whitespace().filter_map(|n| n.parse().ok()).collect();
            let count = |column: usize| counts.get(column).copied().unwrap_or(0);
            // What is sent on lo is received there.
            sum += count(1) + if name.trim() == "lo" { 0 } else { count(9) };
        }
        Ok(sum)
    })
}

/// How many connections a namespace tracks.
pub(super) fn conntrack(netns: &Netns) -> Result<u64> {
    match netns.sysctl("net/netfilter/nf_conntrack_count") {
        Ok(count) => count.parse().context("read nf_conntrack_count"),
        // The kernel has no conntrack, or nobody has loaded it.
        Err(_) => Ok(0),
    }
}

/// The kernel's memory for objects in use (of its slab caches, sockets and connections among them) and
/// for the data of TCP sockets, bytes.
pub(super) fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/slabinfo").context("read /proc/slabinfo")?;
    let objects = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let active: u64 = words.next()?.parse().ok()?;
        let size: u64 = words.nth(1)?.parse().ok()?;
        Some(active * size)
    });
    let text = fs::read_to_string("/proc/net/sockstat").context("read /proc/net/sockstat")?;
    let tcp = text.lines().find_map(|line| line.strip_prefix("TCP:")).context("find TCP")?;
    let pages: u64 = tcp.split_whitespace().last().context("find TCP's memory")?.parse()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
    Ok(objects.sum::<u64>() + pages * u64::try_from(page).context("read the size of a page")?)
}
