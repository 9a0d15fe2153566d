//! Watches one kind of object: kube's watcher, without the ways in which it can get stuck.

use std::{fmt::Debug, time::Duration};

use futures_util::{StreamExt as _, pin_mut};
use kube::{
    Api, Error, Resource,
    runtime::{
        utils::Backoff as _,
        watcher::{self, DefaultBackoff, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, time::sleep};

/// The longest pause between attempts, so that a server that is back is noticed soon.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Sends every event of `api`'s objects to `events`, and every failure with its reason, until nobody listens.
/// Pauses after failures, for longer and longer.
pub(crate) async fn follow<K, T>(
    api: Api<K>,
    config: watcher::Config,
    events: mpsc::Sender<T>,
    update: impl Fn(Result<watcher::Event<K>, String>) -> T,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut backoff = DefaultBackoff::default();
    let mut last = String::new();
    loop {
        let stream = watcher(api.clone(), config.clone());
        pin_mut!(stream);
        while let Some(next) = stream.next().await {
            let failed = match next {
                Ok(event) => {
                    // `Init` comes before the server was asked for anything.
                    if !matches!(event, watcher::Event::Init) {
                        backoff.reset();
                    }
                    if events.send(update(Ok(event))).await.is_err() {
                        return;
                    }
                    continue;
                }
                Err(failed) => failed,
            };
            let why = explain(&failed);
            if why != last {
                // The server's state has changed, so it may come back soon.
                backoff.reset();
                last.clone_from(&why);
            }
            if events.send(update(Err(why))).await.is_err() {
                return;
            }
            sleep(backoff.next().unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE)).await;
            if needs_a_new_list(&failed) {
                break;
            }
        }
    }
}

/// Whether to list again, where kube's watcher would continue from where it was.
///
/// It lists again by itself if 410 comes as an event of the watch, but asks for the same version forever if
/// 410 is the response. An event that it cannot parse is lost.
fn needs_a_new_list(failed: &watcher::Error) -> bool {
    match failed {
        watcher::Error::WatchStartFailed(Error::Api(status)) => match status.code {
            400 | 410 => true,
            // The server has been restored to an older state.
            504 => status.message.contains("resource version"),
            _ => false,
        },
        watcher::Error::WatchFailed(Error::SerdeError(_)) => true,
        _ => false,
    }
}

/// The failure in one line, with what an operator can do about it.
fn explain(failed: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match failed {
        InitialListFailed(cause) | WatchStartFailed(cause) | WatchFailed(cause)
            if super::is_unreachable(cause) =>
        {
            super::explain(cause)
        }
        InitialListFailed(cause) => format!("list them: {}", super::explain(cause)),
        WatchStartFailed(cause) | WatchFailed(cause) => {
            format!("watch them: {}", super::explain(cause))
        }
        failed => format!("watch them: {failed}"),
    }
}
