//! How long a part may take, and how long a file may be.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// How long a part that does not need the agent may take.
const WITHIN: Duration = Duration::from_secs(20);

/// The time for all parts together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    end: Instant,
    whole: Duration,
}

impl Clock {
    /// From now on.
    pub(super) fn start(whole: Duration) -> Self {
        Self { end: Instant::now() + whole, whole }
    }

    pub(super) fn is_over(self) -> bool {
        Instant::now() >= self.end
    }

    /// # Errors
    ///
    /// Once the time is over.
    pub(super) fn check(self) -> Result<()> {
        let whole = self.whole;
        ensure!(!self.is_over(), "skipped: collecting has taken the {whole:?} of --timeout");
        Ok(())
    }

    /// Waits for a part, for this time at most. `None`: it took longer than that.
    ///
    /// # Errors
    ///
    /// When the time for all parts is over, before or meanwhile.
    pub(super) async fn within<T>(
        self,
        most: Duration,
        part: impl Future<Output = T>,
    ) -> Result<Option<T>> {
        self.check()?;
        let own = Instant::now() + most;
        match timeout_at(own.min(self.end), part).await {
            Ok(done) => Ok(Some(done)),
            Err(_) => self.check().map(|()| None),
        }
    }

    /// Runs what may hang, on a thread that nobody waits for after [`WITHIN`]: the command ends all the same.
    pub(super) async fn bounded<T: Send + 'static>(
        self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.check()?;
        let (send, receive) = oneshot::channel();
        thread::Builder::new()
            .name("bundle".to_owned())
            .spawn(move || send.send(work()).ok())
            .context("start a thread")?;
        match self.within(WITHIN, receive).await? {
            Some(Ok(done)) => done,
            Some(Err(_)) => bail!("a thread panicked"),
            None => bail!("it took longer than {WITHIN:?}"),
        }
    }
}

/// The beginning of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Beginning {
    pub(super) content: Vec<u8>,
    /// Whether that is not all of it.
    pub(super) is_cut: bool,
}

/// Reads a file, but no more of it than `most` bytes.
pub(super) fn beginning(path: &Path, most: usize) -> io::Result<Beginning> {
    let mut content = Vec::new();
    File::open(path)?.take(most as u64 + 1).read_to_end(&mut content)?;
    let is_cut = content.len() > most;
    content.truncate(most);
    Ok(Beginning { content, is_cut })
}

/// Reads a file that is of no use in part.
pub(super) fn all(path: &Path, most: usize) -> Result<Vec<u8>> {
    let context = || format!("read {}", path.display());
    let Beginning { content, is_cut } = beginning(path, most).with_context(context)?;
    ensure!(!is_cut, "{} is longer than {most} bytes: look at it yourself", path.display());
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn file_is_read_up_to_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "12345").unwrap();
        let read = |most| beginning(&path, most).unwrap();
        assert_eq!(read(5), Beginning { content: b"12345".to_vec(), is_cut: false });
        assert_eq!(read(4), Beginning { content: b"1234".to_vec(), is_cut: true });
        assert_eq!(all(&path, 5).unwrap(), b"12345");
        let error = format!("{:#}", all(&path, 4).unwrap_err());
        assert!(error.ends_with("x is longer than 4 bytes: look at it yourself"), "{error}");
        // It has no end.
        assert_eq!(beginning(Path::new("/dev/zero"), 9).unwrap().content.len(), 9);
    }

    #[tokio::test]
    async fn when_the_time_is_over_nothing_is_begun_and_nobody_waited_for() {
        let clock = Clock::start(Duration::from_millis(50));
        let began = Instant::now();
        let slow = || {
            thread::sleep(Duration::from_secs(5));
            Ok(())
        };
        let cut = clock.bounded(slow).await.unwrap_err().to_string();
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        let skipped = clock.bounded(|| Ok(())).await.unwrap_err().to_string();
        for error in [cut, skipped] {
            assert_eq!(error, "skipped: collecting has taken the 50ms of --timeout");
        }
        let clock = Clock::start(Duration::from_secs(60));
        let hangs = std::future::pending::<()>();
        assert_eq!(clock.within(Duration::from_millis(1), hangs).await.unwrap(), None);
    }
}
