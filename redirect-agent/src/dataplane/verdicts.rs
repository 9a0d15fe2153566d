//! The ring buffer of verdicts.

use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData, PerCpuArray, RingBuf};
use redirect_ebpf::abi::VerdictEvent;
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Dataplane,
    kernel::{VERDICTS, VERDICTS_LOST, VERDICTS_WANTED},
    monotonic_ns,
};

/// The verdicts, as the programs make them while they are [wanted](Dataplane::want_verdicts).
pub struct Verdicts(AsyncFd<RingBuf<MapData>>);

impl Verdicts {
    /// Waits until there is one. Can be dropped at any time.
    ///
    /// # Errors
    ///
    /// When epoll(7) fails.
    pub async fn wait(&mut self) -> Result<()> {
        self.0.readable().await.context("wait for verdicts")?.clear_ready();
        Ok(())
    }

    /// Those that are there, but not more than `most` of them, in their order.
    pub fn take(&mut self, most: usize) -> Vec<VerdictEvent> {
        let ring = self.0.get_mut();
        let mut events = Vec::new();
        while events.len() < most
            && let Some(entry) = ring.next()
        {
            // Of another length only if another build's programs wrote it.
            events.extend(bytemuck::try_pod_read_unaligned::<VerdictEvent>(&entry).ok());
        }
        events
    }
}

impl Dataplane {
    /// The reader of the verdicts; there is one. Needs a Tokio runtime.
    ///
    /// # Errors
    ///
    /// When the ring buffer cannot be mapped, or has been taken already.
    #[expect(unsafe_code, reason = "who registers an fd has to promise that it stays what it is")]
    pub fn verdicts(&self) -> Result<Verdicts> {
        let map = self.kernel().ebpf.take_map(VERDICTS).context("take map verdicts")?;
        let ring = RingBuf::try_from(map).context("map the ring buffer verdicts")?;
        // SAFETY: the ring buffer owns its fd, and gives always the same one.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        Ok(Verdicts(ring.context("watch the ring buffer verdicts")?))
    }

    /// Makes the programs report every verdict for so long; not any more, if that is zero.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn want_verdicts(&self, wanted: Duration) -> Result<()> {
        let until = match u64::try_from(wanted.as_nanos())? {
            0 => 0,
            ns => monotonic_ns()? + ns,
        };
        let mut kernel = self.kernel();
        let mut map: Array<&mut MapData, u64> = kernel.map(VERDICTS_WANTED)?;
        map.set(0, until, 0).context("write map verdicts_wanted")
    }

    /// How many verdicts have found no room in the ring buffer so far.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn verdicts_lost(&self) -> Result<u64> {
        let mut kernel = self.kernel();
        let map: PerCpuArray<&mut MapData, u64> = kernel.map(VERDICTS_LOST)?;
        Ok(map.get(&0, 0).context("read map verdicts_lost")?.iter().sum())
    }
}
