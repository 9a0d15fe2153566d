//! Our routes in a pod.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use redirect_ebpf::abi::LOOPBACK_IFINDEX;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    },
};

use super::{
    TABLE, TABLE_KEEP,
    rule::{Rule, port_rules, virtual_interfaces},
};
use crate::traffic::{Selections, Traffic};

/// Worse than that of the routes for unbound sockets, so that unbound sockets use those.
const BOUND_METRIC: u32 = 4096;

/// A route of one of our tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Route {
    pub(super) table: u32,
    pub(super) destination: IpNet,
    pub(super) to: To,
}

pub(super) fn bound_metric(interface: u32) -> u32 {
    BOUND_METRIC.saturating_add(interface)
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum To {
    /// To `lo`.
    Lo(Delivery),
    /// Continue with the next rule.
    Throw,
    /// Out through this interface, for sockets that name it.
    Out(u32),
}

/// How a route delivers to `lo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Delivery {
    /// `lo`, or the interface of the bound sockets it is for: sockets bound to an interface
    /// (`SO_BINDTODEVICE`) find no other route. The kernel still delivers through `lo`, but makes the packets
    /// and the answers to them appear to come in on that interface. Source: Linux `net/ipv4/route.c`,
    /// `ip_route_output_key_hash_rcu`, and `net/ipv6/route.c`, `ip6_rt_get_dev_rcu`.
    pub(super) interface: u32,
    /// The source address of connections that have none.
    pub(super) source: IpAddr,
}

impl Delivery {
    /// Each interface has its own, because routes that differ in nothing else replace each other.
    pub(super) fn metric(self) -> Option<u32> {
        (self.interface != LOOPBACK_IFINDEX).then(|| bound_metric(self.interface))
    }
}

