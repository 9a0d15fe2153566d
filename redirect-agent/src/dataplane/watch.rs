//! Hears of changes to a pod's interfaces, addresses, routes and rules as they happen.

use std::{io, time::Duration};

use anyhow::{Context as _, Result};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, Socket, TokioSocket, protocols::NETLINK_ROUTE,
};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle, time::sleep};

use crate::netns::Netns;

/// Changes that belong together, such as those of an interface that comes up, are told of once.
const TOGETHER: Duration = Duration::from_millis(50);
/// After a change was told of, the next one is told of no sooner: routes may change without end.
const PAUSE: Duration = Duration::from_millis(500);

const GROUPS: [u32; 7] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
];

/// A watch on one network namespace; it ends when this is dropped.
#[derive(Debug)]
pub struct Watch {
    changes: mpsc::Receiver<()>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Starts to watch `netns`. To be called on a runtime. It begins with a change: whatever changed between
    /// the caller's last look and now was not heard.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or netlink cannot be opened.
    pub fn start(netns: &Netns) -> Result<Self> {
        let runtime = Handle::current();
        // The socket belongs to the namespace that it was opened in, whoever reads it.
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

    /// Waits for a change; for ever when nothing can be heard any more.
    pub async fn changed(&mut self) {
        if self.changes.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

fn open() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    // The kernel tells a socket without an address nothing.
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

/// Whether it says that a message was lost, which is one all the same.
fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Reads what has come; what it says does not matter.
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
