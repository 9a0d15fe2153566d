//! The file of a listening Unix socket: who owns it, and when it is removed.

use std::{
    fs, io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};

/// Unlinks the socket on drop, unless somebody has put another one in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

/// Why it is impossible to listen at a path.
#[derive(Debug)]
pub enum Obstacle {
    /// Something that is not ours to delete is in the way.
    NotASocket,
    /// Somebody listens there.
    InUse,
    /// The kernel refuses.
    Io(io::Error),
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl SocketFile {
    /// Takes ownership of the file of a socket that was just bound.
    ///
    /// # Errors
    ///
    /// When its metadata cannot be read.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), id: file_id(path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id) {
            // A file that stays behind is stale, and the next agent removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Removes a socket that nobody listens on, whatever its type.
///
/// # Errors
///
/// Why no other socket can be created there.
pub fn remove_stale(path: &Path) -> Result<(), Obstacle> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
        Ok(meta) if !meta.file_type().is_socket() => return Err(Obstacle::NotASocket),
        Ok(_) => {}
    }
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let probe = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
    let probe = probe.map_err(io::Error::from)?;
    let address = UnixAddr::new(path).map_err(io::Error::from)?;
    match connect(probe.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        },
        Err(Errno::ENOENT) => Ok(()),
        // Answered; answered, but its queue is full; answered, but it is a socket of another type.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Err(Obstacle::InUse),
        Err(e) => Err(io::Error::from(e).into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn successors_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _first = UnixListener::bind(&path).unwrap();
        let file = SocketFile::of(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(SocketFile::of(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn only_a_socket_without_a_listener_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        remove_stale(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(remove_stale(&path), Err(Obstacle::InUse)));
        drop(listener);
        remove_stale(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "").unwrap();
        assert!(matches!(remove_stale(&path), Err(Obstacle::NotASocket)));
    }
}
