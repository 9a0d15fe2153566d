//! Who takes part in a mode: a pod, its proxy, what redirects it, and a server.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::outside::Neighbourhood;
use super::programs::{Cost, cost_of};
use super::relay::Relay;
use super::workload::{self, Found, Server, Target, Workload};
use super::{Mode, Options};
use crate::attached::{self, attached};
use crate::netns::{Family, Netns};
use crate::process::{Attached, binary};
use crate::topology::{Pod, Style, Topology};

/// With programs that are not in the pod's namespace, so many runs are those of their own pod, which does
/// nothing but to look for neighbors: runs for each connection, request, query or GB.
const NONE: f64 = 0.01;

/// A mode, ready to be measured.
pub(super) struct Stage<'a> {
    mode: Mode,
    client: &'a Pod,
    server: &'a Pod,
    relay: Option<&'a Relay>,
    /// Programs that might run: those of the pod, and outside the mesh those of the pod beside it.
    programs: Vec<attached::Attached>,
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
        Mode::None | Mode::Outside => None,
        Mode::Explicit => {
            Some(Relay::start(&client.netns, Some([server.v4.into(), server.v6.into()]))?)
        }
        Mode::Ours | Mode::Baseline | Mode::IstioNft | Mode::IstioLegacy | Mode::IstioNative => {
            Some(Relay::start(&client.netns, None)?)
        }
    };
    let neighbourhood = match mode {
        Mode::Outside => Some(Neighbourhood::start(&mut topology, &client)?),
        _ => None,
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
    let with_programs = neighbourhood.as_ref().map_or(&client, Neighbourhood::member);
    let programs = attached(&with_programs.netns)?;
    let relay = relay.as_ref();
    measure(&Stage { mode, client: &client, server: &server, relay, programs })
}

impl Stage<'_> {
    /// The mode.
    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// The namespace of the pod that calls.
    pub(super) fn netns(&self) -> &Netns {
        &self.client.netns
    }

    /// Runs a workload for about `slice`, and makes sure that the proxy had all of it.
    pub(super) fn run(&self, family: Family, workload: Workload, slice: Duration) -> Result<Found> {
        self.through_the_proxy(workload, || {
            let found = workload::run(self.netns(), workload, self.target(family), slice)?;
            Ok((found.opened, found))
        })
        .with_context(|| format!("run {} over {}", workload.as_str(), family.as_str()))
    }

    /// Runs what opens some connections, or queries, and tells how many; an error unless the proxy had
    /// them all: a mode that redirects nothing would look fast.
    pub(super) fn through_the_proxy<T>(
        &self,
        workload: Workload,
        run: impl FnOnce() -> Result<(u64, T)>,
    ) -> Result<T> {
        let count = |relay: &Relay| match workload {
            Workload::Dns => relay.asked(),
            _ => relay.relayed(),
        };
        let before = self.relay.map_or(0, count);
        let (opened, found) = run()?;
        if let Some(relay) = self.relay {
            let relayed = count(relay) - before;
            ensure!(
                relayed >= opened,
                "only {relayed} of {opened} connections or queries came to the proxy: the others went past it"
            );
        }
        Ok(found)
    }

    /// What the programs cost with a workload, if there are any.
    ///
    /// # Errors
    ///
    /// Also when programs ran for a pod outside the mesh.
    pub(super) fn cost(
        &self,
        family: Family,
        workload: Workload,
        slice: Duration,
    ) -> Result<Option<Cost>> {
        if self.programs.is_empty() {
            return Ok(None);
        }
        let run = || self.run(family, workload, slice);
        let cost = cost_of(&self.programs, self.netns(), run)?;
        if self.mode == Mode::Outside {
            let found = attached(self.netns())?;
            ensure!(found.is_empty(), "{found:?} are attached in a pod outside the mesh");
            // One GB is many packets.
            ensure!(
                cost.runs < NONE * cost.packets.max(1.0),
                "programs ran {} times for each {} of a pod outside the mesh",
                cost.runs,
                workload.per()
            );
        }
        Ok(Some(cost))
    }

    /// Where the application connects to; the port stands for what the server does.
    pub(super) fn target(&self, family: Family) -> Target {
        match self.mode {
            Mode::Explicit => Target::Relay(family.localhost()),
            _ => Target::Server(self.server.ip(family)),
        }
    }
}
