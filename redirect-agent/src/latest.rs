//! Shares the result of a slow look among all who ask at the same time.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{spawn, sync::Mutex, time::Instant};

/// The last result.
#[derive(Debug)]
pub struct Latest<T>(Arc<Mutex<Option<Look<T>>>>);

#[derive(Debug)]
struct Look<T> {
    began: Instant,
    found: Arc<T>,
}

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Send + Sync + 'static> Latest<T> {
    /// The result of `look`, or that of an earlier look that began at most `max_age` before this call. There
    /// is never more than one look at a time.
    ///
    /// # Errors
    ///
    /// When `look` fails. The next caller looks again.
    pub async fn get<F>(&self, max_age: Duration, look: impl FnOnce() -> F) -> Result<Arc<T>>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let asked = Instant::now();
        let mut latest = Arc::clone(&self.0).lock_owned().await;
        if let Some(last) = &*latest
            && last.began + max_age >= asked
        {
            return Ok(Arc::clone(&last.found));
        }
        let began = Instant::now();
        let looking = look();
        // In a task of its own: a look cannot be interrupted, and the next one has to wait for its end even
        // if nobody waits for its result.
        let looked = spawn(async move {
            let found = Arc::new(looking.await?);
            *latest = Some(Look { began, found: Arc::clone(&found) });
            Ok(found)
        });
        looked.await.context("look")?
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use anyhow::bail;
    use futures_util::{FutureExt as _, future::join_all};
    use tokio::task::yield_now;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn those_who_ask_at_once_share_a_look() {
        let (latest, looks) = (Latest::default(), AtomicUsize::new(0));
        let look = || {
            let n = looks.fetch_add(1, Ordering::Relaxed);
            async move {
                yield_now().await;
                Ok(n)
            }
        };
        // The first look began before the others asked, the second one after.
        let found = join_all((0..16).map(|_| latest.get(Duration::ZERO, look))).await;
        let found: Vec<usize> = found.into_iter().map(|found| *found.unwrap()).collect();
        assert!(found[0] == 0 && found[1..].iter().all(|&n| n == 1), "{found:?}");
        assert_eq!(*latest.get(LONG, look).await.unwrap(), 1);
        assert_eq!(*latest.get(Duration::ZERO, look).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn those_who_went_away_leave_one_look_behind() {
        let (latest, looks) = (Latest::default(), AtomicUsize::new(0));
        for _ in 0..16 {
            let gone = latest.get(Duration::ZERO, || {
                looks.fetch_add(1, Ordering::Relaxed);
                pending::<Result<()>>()
            });
            assert!(gone.now_or_never().is_none());
            yield_now().await;
        }
        assert_eq!(looks.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn after_a_failure_the_next_one_looks_again() {
        let latest = Latest::default();
        assert!(latest.get(LONG, || async { bail!("no") }).await.is_err());
        assert_eq!(*latest.get(LONG, || async { Ok(1) }).await.unwrap(), 1);
    }
}
