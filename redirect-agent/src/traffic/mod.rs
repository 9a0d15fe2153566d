//! Which of a pod's traffic is redirected: the pod's annotations, which take precedence over the node's
//! defaults, read by one pure function, [`Settings::read`].

mod reader;

use std::{collections::BTreeSet, fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use redirect_ebpf::abi::{POD_PREFIXES, PORT_DNS};
use serde::{Deserialize, Serialize};

pub use self::reader::{Origin, Settings};

/// Inbound connections are not redirected; outbound ones are. Source: Istio
/// `annotation.AmbientBypassInboundCapture`.
pub const ANNOTATION_BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// Whether the pod's DNS goes to the proxy. Source: Istio `annotation.AmbientDnsCapture`.
pub const ANNOTATION_DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
/// Interfaces of a VM or a nested container, whose traffic counts as the pod's own. Source: Istio
/// `annotation.IoIstioRerouteVirtualInterfaces`.
pub const ANNOTATION_VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// The prefix of this agent's own annotations: this, and [`Selections`]'s names.
pub const PREFIX: &str = "traffic.redirect-agent/";
/// The prefix of the sidecar's annotations of the same meaning.
/// Source: Istio `pkg/config/annotations`, `traffic.sidecar.istio.io`.
pub const SIDECAR_PREFIX: &str = "traffic.sidecar.istio.io/";
/// The sidecar's annotations that mean the same as ours of that name. `includeOutboundPorts` does not: it
/// adds ports to what is captured by ranges.
pub const SIDECAR_NAMES: [&str; 5] = [
    "includeOutboundIPRanges",
    "excludeOutboundIPRanges",
    "excludeOutboundPorts",
    "includeInboundPorts",
    "excludeInboundPorts",
];
/// The names of [`Selections`], behind [`PREFIX`].
pub const SELECTIONS: [&str; 8] = [
    "includeOutboundIPRanges",
    "excludeOutboundIPRanges",
    "includeOutboundPorts",
    "excludeOutboundPorts",
    "includeInboundPorts",
    "excludeInboundPorts",
    "includeInboundSourceIPRanges",
    "excludeInboundSourceIPRanges",
];
/// Entries of one list: each is a rule or a route of the pod.
const ENTRIES: usize = 64;
/// How many prefixes the entries of one list may become. Two lists, and the entry for everything else, share
/// a map.
const PREFIXES: usize = POD_PREFIXES / 2 - 1;

/// Which of a pod's traffic is redirected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Inbound connections are not redirected, except HBONE.
    pub bypass_inbound: bool,
    /// The pod's DNS goes to the proxy's DNS.
    pub dns_capture: bool,
    /// Interfaces in the pod whose traffic counts as the pod's own.
    pub virtual_interfaces: Vec<String>,
    /// What is included and excluded.
    #[serde(flatten)]
    pub selections: Selections,
}

impl Traffic {
    /// Whether queries to port 53 are redirected, UDP and TCP. Other selections make no difference, except
    /// that excluding port 53 excludes them.
    pub fn captures_dns(&self) -> bool {
        let except = &self.selections.outbound_ports.except;
        self.dns_capture && !except.iter().any(|ports| ports.contains(PORT_DNS))
    }

    /// Whether a call of the pod to this address, and this port if it is known, is redirected.
    pub fn redirects_call_to(&self, ip: IpAddr, port: Option<u16>) -> bool {
        let Selections { outbound_ranges, outbound_ports, .. } = &self.selections;
        outbound_ranges.selects(|range| range.contains(&ip))
            && port.is_none_or(|port| outbound_ports.selects(|ports| ports.contains(port)))
    }

    /// Whether a plaintext call from this address, to this port of the pod if it is known, is redirected.
    pub fn redirects_call_from(&self, ip: Option<IpAddr>, port: Option<u16>) -> bool {
        let Selections { inbound_ports, inbound_sources, .. } = &self.selections;
        !self.bypass_inbound
            && ip.is_none_or(|ip| inbound_sources.selects(|range| range.contains(&ip)))
            && port.is_none_or(|port| inbound_ports.selects(|ports| ports.contains(port)))
    }

