//! Who takes part in a mode: a pod, its proxy, what redirects it, and a server.

use anyhow::{Context as _, Result, ensure};

use super::relay::Relay;
use super::workload::{self, Found, Server, Target, Workload};
use super::{Mode, Options};
use crate::netns::Family;
use crate::process::{Attached, binary};
use crate::topology::{Pod, Style, Topology};

/// A mode, ready to be measured.
pub(super) struct Stage<'a> {
    mode: Mode,
    client: &'a Pod,
    server: &'a Pod,
    relay: Option<&'a Relay>,
}

/// Sets a mode up in namespaces of its own, which are gone when this returns.
pub(super) fn on_stage<T>(
    options: &Options,
    mode: Mode,
    measure: impl FnOnce(&Stage<'_>) -> Result<T>,
) -> Result<T> {
    let mut topology = Topology::new(&[Style::Routed, Style::Routed])?;
    let client = topology.add_pod(0, "bench", "client")?;
    let server = topology.add_pod(1, "bench", "server")?;
    for pod in [&client, &server] {
        pod.netns.set_sysctl("net/ipv4/ip_local_port_range", "1024 65000")?;
    }
    let _server = Server::start(&server.netns)?;
    let relay = match mode {
        Mode::None => None,
        Mode::Explicit => {
            Some(Relay::start(&client.netns, Some([server.v4.into(), server.v6.into()]))?)
        }
        Mode::Ours | Mode::Baseline | Mode::IstioNft | Mode::IstioLegacy | Mode::IstioNative => {
            Some(Relay::start(&client.netns, None)?)
        }
    };
    let agent = match mode {
        Mode::Ours => Some(binary("redirect-agent")?),
        Mode::Baseline => Some(options.baseline.clone().context("give --baseline PATH")?),
        _ => None,
    };
    let _attached = agent.map(|agent| Attached::by(agent, &topology, &client)).transpose()?;
    if let Some(backend) = mode.backend() {
        backend.redirect(&client.netns)?;
    }
    measure(&Stage { mode, client: &client, server: &server, relay: relay.as_ref() })
}

impl Stage<'_> {
    /// Runs a workload for about `slice`, and makes sure that the proxy had all of it.
    pub(super) fn run(
        &self,
        family: Family,
        workload: Workload,
        slice: std::time::Duration,
    ) -> Result<Found> {
        let before = self.relay.map_or(0, Relay::relayed);
        let what = || format!("run {} over {}", workload.as_str(), family.as_str());
        let found = workload::run(&self.client.netns, workload, self.target(family), slice)
            .with_context(what)?;
        if let Some(relay) = self.relay {
            let relayed = relay.relayed() - before;
            ensure!(
                relayed >= found.opened,
                "{}: of {} connections only {relayed} came to the proxy: this is not what the mode is to measure",
                what(),
                found.opened
            );
        }
        Ok(found)
    }

    /// Where the application connects to; the port stands for what the server does.
    fn target(&self, family: Family) -> Target {
        match self.mode {
            Mode::Explicit => Target::Relay(family.localhost()),
            _ => Target::Server(self.server.ip(family)),
        }
    }
}
