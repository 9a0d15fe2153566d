//! A verdict as the control API and `observe` show it, and which are asked for.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use ipnet::IpNet;
use redirect_ebpf::abi::{Counter, VerdictEvent};
use serde::{Deserialize, Serialize};

use super::Names;
use crate::{
    membership::{NameError, PodKey},
    overrides::Target,
    traffic::parse_range,
};

const TCP: u32 = 6;
const UDP: u32 = 17;

/// Body of `POST /observe`: which verdicts; all of them by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// Only those made in these pods, where any are given.
    pub targets: Vec<Target>,
    /// Only those about packets to there.
    pub to: Option<To>,
    /// Only those about packets to this port.
    pub port: Option<u16>,
    /// Only these, by name, where any are given.
    pub verdicts: Vec<String>,
    /// Only those that refuse or drop.
    pub refused: bool,
}

impl Request {
    /// Whether it asks for this one.
    pub fn selects(&self, verdict: &Verdict) -> bool {
        let in_pod = |target: &Target| verdict.pod.as_ref().is_some_and(|pod| target.is_of(pod));
        let to = verdict.destination.as_ref();
        (self.targets.is_empty() || self.targets.iter().any(in_pod))
            && self.to.as_ref().is_none_or(|wanted| to.is_some_and(|to| wanted.is_at(to)))
            && self.port.is_none_or(|port| to.is_some_and(|to| to.port == port))
            && (self.verdicts.is_empty() || self.verdicts.contains(&verdict.verdict))
            && (!self.refused || is_refusal(&verdict.verdict))
    }
}

/// Whether the packet did not get where its sender wanted it, by the name of the verdict.
pub(crate) fn is_refusal(verdict: &str) -> bool {
    verdict.starts_with("refused_") || verdict.starts_with("dropped_") || verdict == "no_listener"
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum To {
    /// To an address in this range.
    Range(IpNet),
    /// To a pod of this node.
    Pods(Target),
}

impl To {
    fn is_at(&self, endpoint: &Endpoint) -> bool {
        match self {
            To::Range(range) => range.contains(&endpoint.ip),
            To::Pods(target) => endpoint.pod.as_ref().is_some_and(|pod| target.is_of(pod)),
        }
    }
}

impl FromStr for To {
    type Err = NameError;

    fn from_str(s: &str) -> Result<To, NameError> {
        match parse_range(s) {
            Ok(range) => Ok(To::Range(range)),
            Err(_) => s.parse().map(To::Pods),
        }
    }
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            To::Range(range) => range.fmt(f),
            To::Pods(target) => target.fmt(f),
        }
    }
}

crate::text::by_text!(To);

/// A line of the answer to `POST /observe`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A verdict.
    Verdict(Box<Verdict>),
    /// There were more than could be reported.
    Dropped {
        /// How many verdicts, asked for or not, are missing here.
        dropped: u64,
    },
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Verdict(verdict) => verdict.fmt(f),
            Line::Dropped { dropped } => {
                write!(f, "({dropped} verdicts dropped: too many at once)")
            }
        }
    }
}

/// A verdict of the datapath, counted under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// When, in UTC: `2026-08-01T12:00:00.123456Z`.
    pub time: String,
    /// The node's name.
    pub node: String,
    /// The pod in which it was made, where the agent knows it.
    pub pod: Option<PodKey>,
    /// The inode number of that pod's network namespace.
    pub netns: u32,
    /// Its name: that of its counter.
    pub verdict: String,
    /// `tcp` or `udp`; `None`: the packet could not be read.
    pub protocol: Option<String>,
    /// Where the packet comes from; `None`: it could not be read.
    pub source: Option<Endpoint>,
    /// Where it goes.
    pub destination: Option<Endpoint>,
}

/// An end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
    /// The pod of this node that has the address.
    pub pod: Option<PodKey>,
}

