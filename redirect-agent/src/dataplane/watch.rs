//! Reports changes to a pod's interfaces, addresses, routes, rules and filters as they happen.

use std::{io, time::Duration};

use anyhow::{Context as _, Result};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, Socket, TokioSocket, protocols::NETLINK_ROUTE,
};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle, time::sleep};

use crate::netns::Netns;

/// Changes that belong together, such as those of an interface that comes up, are reported once.
const TOGETHER: Duration = Duration::from_millis(50);
/// Minimum time between two reports: routes may change without end.
const PAUSE: Duration = Duration::from_millis(500);

const GROUPS: [u32; 8] = [
    // Filters of ours that somebody deletes, where the kernel has no tcx.
    libc::RTNLGRP_TC,
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
];

/// A watch on one network namespace. It ends when this is dropped.
#[derive(Debug)]
pub struct Watch {
    changes: mpsc::Receiver<()>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Starts to watch `netns`. Must be called within a tokio runtime. It reports a change at once, because
    /// changes between the caller's last look and now went unnoticed.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or netlink cannot be opened.
    pub fn start(netns: &Netns) -> Result<Self> {
        let runtime = Handle::current();
        // The socket belongs to the namespace in which it was opened, whoever reads from it.
        let opened = netns.run(|| {
            let _context = runtime.enter();
            open()
        })?;
        let mut socket = opened.context("watch a network namespace")?;
        let (sender, changes) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            loop {
                sleep(TOGETHER).await;
                drain(socket.socket_ref());
                if sender.send(()).await.is_err() {
                    return;
                }
                sleep(PAUSE).await;
                if heard(&mut socket).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { changes, task })
    }

    /// Waits for a change; forever if the socket has failed.
    pub async fn changed(&mut self) {
        if self.changes.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

fn open() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    // The kernel sends nothing to a socket without an address.
    socket.socket_mut().bind_auto()?;
    GROUPS.iter().try_for_each(|group| socket.socket_ref().add_membership(*group))?;
    Ok(socket)
}

/// Waits for a message.
async fn heard(socket: &mut TokioSocket) -> io::Result<()> {
    let mut start = [0; 1];
    match socket.recv(&mut &mut start[..]).await {
        Err(e) if !is_lost(&e) => Err(e),
        _ => Ok(()),
    }
}

/// Whether it says that a message was lost, which also counts as a change.
fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Reads and discards what has arrived.
fn drain(socket: &Socket) {
    let mut start = [0; 1];
    loop {
        match socket.recv(&mut &mut start[..], 0) {
            Ok(_) => {}
            Err(e) if is_lost(&e) => {}
            Err(_) => return,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