    /// Whether TCP that arrives on this interface counts as the pod's own.
    pub fn reroutes(&self, interface: &str) -> bool {
        self.virtual_interfaces.iter().any(|name| name == interface)
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bypass_inbound, dns_capture, virtual_interfaces, selections } = self;
        let mut parts = Vec::new();
        if *bypass_inbound {
            parts.push("inbound bypasses".to_owned());
        }
        if *dns_capture {
            parts.push("DNS captured".to_owned());
        }
        if !virtual_interfaces.is_empty() {
            parts.push(format!("outbound by {}", virtual_interfaces.join(",")));
        }
        parts.extend(selections.outbound_ranges.describe("to"));
        parts.extend(selections.outbound_ports.describe("to port"));
        parts.extend(selections.inbound_ports.describe("on port"));
        parts.extend(selections.inbound_sources.describe("from"));
        f.write_str(&parts.join("; "))
    }
}

/// What is included and excluded by address and port. A connection is redirected when both are
/// selected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Selections {
    /// The addresses that the pod calls: `includeOutboundIPRanges`, `excludeOutboundIPRanges`.
    pub outbound_ranges: Selection<IpNet>,
    /// The port that the pod calls: `includeOutboundPorts`, `excludeOutboundPorts`.
    pub outbound_ports: Selection<Ports>,
    /// The pod's port that is called: `includeInboundPorts`, `excludeInboundPorts`.
    pub inbound_ports: Selection<Ports>,
    /// The addresses that call the pod: `includeInboundSourceIPRanges`, `excludeInboundSourceIPRanges`.
    pub inbound_sources: Selection<IpNet>,
}

/// A selection of what is redirected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection<T> {
    /// Only these; `None`: all.
    pub only: Option<Vec<T>>,
    /// Of those, all except these.
    pub except: Vec<T>,
}

impl<T> Default for Selection<T> {
    fn default() -> Self {
        Self { only: None, except: Vec::new() }
    }
}

impl<T> Selection<T> {
    /// A selection of these, in order, each once.
    pub fn new(only: Option<&[T]>, except: &[T]) -> Self
    where
        T: Clone + Ord,
    {
        let ordered = |of: &[T]| of.iter().cloned().collect::<BTreeSet<T>>().into_iter().collect();
        Self { only: only.map(ordered), except: ordered(except) }
    }

    /// Whether something is selected that `is_in` an entry.
    fn selects(&self, mut is_in: impl FnMut(&T) -> bool) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(&mut is_in))
            && !self.except.iter().any(is_in)
    }

    /// Whether everything is selected.
    pub fn is_all(&self) -> bool {
        self.only.is_none() && self.except.is_empty()
    }
}

impl<T: fmt::Display> Selection<T> {
    fn describe(&self, what: &str) -> Option<String> {
        let list = |of: &[T]| of.iter().map(T::to_string).collect::<Vec<_>>().join(",");
        let except = || format!("not {what} {}", list(&self.except));
        match &self.only {
            None if self.except.is_empty() => None,
            None => Some(except()),
            Some(only) if only.is_empty() => Some(format!("nothing {what} any")),
            Some(only) if self.except.is_empty() => Some(format!("only {what} {}", list(only))),
            Some(only) => Some(format!("only {what} {}, {}", list(only), except())),
        }
    }
}

/// A range of ports, or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Ports {
    /// The first, host byte order.
    pub first: u16,
    /// The last, not below the first.
    pub last: u16,
}

