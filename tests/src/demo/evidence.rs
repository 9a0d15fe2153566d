//! How a call went, told from what the wire, the proxies and the application saw.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;
use serde::Serialize;

use super::cluster::Cluster;
use crate::app::{Answer, Call, Outcome, greeting, read_greeting};
use crate::hbone::{self, HBONE_PORT, HboneClient, Record};
use crate::netns::Netns;
use crate::raw::{RST, SYN, Segment};
use crate::sniff::PacketSocket;
use crate::topology::Pod;

const PATIENCE: Duration = Duration::from_secs(5);

/// What carried a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Over {
    /// mTLS and HTTP/2 CONNECT to the destination's port 15008.
    #[serde(rename = "HBONE")]
    Hbone,
    /// In clear on the network, but through the proxy of the client, of the server, or of both.
    #[serde(rename = "plaintext through the proxy")]
    Proxy,
    /// From the client to the application, with no proxy.
    #[serde(rename = "direct")]
    Direct,
    /// The application was not reached.
    #[serde(rename = "refused")]
    Refused,
    /// What was seen fits nothing of that.
    #[serde(rename = "unclear")]
    Unclear,
}

impl Over {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Over::Hbone => "HBONE",
            Over::Proxy => "plaintext through the proxy",
            Over::Direct => "direct",
            Over::Refused => "refused",
            Over::Unclear => "unclear",
        }
    }
}

/// A call as it was seen, or should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// What carried it.
    pub over: Over,
    /// The identity that the destination's proxy saw in the client's certificate.
    pub identity: Option<String>,
    /// The client's address as the application saw it.
    pub app_saw: Option<IpAddr>,
    /// Which application answered, and at which of its addresses.
    pub answered_by: Option<String>,
    /// Why it was refused.
    pub refused_by: Option<String>,
}

/// What [`Seen::over`] was told from.
#[derive(Clone, Debug, Serialize)]
pub struct Evidence {
    /// What went over the network interfaces of client and server.
    pub wire: Wire,
    /// What the proxy of the client's pod wrote about it.
    pub client_proxy: Option<Record>,
    /// What the proxy of the server's pod wrote about it.
    pub server_proxy: Option<Record>,
    /// What came of it for the client.
    pub outcome: String,
}

/// What went over the network interfaces of client and server.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Wire {
    /// Segments with data from or to port 15008.
    pub hbone: usize,
    /// Segments with what the application said, in clear.
    pub cleartext: usize,
    /// SYNs from the client's address to the address that was called.
    pub syn: usize,
    /// RSTs back from there.
    pub rst: usize,
}

/// How the client calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// As any application.
    Plain,
    /// It speaks HBONE by itself.
    Hbone,
}

/// [`Seen::refused_by`]: the policy, which asks for mTLS.
pub(super) const STRICT: &str = "STRICT";
/// [`Seen::refused_by`]: the kernel, because nobody listens on the port.
pub(super) const NOBODY_LISTENS: &str = "RST";

/// Calls `target` from a pod and watches; `to` is the pod that should answer, if it is one.
pub(super) fn observe(
    cluster: &Cluster,
    from: &Pod,
    to: Option<&Pod>,
    target: SocketAddr,
    manner: Manner,
) -> Result<(Seen, Evidence)> {
    let before: Vec<_> = cluster.connections()?.iter().map(Vec::len).collect();
    let mut taps = vec![Tap::open(&from.netns)?];
    if let Some(to) = to.filter(|to| to.v4 != from.v4) {
        taps.push(Tap::open(&to.netns)?);
    }
    let outcome = match manner {
        Manner::Plain => Call::to(target).within(PATIENCE).make(&from.netns)?,
        Manner::Hbone => call_over_hbone(cluster, from, target)?,
    };
    let said = match &outcome {
        Outcome::Answered(answer) => Some(said(answer)),
        _ => None,
    };
    let client_ip = if target.is_ipv4() { from.v4.into() } else { from.v6.into() };
    let mut wire = Wire::default();
    for tap in &taps {
        tap.read_into(&mut wire, client_ip, target, said.as_deref())?;
    }
    let new = cluster.connections()?.into_iter().zip(before);
    let new: Vec<_> = new.flat_map(|(records, seen)| records.into_iter().skip(seen)).collect();
    let of = |pod: &Pod, direction: fn(hbone::Direction) -> bool| {
        let name = pod.to_string();
        new.iter().find(|r| r.pod == name && direction(r.direction)).cloned()
    };
    let client_proxy = of(from, |direction| direction == hbone::Direction::Outbound);
    let server_proxy = to.and_then(|to| of(to, |d| d != hbone::Direction::Outbound));
    let evidence = Evidence { wire, client_proxy, server_proxy, outcome: outcome.to_string() };
    let itself = to.is_some_and(|to| to.v4 == from.v4);
    Ok((judge(&outcome, &evidence, itself), evidence))
}