impl Route {
    /// Reads one of our routes from what the kernel shows.
    pub(super) fn read(message: &RouteMessage) -> Option<Self> {
        let find = |of: &dyn Fn(&RouteAttribute) -> Option<RouteAddress>| {
            message.attributes.iter().find_map(of).and_then(address)
        };
        let table = [TABLE, TABLE_KEEP]
            .into_iter()
            .find(|table| message.attributes.contains(&RouteAttribute::Table(*table)))?;
        let any: IpAddr = match message.header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            _ => Ipv6Addr::UNSPECIFIED.into(),
        };
        let destination = find(&|a| match a {
            RouteAttribute::Destination(to) => Some(to.clone()),
            _ => None,
        });
        let prefix = message.header.destination_prefix_length;
        let source = find(&|a| match a {
            RouteAttribute::PrefSource(source) => Some(source.clone()),
            _ => None,
        });
        let interface = message.attributes.iter().find_map(|a| match a {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        let to = match message.header.kind {
            RouteType::Local => To::Lo(Delivery { interface: interface?, source: source? }),
            RouteType::Throw => To::Throw,
            RouteType::Unicast => To::Out(interface?),
            _ => return None,
        };
        let destination = IpNet::new(destination.unwrap_or(any), prefix).ok()?;
        Some(Self { table, destination, to })
    }

    pub(super) fn message(self) -> RouteMessage {
        match self.destination {
            IpNet::V4(to) => {
                let builder = RouteMessageBuilder::<Ipv4Addr>::new()
                    .destination_prefix(to.addr(), to.prefix_len());
                let builder = match self.source() {
                    Some(IpAddr::V4(source)) => builder.pref_source(source),
                    _ => builder,
                };
                self.finish(builder)
            }
            IpNet::V6(to) => {
                let builder = RouteMessageBuilder::<Ipv6Addr>::new()
                    .destination_prefix(to.addr(), to.prefix_len());
                let builder = match self.source() {
                    Some(IpAddr::V6(source)) => builder.pref_source(source),
                    _ => builder,
                };
                self.finish(builder)
            }
        }
    }

    pub(super) fn source(self) -> Option<IpAddr> {
        match self.to {
            To::Lo(to) => Some(to.source),
            To::Throw | To::Out(_) => None,
        }
    }

    pub(super) fn finish<T>(self, builder: RouteMessageBuilder<T>) -> RouteMessage {
        let builder = builder.table_id(self.table);
        match self.to {
            To::Lo(to) => {
                let builder = builder
                    .kind(RouteType::Local)
                    .scope(RouteScope::Host)
                    .output_interface(to.interface);
                match to.metric() {
                    Some(metric) => builder.priority(metric).build(),
                    None => builder.build(),
                }
            }
            To::Throw => builder.kind(RouteType::Throw).build(),
            To::Out(interface) => {
                builder.output_interface(interface).priority(bound_metric(interface)).build()
            }
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to {
            To::Lo(Delivery { interface, source }) => write!(
                f,
                "table {}: local {} dev {interface} src {source}",
                self.table, self.destination
            ),
            To::Throw => write!(f, "table {}: throw {}", self.table, self.destination),
            To::Out(interface) => {
                write!(f, "table {}: {} dev {interface}", self.table, self.destination)
            }
        }
    }
}

/// Which outbound connections of a pod are redirected, in one family, as rules and routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outbound {
    /// In the kernel's order.
    pub(super) rules: Vec<Rule>,
    pub(super) routes: BTreeSet<Route>,
}

impl Outbound {
    pub(super) fn new(deliveries: &Deliveries, traffic: &Traffic) -> Self {
        let source = deliveries.lo.source;
        let Selections { outbound_ranges: ranges, outbound_ports: ports, .. } = &traffic.selections;
        let of_family = |net: &&IpNet| net.addr().is_ipv4() == source.is_ipv4();
        let route = |destination: IpNet, to| Route { table: TABLE, destination, to };
        let except: Vec<IpNet> = ranges.except.iter().filter(of_family).copied().collect();
        let only = match &ranges.only {
            None => vec![everything(source)],
            Some(only) => only.iter().filter(of_family).copied().collect(),
        };
        // The longest prefix wins; an included range inside an excluded one stays excluded.
        let only = only.into_iter().filter(|net| !except.iter().any(|e| e.contains(net)));
        let routes = only.flat_map(|net| deliveries.iter().map(move |to| route(net, To::Lo(to))));
        // A link-local address means nothing on another interface, so callers name the interface.
        let links = deliveries.bound.iter().filter(|_| source.is_ipv6());
        let link_local = links.map(|to| route(IpNet::V6(LINK_LOCAL), To::Out(to.interface)));
        let excepted = except.iter().map(|net| route(*net, To::Throw));
        let mut rules: Vec<Rule> = port_rules(ports)
            .into_iter()
            .chain(virtual_interfaces(traffic).map(Rule::Hold))
            .collect();
        rules.sort_unstable();
        Self { routes: routes.chain(excepted).chain(link_local).collect(), rules }
    }
}

pub(super) const LINK_LOCAL: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);

/// The deliveries to `lo` in one family.
pub(super) struct Deliveries {
    pub(super) lo: Delivery,
    pub(super) bound: Vec<Delivery>,
}

impl Deliveries {
    pub(super) fn iter(&self) -> impl Iterator<Item = Delivery> {
        [self.lo].into_iter().chain(self.bound.iter().copied())
    }

    /// The routes that keep redirected connections redirected.
    pub(super) fn keep_routes(&self) -> BTreeSet<Route> {
        let destination = everything(self.lo.source);
        let route = |to| Route { table: TABLE_KEEP, destination, to: To::Lo(to) };
        self.iter().map(route).collect()
    }
}

/// All addresses of the family of `address`.
pub(super) fn everything(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    }
}

pub(super) fn address(address: RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.into()),
        RouteAddress::Inet6(ip) => Some(ip.into()),
        _ => None,
    }
}