impl Ports {
    /// Whether the port is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// The range as prefixes: the first port of each, and the number of bits that vary.
    pub fn prefixes(self) -> impl Iterator<Item = (u16, u32)> {
        let (mut first, end) = (u32::from(self.first), u32::from(self.last) + 1);
        std::iter::from_fn(move || {
            // As large a block as starts here and fits.
            let fits = |bits: &u32| first + (1 << bits) <= end;
            let bits = (0..=first.trailing_zeros().min(16)).rev().find(fits)?;
            let prefix = (u16::try_from(first).ok()?, bits);
            first += 1 << bits;
            Some(prefix)
        })
    }
}

/// An entry of a list.
trait Entry: Ord {
    /// How many entries of a map it becomes.
    fn weight(&self) -> usize {
        1
    }
}

impl Entry for Ports {
    fn weight(&self) -> usize {
        self.prefixes().count()
    }
}

impl Entry for IpNet {}

/// The name of an interface.
impl Entry for String {}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(s: &str) -> Result<Ports, String> {
        let (first, last) = s.split_once('-').unwrap_or((s, s));
        let port = |text: &str| match text.trim().parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("{s:?} is not a port from 1 to 65535, nor a range like 8000-8010")),
        };
        let (first, last) = (port(first)?, port(last)?);
        match first <= last {
            true => Ok(Ports { first, last }),
            false => Err(format!("{s:?} ends before it begins")),
        }
    }
}

crate::text::by_text!(Ports);

impl Selections {
    /// Whether the programs have room for them.
    ///
    /// # Errors
    ///
    /// Names the list that is too long.
    pub fn check(&self) -> Result<(), String> {
        fn check<T: Entry>(selection: &Selection<T>, what: &str) -> Result<(), String> {
            let lists =
                [("include", selection.only.as_deref()), ("exclude", Some(&selection.except))];
            for (how, list) in lists {
                fits(list.unwrap_or_default()).map_err(|why| format!("{how} {what}: {why}"))?;
            }
            Ok(())
        }
        check(&self.outbound_ranges, "outbound IP ranges")?;
        check(&self.outbound_ports, "outbound ports")?;
        check(&self.inbound_ports, "inbound ports")?;
        check(&self.inbound_sources, "inbound source IP ranges")
    }
}

/// Whether a list is not too long.
fn fits<T: Entry>(list: &[T]) -> Result<(), String> {
    if list.len() > ENTRIES {
        return Err(format!("more than {ENTRIES} entries"));
    }
    let prefixes: usize = list.iter().map(Entry::weight).sum();
    if prefixes > PREFIXES {
        return Err(format!(
            "the ranges take {prefixes} prefixes and may take {PREFIXES}: give fewer, or such that begin \
             and end at multiples of a power of two, like 1024-2047"
        ));
    }
    Ok(())
}