fn judge(outcome: &Outcome, evidence: &Evidence, itself: bool) -> Seen {
    let Evidence { wire, client_proxy, server_proxy, .. } = evidence;
    let inbound_hbone = server_proxy.as_ref().filter(|record| {
        record.direction == hbone::Direction::Inbound && record.result == hbone::Outcome::Ok
    });
    let identity = server_proxy.as_ref().and_then(|record| record.peer_identity.clone());
    match outcome {
        Outcome::Answered(answer) => {
            let in_clear = wire.cleartext > 0;
            let proxies = client_proxy.is_some() || server_proxy.is_some();
            let over = match (inbound_hbone.is_some(), wire.hbone > 0, in_clear, proxies) {
                (true, true, false, _) => Over::Hbone,
                (false, _, true, true) => Over::Proxy,
                (false, false, true, false) if wire.syn > 0 => Over::Direct,
                // It stays in the pod: nothing is on the wire.
                (false, false, false, false) if itself => Over::Direct,
                _ => Over::Unclear,
            };
            Seen {
                over,
                identity,
                app_saw: Some(answer.saw_peer.ip()),
                answered_by: Some(format!("{} at {}", answer.by, answer.saw_local)),
                refused_by: None,
            }
        }
        refused => {
            let denied = server_proxy
                .as_ref()
                .filter(|record| record.result == hbone::Outcome::Denied)
                .and_then(|record| record.detail.as_deref());
            let refused_by = match (refused, denied) {
                (Outcome::Closed { bytes: 0 }, Some(detail)) if detail.contains("STRICT") => STRICT,
                (Outcome::Refused { .. }, None) if wire.rst > 0 => NOBODY_LISTENS,
                _ => "unclear",
            };
            Seen {
                over: if refused_by == "unclear" { Over::Unclear } else { Over::Refused },
                identity,
                app_saw: None,
                answered_by: None,
                refused_by: Some(refused_by.to_owned()),
            }
        }
    }
}

fn call_over_hbone(cluster: &Cluster, from: &Pod, target: SocketAddr) -> Result<Outcome> {
    let client = HboneClient::new(cluster.ca_dir(), &cluster.identity(&from.to_string())?)?;
    let line = from.netns.block_on(|| async move {
        let ask = async { client.connect(target).await?.ask("hello").await.map_err(Into::into) };
        let asked: Result<Result<String>, _> = tokio::time::timeout(PATIENCE, ask).await;
        asked.context("wait for an answer over HBONE")?
    })?;
    Ok(match read_greeting(&format!("{line}\n")) {
        Some(answer) => Outcome::Answered(answer),
        None => Outcome::Closed { bytes: line.len() },
    })
}

/// What the application said first.
fn said(answer: &Answer) -> String {
    let accepted = crate::app::Accepted { peer: answer.saw_peer, local: answer.saw_local };
    greeting(&answer.by, accepted)
}

/// Sees what goes over a pod's `eth0`: whatever was on it before it is read has been seen.
struct Tap {
    socket: PacketSocket,
    interface: usize,
}

impl Tap {
    fn open(netns: &Netns) -> Result<Self> {
        let index = netns.run(|| if_nametoindex("eth0").context("find eth0"))?;
        let interface = usize::try_from(index).context("convert an interface's index")?;
        Ok(Self { socket: PacketSocket::open(netns)?, interface })
    }

    fn read_into(
        &self,
        wire: &mut Wire,
        client: IpAddr,
        target: SocketAddr,
        said: Option<&str>,
    ) -> Result<()> {
        while let Some(frame) = self.socket.receive(Duration::ZERO)? {
            let segment = frame.segment().filter(|_| frame.interface == self.interface);
            let Some(Segment { src, dst, flags, payload, .. }) = segment else { continue };
            let said = said.map(str::as_bytes).unwrap_or_default();
            let tells = !said.is_empty() && payload.windows(said.len()).any(|part| part == said);
            let hbone = [src.port(), dst.port()].contains(&HBONE_PORT) && !payload.is_empty();
            wire.cleartext += usize::from(tells);
            wire.hbone += usize::from(hbone);
            wire.syn += usize::from(flags & SYN != 0 && src.ip() == client && dst == target);
            wire.rst += usize::from(flags & RST != 0 && dst.ip() == client && src == target);
        }
        Ok(())
    }
}
