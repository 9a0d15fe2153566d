//! The DaemonSet that runs the agent. An agent that is told to stop asks whether it will be started again.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Result;
use k8s_openapi::api::apps::v1 as k8s;
use kube::{Api, Error};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::{Config, client, explain};
use crate::cni::entry::DaemonSet;

/// How long one answer may take, and how often the question is asked: kubelet leaves 60 s for
/// all.
const TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// How long the API server has to refuse the agent. One that starts refuses everybody until it has
/// read its roles, which takes a second or two.
const REFUSED: Duration = Duration::from_secs(5);
/// How long to wait between questions while all is well.
const LONG_PAUSE: Duration = Duration::from_secs(30);
/// Requests per time.
const RATE: (u64, Duration) = (10, Duration::from_secs(1));

/// The DaemonSet, by the API server.
pub struct Owner {
    api: Api<k8s::DaemonSet>,
    daemon_set: DaemonSet,
    /// The API server has answered once, so a later refusal means that the right was revoked.
    answered: AtomicBool,
}

/// What happened to the DaemonSet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    Deleted,
    Refused,
}

impl Owner {
    /// The DaemonSet of this name.
    ///
    /// # Errors
    ///
    /// When `config` cannot be used.
    pub fn new(config: Config, daemon_set: DaemonSet) -> Result<Self> {
        let api = Api::namespaced(client(config, RATE, || ())?, &daemon_set.namespace);
        Ok(Self { api, daemon_set, answered: AtomicBool::new(false) })
    }

    /// Checks in advance whether the question will be answered, and reports if not.
    pub async fn look(&self) {
        let mut told = None;
        loop {
            match self.ask().await {
                Ok(_) => return,
                Err(why) if told.as_ref() != Some(&why) => {
                    warn!(
                        "{why}; until that can be read, an agent that ends because it is uninstalled stays \
                         installed"
                    );
                    told = Some(why);
                }
                Err(_) => {}
            }
            sleep(LONG_PAUSE).await;
        }
    }

    /// Whether the DaemonSet is deleted or being deleted, and the agent with it for good. An upgrade, a
    /// restart of the node and an unreachable API server do not count.
    pub async fn is_deleted(&self) -> bool {
        let (mut failures, mut refused) = (0, None);
        while failures < ATTEMPTS {
            match self.ask().await {
                Ok(Fate::Deleted) => return true,
                Ok(Fate::Refused) => {
                    let since = *refused.get_or_insert_with(Instant::now);
                    if since.elapsed() >= REFUSED {
                        return true;
                    }
                }
                Ok(Fate::Lives) => {
                    info!(
                        "DaemonSet {} is there: everything stays for the next agent",
                        self.daemon_set
                    );
                    return false;
                }
                Err(why) => {
                    warn!("{why}");
                    failures += 1;
                }
            }
            sleep(PAUSE).await;
        }
        warn!(
            "everything stays as it is; if the agent is gone for good, run `redirect-agent cleanup` here"
        );
        false
    }

    async fn ask(&self) -> Result<Fate, String> {
        let daemon_set = &self.daemon_set;
        let asked = timeout(TIMEOUT, self.api.get_metadata_opt(&daemon_set.name)).await;
        let fate = match asked {
            Ok(Ok(Some(found))) if found.metadata.deletion_timestamp.is_none() => Fate::Lives,
            Ok(Ok(_)) => Fate::Deleted,
            // The service account is gone. Source: Istio `cni/pkg/nodeagent/server.go`,
            // `ShouldStopCleanup`.
            Ok(Err(Error::Api(status))) if status.code == 401 => Fate::Refused,
            // Its role is gone, but existed before: uninstalling deletes both.
            Ok(Err(Error::Api(status)))
                if status.code == 403 && self.answered.load(Ordering::Relaxed) =>
            {
                Fate::Refused
            }
            Ok(Err(error)) => {
                return Err(format!("get DaemonSet {daemon_set}: {}", explain(&error)));
            }
            Err(_) => {
                return Err(format!("get DaemonSet {daemon_set}: no answer within {TIMEOUT:?}"));
            }
        };
        self.answered.store(true, Ordering::Relaxed);
        Ok(fate)
    }
}
