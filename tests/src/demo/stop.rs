//! An end that is asked for from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::process;

/// Whether the demo was asked to end. Whoever waits looks at it and returns an error, so that
/// everything that was made is removed by its owner.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asked for by SIGINT, SIGTERM and SIGHUP.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let listen = |kind| signal(kind).context("listen for signals");
        let mut interrupt = listen(SignalKind::interrupt())?;
        let mut terminate = listen(SignalKind::terminate())?;
        let mut hangup = listen(SignalKind::hangup())?;
        drop(entered);
        let asked = Arc::clone(&stop.0);
        thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                asked.store(true, Ordering::Relaxed);
                // Further signals change nothing: the clean-up is under way.
                std::future::pending::<()>().await
            })
        });
        Ok(stop)
    }

    /// An error once the end was asked for.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted; everything that was set up is removed");
        }
        Ok(())
    }

    /// [`process::wait_for`] that ends early when asked to.
    pub fn wait_for<T>(
        &self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        process::wait_for(what, patience, || {
            self.check()?;
            look()
        })
    }
}
