//! A process that cannot be mistaken for a later one with its number.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt},
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process, as the agent's pid namespace sees it.
#[derive(Debug)]
pub struct ProcessRef {
    pid: i32,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
}

impl ProcessRef {
    /// The process that connected to a Unix socket; `None`: the agent's pid namespace does not have it.
    ///
    /// # Errors
    ///
    /// When the process has ended.
    pub fn of_peer(connection: &impl AsFd) -> io::Result<Option<Self>> {
        let pid = getsockopt(connection, sockopt::PeerCredentials)?.pid();
        let Some(number) = Pid::from_raw(pid) else { return Ok(None) };
        let pidfd = match getsockopt(connection, sockopt::PeerPidfd) {
            // Before Linux 6.5.
            Err(Errno::ENOPROTOOPT) => pidfd_open(number, PidfdFlags::empty())?,
            found => found?,
        };
        Ok(Some(Self { pid, pidfd }))
    }

    /// Its number, which is its own while it [is alive](Self::is_alive).
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has not ended.
    ///
    /// # Errors
    ///
    /// When poll(2) fails.
    pub fn is_alive(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, process::Command};

    use super::*;

    #[test]
    fn peer_is_alive_until_it_ends() {
        let (own, other) = UnixStream::pair().unwrap();
        let peer = ProcessRef::of_peer(&own).unwrap().unwrap();
        assert_eq!(peer.pid(), std::process::id().cast_signed());
        assert!(peer.is_alive().unwrap());
        drop(other);
        assert!(peer.is_alive().unwrap());

        let mut child = Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let ended = ProcessRef { pid: pid.as_raw_pid(), pidfd };
        child.wait().unwrap();
        assert!(!ended.is_alive().unwrap());
    }
}
