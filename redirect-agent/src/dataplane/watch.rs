//! Hears of changes to a pod's interfaces, addresses, routes and rules as they happen.

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::{FutureExt as _, StreamExt as _};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle, time::sleep};

use crate::netns::Netns;

/// Changes that belong together, such as those of an interface that comes up, are told of once.
const TOGETHER: Duration = Duration::from_millis(50);
/// After a change was told of, the next one is told of no sooner: routes may change without end.
const PAUSE: Duration = Duration::from_millis(500);

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// A watch on one network namespace; it ends when this is dropped.
#[derive(Debug)]
pub struct Watch {
    changes: mpsc::Receiver<()>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Starts to watch `netns`. To be called on a runtime.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or netlink cannot be opened.
    pub fn start(netns: &Netns) -> Result<Self> {
        let runtime = Handle::current();
        // The socket belongs to the namespace that it was opened in, whoever reads it.
        let opened = netns.run(|| {
            let _context = runtime.enter();
            new_multicast_connection(&GROUPS)
        })?;
        let (connection, _, mut messages) = opened.context("watch a network namespace")?;
        let (sender, changes) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let heard = async {
                while messages.next().await.is_some() {
                    sleep(TOGETHER).await;
                    while let Some(Some(_)) = messages.next().now_or_never() {}
                    if sender.send(()).await.is_err() {
                        return;
                    }
                    sleep(PAUSE).await;
                }
            };
            tokio::select! {
                () = connection => {}
                () = heard => {}
            }
        });
        Ok(Self { changes, task })
    }

    /// Waits for a change; for ever when nothing can be heard any more.
    pub async fn changed(&mut self) {
        if self.changes.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
