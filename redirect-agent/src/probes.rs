//! Which connections count as kubelet's probes, and so reach a pod past its proxy.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::{task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{dataplane::Dataplane, kubelet::Kubelet};

/// How often to check whether kubelet is still in its cgroup.
const LOOK: Duration = Duration::from_millis(250);
/// How long to wait between searches while kubelet is not found: at first, and at most.
const SEARCH: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The addresses from which probes appear to come with istio-cni. Source: Istio `cni/pkg/util/podutil.go`,
/// `HostProbeSNATIP` and `HostProbeSNATIPV6`, their defaults.
const ISTIO_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
const ISTIO_V6: Ipv6Addr =
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// What counts as a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Connections from kubelet's cgroup.
    pub kubelet: bool,
    /// Connections from these ranges, as long as kubelet is not found.
    pub sources: Vec<IpNet>,
    /// Connections from the addresses that istio-cni gives to probes.
    pub istio: bool,
}

/// The settings in effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// The kubelet whose connections are let through.
    pub kubelet: Option<Kubelet>,
    /// The ranges from which connections are let through.
    pub sources: Vec<IpNet>,
    /// Why kubelet is not recognized, if it should be.
    pub problem: Option<String>,
}

impl fmt::Display for InForce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ways = Vec::new();
        if let Some(kubelet) = &self.kubelet {
            ways.push(format!("of kubelet, {kubelet}"));
        }
        if !self.sources.is_empty() {
            let sources: Vec<String> = self.sources.iter().map(IpNet::to_string).collect();
            ways.push(format!("from {}", sources.join(", ")));
        }
        match ways.is_empty() {
            true => f.write_str("probes: none, all go to the proxy")?,
            false => write!(f, "probes: {}", ways.join(", and "))?,
        }
        match &self.problem {
            Some(problem) => write!(f, " ({problem})"),
            None => Ok(()),
        }
    }
}

/// Keeps the kernel's settings for probes current. Clones share it.
#[derive(Clone)]
pub struct Probes {
    dataplane: Arc<Dataplane>,
    settings: Settings,
    in_force: Arc<Mutex<InForce>>,
}

impl Probes {
    /// Applies the settings, as far as that is possible now.
    ///
    /// # Errors
    ///
    /// When the maps cannot be written.
    pub async fn open(dataplane: Arc<Dataplane>, settings: Settings) -> Result<Self> {
        let probes = Self { dataplane, settings, in_force: Arc::default() };
        let wanted = probes.look().await?;
        probes.change(wanted).await?;
        Ok(probes)
    }

    /// What is in force.
    pub fn in_force(&self) -> InForce {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows kubelet until `shutdown`, through restarts and into other cgroups.
    ///
    /// # Errors
    ///
    /// When the maps cannot be written.
    pub async fn run(self, shutdown: CancellationToken) -> Result<()> {
        let mut pause = LOOK;
        while self.settings.kubelet && shutdown.run_until_cancelled(sleep(pause)).await.is_some() {
            let wanted = self.look().await?;
            pause = match wanted.kubelet {
                Some(_) => LOOK,
                None if self.in_force().kubelet.is_some() => SEARCH.0,
                None => (pause * 2).min(SEARCH.1),
            };
            if wanted != self.in_force() {
                self.change(wanted).await?;
            }
        }
        shutdown.cancelled().await;
        Ok(())
    }

    /// Finds the kubelet to follow, and follows it from then on.
    async fn look(&self) -> Result<InForce> {
        let (dataplane, settings) = (Arc::clone(&self.dataplane), self.settings.clone());
        let followed = self.in_force().kubelet;
        spawn_blocking(move || {
            let follow = || {
                let kubelet = match followed.filter(Kubelet::stands) {
                    Some(kubelet) => kubelet,
                    None => Kubelet::find()?,
                };
                let (cgroup, id) = kubelet.open_cgroup()?;
                dataplane.follow_kubelet(&cgroup, id)?;
                anyhow::Ok(kubelet)
            };
            let (kubelet, problem) = match settings.kubelet {
                false => (None, None),
                true => match follow() {
                    Ok(kubelet) => (Some(kubelet), None),
                    Err(e) => (None, Some(format!("{e:#}"))),
                },
            };
            if kubelet.is_none() {
                dataplane.unfollow_kubelet()?;
            }
            let mut sources = Vec::new();
            if settings.istio {
                sources
                    .extend([IpNet::from(IpAddr::from(ISTIO_V4)), IpAddr::from(ISTIO_V6).into()]);
            }
            if kubelet.is_none() {
                sources.extend(settings.sources);
            }
            Ok(InForce { kubelet, sources, problem })
        })
        .await
        .context("look for kubelet")?
    }

    async fn change(&self, wanted: InForce) -> Result<()> {
        let (dataplane, sources) = (Arc::clone(&self.dataplane), wanted.sources.clone());
        spawn_blocking(move || dataplane.set_probe_sources(&sources))
            .await
            .context("write the sources of probes")??;
        match wanted.problem {
            Some(_) => warn!("{wanted}"),
            None => info!("{wanted}"),
        }
        *self.in_force.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
        Ok(())
    }
}