impl Verdict {
    /// The verdict of an event; `now` is one instant by both clocks. `None` for a verdict that this build
    /// does not know.
    pub(super) fn of(
        event: &VerdictEvent,
        now: (SystemTime, u64),
        node: &str,
        names: &Names,
    ) -> Option<Self> {
        let counter = |counter: Counter| counter as u32 == event.counter;
        let (_, verdict) = Counter::ALL.into_iter().find(|(known, _)| counter(*known))?;
        let protocol = match event.protocol {
            TCP => Some("tcp"),
            UDP => Some("udp"),
            _ => None,
        };
        let end = |addr: redirect_ebpf::abi::Addr, port| {
            let ip = addr.to_ip();
            Endpoint { ip, port, pod: names.addresses.get(&ip).cloned() }
        };
        let ago = Duration::from_nanos(now.1.saturating_sub(event.at_ns));
        let time = now.0.checked_sub(ago).unwrap_or(now.0);
        Some(Self {
            time: humantime::format_rfc3339_micros(time).to_string(),
            node: node.to_owned(),
            pod: names.pods.get(&event.pod_id).cloned(),
            netns: event.pod_id,
            verdict: verdict.to_owned(),
            protocol: protocol.map(str::to_owned),
            source: protocol.map(|_| end(event.src, event.src_port)),
            destination: protocol.map(|_| end(event.dst, event.dst_port)),
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pod = match &self.pod {
            Some(pod) => pod.to_string(),
            None => format!("netns {}", self.netns),
        };
        // The time of the day, without its `Z`.
        let time = self.time.get(11..26).unwrap_or(&self.time);
        write!(f, "{time}  {pod:<24}  {:<22}  ", self.verdict)?;
        match (&self.protocol, &self.source, &self.destination) {
            (Some(protocol), Some(from), Some(to)) => write!(f, "{protocol} {from} > {to}"),
            _ => f.write_str("a packet that cannot be read"),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", SocketAddr::new(self.ip, self.port))?;
        match &self.pod {
            Some(pod) => write!(f, " ({pod})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn key(name: &str) -> PodKey {
        format!("shop/{name}").parse().unwrap()
    }

    fn addr(text: &str) -> redirect_ebpf::abi::Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn names() -> Names {
        Names {
            pods: HashMap::from([(7, key("web"))]),
            addresses: ["10.0.0.2", "fd00::2"]
                .map(|ip| (ip.parse().unwrap(), key("web")))
                .into_iter()
                .chain([("10.0.0.9".parse().unwrap(), key("cart"))])
                .collect(),
        }
    }

    fn event(counter: Counter, src: &str, dst: &str) -> VerdictEvent {
        VerdictEvent {
            at_ns: 1_000_000_000,
            pod_id: 7,
            counter: counter as u32,
            src: addr(src),
            dst: addr(dst),
            src_port: 40_000,
            dst_port: 8080,
            protocol: TCP,
        }
    }

    fn verdict(event: &VerdictEvent) -> Verdict {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
        Verdict::of(event, (now, 2_500_000_000), "n1", &names()).unwrap()
    }

    #[test]
    fn line_names_the_pod_the_verdict_and_both_ends() {
        let v4 = verdict(&event(Counter::RedirectedOutbound, "10.0.0.2", "10.0.0.9"));
        assert_eq!(
            v4.to_string(),
            "00:00:08.500000  shop/web                  redirected_outbound     tcp 10.0.0.2:40000 (shop/web) > \
             10.0.0.9:8080 (shop/cart)"
        );
        let v6 = verdict(&event(Counter::RefusedProxyAway, "fd00::2", "2001:db8::1"));
        assert!(
            v6.to_string().ends_with("tcp [fd00::2]:40000 (shop/web) > [2001:db8::1]:8080"),
            "{v6}"
        );
        let unread = VerdictEvent {
            protocol: 0,
            pod_id: 8,
            ..event(Counter::DroppedUnreadable, "10.0.0.2", "10.0.0.9")
        };
        let unread = verdict(&unread);
        assert_eq!((&unread.source, &unread.destination, &unread.pod), (&None, &None, &None));
        assert!(unread.to_string().contains("netns 8 "), "{unread}");
        assert_eq!(
            Line::Dropped { dropped: 3 }.to_string(),
            "(3 verdicts dropped: too many at once)"
        );
        for line in [Line::Verdict(Box::new(v4)), Line::Dropped { dropped: 3 }] {
            let json = super::super::to_json(std::slice::from_ref(&line)).unwrap();
            assert_eq!(serde_json::from_slice::<Line>(&json).unwrap(), line);
        }
    }

    #[test]
    fn request_selects_by_pod_destination_port_verdict_and_outcome() {
        let called = verdict(&event(Counter::RedirectedOutbound, "10.0.0.2", "10.0.0.9"));
        let refused = verdict(&event(Counter::NoListener, "10.0.0.2", "2001:db8::1"));
        let all = Request::default();
        let to = |to: &str| Request { to: Some(to.parse().unwrap()), ..all.clone() };
        let of = |target: &str| Request { targets: vec![target.parse().unwrap()], ..all.clone() };
        let port = |port| Request { port: Some(port), ..all.clone() };
        let named = |name: &str| Request { verdicts: vec![name.to_owned()], ..all.clone() };
        for (request, selects) in [
            (all.clone(), [true, true]),
            (of("shop"), [true, true]),
            (of("shop/web"), [true, true]),
            (of("shop/cart"), [false, false]),
            (to("10.0.0.9"), [true, false]),
            (to("2001:db8::/32"), [false, true]),
            (to("shop/cart"), [true, false]),
            (port(8080), [true, true]),
            (port(80), [false, false]),
            (named("no_listener"), [false, true]),
            (Request { refused: true, ..all.clone() }, [false, true]),
        ] {
            let selected = [&called, &refused].map(|verdict| request.selects(verdict));
            assert_eq!(selected, selects, "{request:?}");
        }
    }
}