/// A CIDR block, or an address alone; host bits are cleared.
///
/// # Errors
///
/// When it is neither.
pub fn parse_range(s: &str) -> Result<IpNet, String> {
    let address = || s.parse::<IpAddr>().map(|ip| IpNet::from(ip.to_canonical()));
    match s.parse::<IpNet>().or_else(|_| address()) {
        Ok(IpNet::V6(net)) if net.addr().to_ipv4_mapped().is_some() => {
            Err(format!("{s:?} is a range of IPv4 addresses: write it like 10.0.0.0/8"))
        }
        Ok(net) => Ok(net.trunc()),
        Err(_) => Err(format!("{s:?} is not a range like 10.0.0.0/8 or fd00::/8, nor an address")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        reader::{interface, list},
        *,
    };

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[track_caller]
    fn read(settings: &Settings, pairs: &[(&str, &str)]) -> Traffic {
        let (traffic, problems) = settings.read(&annotations(pairs), None);
        assert_eq!(problems, Vec::<String>::new());
        traffic
    }

    fn ports(text: &str) -> Vec<Ports> {
        list(text, str::parse).unwrap()
    }

    fn ranges(text: &str) -> Vec<IpNet> {
        list(text, parse_range).unwrap()
    }

    #[test]
    fn pod_without_annotations_has_the_nodes_defaults() {
        assert_eq!(read(&Settings::default(), &[]), Traffic::default());
        let settings = Settings {
            defaults: Selections {
                outbound_ports: Selection { only: None, except: ports("3306") },
                ..Selections::default()
            },
            dns_capture: true,
            ..Settings::default()
        };
        let traffic = read(&settings, &[]);
        assert_eq!(traffic.selections, settings.defaults);
        assert!(traffic.captures_dns());
        assert!(!read(&settings, &[("ambient.istio.io/dns-capture", "false")]).captures_dns());
        let traffic = read(&settings, &[("traffic.redirect-agent/excludeOutboundPorts", "")]);
        assert!(traffic.selections.outbound_ports.is_all(), "what the pod says replaces it");
    }

    #[test]
    fn every_annotation_is_read() {
        let traffic = read(
            &Settings::default(),
            &[
                ("ambient.istio.io/bypass-inbound-capture", "T"),
                ("ambient.istio.io/dns-capture", "1"),
                ("istio.io/reroute-virtual-interfaces", " vnet0, ,br-1,"),
                ("traffic.redirect-agent/includeOutboundIPRanges", "10.1.2.3/8, fd00::1"),
                ("traffic.redirect-agent/excludeOutboundIPRanges", "10.1.0.0/16"),
                ("traffic.redirect-agent/includeOutboundPorts", "*"),
                ("traffic.redirect-agent/excludeOutboundPorts", "8000-8010,443,443"),
                ("traffic.redirect-agent/includeInboundPorts", "80"),
                ("traffic.redirect-agent/excludeInboundPorts", "9090"),
                ("traffic.redirect-agent/includeInboundSourceIPRanges", ""),
                ("traffic.redirect-agent/excludeInboundSourceIPRanges", "192.0.2.1,::/0"),
            ],
        );
        let expected = Traffic {
            bypass_inbound: true,
            dns_capture: true,
            virtual_interfaces: vec!["br-1".to_owned(), "vnet0".to_owned()],
            selections: Selections {
                outbound_ranges: Selection {
                    only: Some(ranges("10.0.0.0/8,fd00::1/128")),
                    except: ranges("10.1.0.0/16"),
                },
                outbound_ports: Selection { only: None, except: ports("443,8000-8010") },
                inbound_ports: Selection { only: Some(ports("80")), except: ports("9090") },
                inbound_sources: Selection {
                    only: Some(Vec::new()),
                    except: ranges("192.0.2.1/32,::/0"),
                },
            },
        };
        assert_eq!(traffic, expected);
        let json = serde_json::to_string(&expected).unwrap();
        assert_eq!(serde_json::from_str::<Traffic>(&json).unwrap(), expected);
    }

    #[test]
    fn dns_is_captured_whatever_is_selected_but_for_its_port_excluded() {
        let capture = ("ambient.istio.io/dns-capture", "true");
        for (name, value, captured) in [
            ("excludeOutboundIPRanges", "0.0.0.0/0,::/0", true),
            ("includeOutboundIPRanges", "10.0.0.0/8", true),
            ("includeOutboundPorts", "80", true),
            ("includeInboundPorts", "80", true),
            ("excludeOutboundPorts", "54", true),
            ("excludeOutboundPorts", "53", false),
            ("excludeOutboundPorts", "1-1024", false),
        ] {
            let name = format!("traffic.redirect-agent/{name}");
            let traffic = read(&Settings::default(), &[capture, (&name, value)]);
            assert_eq!(traffic.captures_dns(), captured, "{name}: {value}");
        }
    }

    #[test]
    fn sidecars_annotations_count_only_where_they_are_asked_for_and_mean_the_same() {
        let pairs = [
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "3306"),
            ("traffic.sidecar.istio.io/includeOutboundPorts", "80"),
            ("traffic.sidecar.istio.io/excludeInboundPorts", "9090"),
            ("traffic.redirect-agent/excludeInboundPorts", "9091"),
        ];
        assert_eq!(read(&Settings::default(), &pairs[..3]), Traffic::default());
        let settings = Settings { sidecar_annotations: true, ..Settings::default() };
        let selections = read(&settings, &pairs).selections;
        assert_eq!(
            selections.outbound_ports,
            Selection { only: None, except: ports("3306") },
            "the sidecar's includeOutboundPorts takes nothing away"
        );
        assert_eq!(selections.inbound_ports.except, ports("9091"), "ours comes first");
    }

    #[test]
    fn what_cannot_be_read_stays_as_it_was_and_is_named() {
        let good = [
            ("ambient.istio.io/bypass-inbound-capture", "true"),
            ("traffic.redirect-agent/excludeOutboundPorts", "3306"),
            ("traffic.redirect-agent/excludeOutboundIPRanges", "10.0.0.0/8"),
        ];
        let bad = [
            ("ambient.istio.io/bypass-inbound-capture", "yes"),
            ("traffic.redirect-agent/excludeOutboundPorts", "3306,http"),
            ("traffic.redirect-agent/excludeOutboundIPRanges", "fd00::/8"),
        ];
        let settings = Settings::default();
        let last = read(&settings, &good);
        let (traffic, problems) = settings.read(&annotations(&bad), Some(&last));
        assert!(traffic.bypass_inbound);
        assert_eq!(traffic.selections.outbound_ports, last.selections.outbound_ports);
        assert_eq!(traffic.selections.outbound_ranges.except, ranges("fd00::/8"));
        assert_eq!(
            problems,
            [
                "annotation ambient.istio.io/bypass-inbound-capture: \"yes\" is neither \"true\" nor \"false\"",
                "annotation traffic.redirect-agent/excludeOutboundPorts: \"http\" is not a port from 1 to 65535, \
                 nor a range like 8000-8010",
            ]
        );

        let (traffic, problems) = settings.read(&annotations(&bad[..2]), None);
        assert_eq!((traffic, problems.len()), (Traffic::default(), 2), "a former one is not known");
        let (traffic, _) = settings.read(&annotations(&[]), Some(&last));
        assert_eq!(traffic, Traffic::default(), "what is taken back is gone");
    }

    #[test]
    fn entries_that_are_none_are_refused() {
        for port in ["0", "65536", "-1", "80-", "90-80", "8 0", "80-90-100", "é"] {
            assert!(port.parse::<Ports>().is_err(), "{port}");
        }
        for range in ["10.0.0.0/33", "10.0.0", "::/129", "example.com", "10.0.0.0/8/8", ""] {
            assert!(parse_range(range).is_err(), "{range}");
        }
        for name in ["a-name-that-is-too-long", "a/b", "..", "a b", "lo", "eth0"] {
            assert!(interface(name).is_err(), "{name}");
        }
        let many: Vec<String> = (1..=65).map(|port| port.to_string()).collect();
        assert!(list(&many.join(","), str::parse::<Ports>).is_err());
        // 25 or 26 prefixes each.
        let wide = |n: u16| -> Vec<String> {
            (0..n).map(|n| format!("{}-{}", n * 4096 + 1, n * 4096 + 16382)).collect()
        };
        let read = |n| list(&wide(n).join(","), str::parse::<Ports>);
        let prefixes: usize = read(9).unwrap().iter().map(Entry::weight).sum();
        assert!(prefixes <= PREFIXES && 2 * PREFIXES < POD_PREFIXES, "{prefixes}");
        let problem = read(11).unwrap_err();
        assert!(problem.contains("may take 255"), "{problem}");
        let selections = |except| Selections {
            inbound_ports: Selection { only: None, except },
            ..Selections::default()
        };
        assert_eq!(selections(read(9).unwrap()).check(), Ok(()));
        let ports = wide(11).iter().map(|ports| ports.parse().unwrap()).collect();
        let problem = selections(ports).check().unwrap_err();
        assert!(problem.starts_with("exclude inbound ports: "), "{problem}");
    }
}
