//! How a workload's proxy ends: at once, or gracefully.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Shared by all tasks of one workload's proxy.
///
/// ztunnel: `src/drain.rs`, `run_with_drain`.
#[derive(Clone, Debug, Default)]
pub(super) struct Stop {
    drain: CancellationToken,
    kill: CancellationToken,
    tasks: TaskTracker,
}

impl Stop {
    /// Runs a task that is dropped, and its connections with it, when the proxy is killed.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let kill = self.kill.clone();
        self.tasks.spawn(async move {
            kill.run_until_cancelled(task).await;
        });
    }

    /// Resolves when nothing new should be accepted any more.
    pub(super) async fn draining(&self) {
        tokio::select! {
            () = self.drain.cancelled() => {}
            () = self.kill.cancelled() => {}
        }
    }

    /// Closes every listener and connection, and waits until that is done.
    pub(super) async fn kill(&self) {
        self.kill.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Closes the listeners, gives the connections until `deadline` to end by themselves, then
    /// closes them.
    pub(super) async fn drain(&self, deadline: Duration) {
        self.drain.cancel();
        self.tasks.close();
        let ended = tokio::time::timeout(deadline, self.tasks.wait()).await;
        if ended.is_err() {
            self.kill().await;
        }
    }
}
