//! Routes, rules, addresses and interfaces of a pod's network namespace, by netlink. Every function
//! here runs inside it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    pin::pin,
};

use anyhow::{Context as _, Result, ensure};
use futures_util::{Stream, StreamExt as _};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::net::if_::if_nameindex;
use redirect_ebpf::abi::{
    LOOPBACK_IFINDEX, MARK_MASK, MARK_REDIRECTED, MARK_RESCUED, MARK_VIRTUAL,
};
use rtnetlink::{
    Error, Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily, IpProtocol,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
    },
};

use crate::traffic::{Ports, Selection, Selections, Traffic};

/// The routing table that delivers to `lo` what is to be redirected.
const TABLE: u32 = 15001;
/// The one that delivers everything to `lo`, for what is redirected already.
const TABLE_KEEP: u32 = 15002;
/// All our rules follow the first one of all, `local`, at its own priority: so a rule that somebody adds
/// without a priority, which is that of the second rule less one if it is not 0 itself, comes behind
/// them. Rules of one priority are in the order in which they were added.
const PRIORITY: u32 = 0;
/// Where the rules for excluded ports go on, behind all of ours.
const PRIORITY_LANDING: u32 = 1;
/// How many rules of a pod are moved behind ours; nobody needs more.
const FOREIGN_RULES: usize = 64;
/// How many interfaces of a pod get programs, besides `lo`. One that gets none would be a way past the
/// proxy, so a pod that has more is not set up.
const POD_INTERFACES: usize = 64;
/// How much of each kind is read of a pod: a pod with `NET_ADMIN` may have as much as it likes, and the
/// agent's memory is there for all pods. The settings need half of it at most.
const POD_ENTRIES: usize = 8192;
/// istio-cni's table for what comes back from the application, and the mark that leads to it, which
/// happens to be ours. Source: Istio `cni/pkg/config`, `RouteTableInbound`, `InpodTProxyMark`.
const TABLE_ISTIO_CNI: u32 = 100;
/// The kernel's own table of local addresses. Source: Linux `include/uapi/linux/rtnetlink.h`.
const TABLE_LOCAL: u32 = 255;
const MARK_ISTIO_CNI: u32 = 0x111;
/// Above those of the routes for sockets that are bound to no interface, which so take the latter.
const BOUND_METRIC: u32 = 4096;

/// Which connections of the pod take the redirection route, and which do not. All are for what the
/// pod itself sends, but for those of virtual interfaces. They are declared in the order that the kernel
/// needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rule {
    /// What the guard brings to `lo`.
    Rescue,
    /// Those that were redirected when they ceased to be captured.
    Keep,
    /// Those that come in on this virtual interface and that its program redirects.
    Virtual(Interface),
    /// Not those that are not marked and go to these ports: they go on behind [`Rule::Landing`].
    Exclude(Ports),
    /// All that are not marked and go to these ports, or to any.
    Capture(Option<Ports>),
    /// What comes in on this virtual interface and no program has seen yet: dropped, until it has one.
    Hold(Interface),
    /// Nothing: where [`Rule::Exclude`] goes on.
    Landing,
}

/// The name of an interface, filled up with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Interface([u8; 16]);

impl Interface {
    /// `None` for what is too long to be one.
    fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self(bytes))
    }

    fn name(&self) -> String {
        String::from_utf8_lossy(&self.0).trim_end_matches('\0').to_owned()
    }
}

/// The virtual interfaces that a pod's settings name, whether or not they exist.
fn virtual_interfaces(traffic: &Traffic) -> impl Iterator<Item = Interface> {
    traffic.virtual_interfaces.iter().filter_map(|name| Interface::new(name))
}

impl Rule {
    fn priority(self) -> u32 {
        if self == Self::Landing { PRIORITY_LANDING } else { PRIORITY }
    }

    fn mark(self) -> u32 {
        match self {
            Self::Exclude(_) | Self::Capture(_) | Self::Hold(_) => 0,
            Self::Keep => MARK_REDIRECTED,
            Self::Virtual(_) => MARK_VIRTUAL,
            Self::Rescue | Self::Landing => MARK_RESCUED,
        }
    }

    /// `None`: whatever it is. Packets that come in are not looked into for rules of `lo`. Source: Linux
    /// `include/net/fib_rules.h`, `fib_rule_requires_fldissect`.
    fn protocol(self) -> Option<IpProtocol> {
        match self {
            Self::Rescue | Self::Landing => None,
            _ => Some(IpProtocol::Tcp),
        }
    }

    fn ports(self) -> Option<Ports> {
        match self {
            Self::Exclude(ports) => Some(ports),
            Self::Capture(ports) => ports,
            _ => None,
        }
    }

    /// Where the packets come from: the pod itself, or a virtual interface.
    fn input(self) -> String {
        match self {
            Self::Hold(interface) | Self::Virtual(interface) => interface.name(),
            _ => "lo".to_owned(),
        }
    }

    /// Whether it says what of the pod's own connections is captured; all others stay for as long as
    /// the pod is in the mesh.
    fn captures(self) -> bool {
        matches!(self, Self::Exclude(_) | Self::Capture(_) | Self::Hold(_))
    }

    /// The rule of ours that the kernel shows.
    fn read(message: &RuleMessage) -> Option<Self> {
        let has = |attribute| message.attributes.contains(&attribute);
        let ports = message.attributes.iter().find_map(|a| match a {
            RuleAttribute::DestinationPortRange(range) => {
                Some(Ports { first: range.start, last: range.end })
            }
            _ => None,
        });
        let input = message.attributes.iter().find_map(|a| match a {
            RuleAttribute::Iifname(name) => Some(name.as_str()),
            _ => None,
        });
        let virtual_interface = input.filter(|name| *name != "lo").and_then(Interface::new);
        let mark = message.attributes.iter().find_map(|a| match a {
            RuleAttribute::FwMark(mark) => Some(*mark),
            _ => None,
        });
        let rule = match message.header.action {
            RuleAction::Blackhole => Self::Hold(virtual_interface?),
            RuleAction::Nop => Self::Landing,
            RuleAction::Goto if has(RuleAttribute::Goto(PRIORITY_LANDING)) => Self::Exclude(ports?),
            RuleAction::ToTable if has(RuleAttribute::Table(TABLE)) => Self::Capture(ports),
            RuleAction::ToTable if has(RuleAttribute::Table(TABLE_KEEP)) => match mark? {
                MARK_VIRTUAL => Self::Virtual(virtual_interface?),
                MARK_RESCUED => Self::Rescue,
                _ => Self::Keep,
            },
            _ => return None,
        };
        let whole = priority(message) == rule.priority()
            && input == Some(rule.input().as_str())
            && mark.unwrap_or_default() == rule.mark()
            && has(RuleAttribute::FwMask(MARK_MASK))
            && rule.protocol().is_none_or(|protocol| has(RuleAttribute::IpProtocol(protocol)))
            && ports == rule.ports();
        whole.then_some(rule)
    }
}

/// 0 is not shown.
fn priority(message: &RuleMessage) -> u32 {
    let priority = message.attributes.iter().find_map(|a| match a {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    priority.unwrap_or_default()
}

/// A route of one of our tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Route {
    table: u32,
    destination: IpNet,
    to: To,
}

fn bound_metric(interface: u32) -> u32 {
    BOUND_METRIC.saturating_add(interface)
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum To {
    /// To `lo`.
    Lo(Delivery),
    /// To the rules behind.
    Throw,
    /// Out by this interface, for who names it.
    Out(u32),
}

/// How a route delivers to `lo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Delivery {
    /// `lo`, or the interface whose sockets it is for: those that are bound to it
    /// (`SO_BINDTODEVICE`) find no other. The kernel delivers by `lo` all the same, and lets the
    /// packets, and the answers to them, appear to come in on that interface. Source: Linux
    /// `net/ipv4/route.c`, `ip_route_output_key_hash_rcu`, and `net/ipv6/route.c`,
    /// `ip6_rt_get_dev_rcu`.
    interface: u32,
    /// The source that a connection without one takes.
    source: IpAddr,
}

impl Delivery {
    /// Each interface's own: routes that differ in nothing else replace each other.
    fn metric(self) -> Option<u32> {
        (self.interface != LOOPBACK_IFINDEX).then(|| bound_metric(self.interface))
    }
}

impl Route {
    /// The route of ours that the kernel shows.
    fn read(message: &RouteMessage) -> Option<Self> {
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

    fn message(self) -> RouteMessage {
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

    fn source(self) -> Option<IpAddr> {
        match self.to {
            To::Lo(to) => Some(to.source),
            To::Throw | To::Out(_) => None,
        }
    }

    fn finish<T>(self, builder: RouteMessageBuilder<T>) -> RouteMessage {
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

/// What is redirected of a pod's outbound connections in one family, as rules and routes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outbound {
    /// In the order of the kernel's.
    rules: Vec<Rule>,
    routes: BTreeSet<Route>,
}

impl Outbound {
    fn new(deliveries: &Deliveries, traffic: &Traffic) -> Self {
        let source = deliveries.lo.source;
        let Selections { outbound_ranges: ranges, outbound_ports: ports, .. } = &traffic.selections;
        let of_family = |net: &&IpNet| net.addr().is_ipv4() == source.is_ipv4();
        let route = |destination: IpNet, to| Route { table: TABLE, destination, to };
        let except: Vec<IpNet> = ranges.except.iter().filter(of_family).copied().collect();
        let only = match &ranges.only {
            None => vec![everything(source)],
            Some(only) => only.iter().filter(of_family).copied().collect(),
        };
        // The longest prefix counts; what lies within an exception is none.
        let only = only.into_iter().filter(|net| !except.iter().any(|e| e.contains(net)));
        let routes = only.flat_map(|net| deliveries.iter().map(move |to| route(net, To::Lo(to))));
        // A neighbor's link-local address means nothing on another interface. Who calls one names that.
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

const LINK_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);

/// The ways to `lo` in one family.
struct Deliveries {
    lo: Delivery,
    bound: Vec<Delivery>,
}

impl Deliveries {
    fn iter(&self) -> impl Iterator<Item = Delivery> {
        [self.lo].into_iter().chain(self.bound.iter().copied())
    }

    /// What keeps redirected connections so.
    fn keep_routes(&self) -> BTreeSet<Route> {
        let destination = everything(self.lo.source);
        let route = |to| Route { table: TABLE_KEEP, destination, to: To::Lo(to) };
        self.iter().map(route).collect()
    }
}

/// What stays for as long as the pod is in the mesh.
fn keep_rules(traffic: &Traffic) -> impl Iterator<Item = Rule> {
    [Rule::Rescue, Rule::Keep, Rule::Landing]
        .into_iter()
        .chain(virtual_interfaces(traffic).map(Rule::Virtual))
}

/// The last port that a rule can name. Source: Linux `include/net/fib_rules.h`,
/// `fib_rule_port_range_valid`.
const LAST_PORT: u16 = u16::MAX - 1;

/// Port 65535, which no rule can name, is captured with all the others or not at all; where it is excluded,
/// `verdict::on_lo` sends it out again.
fn port_rules(ports: &Selection<Ports>) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    let mut exclude = |first: u16, last: u16| {
        let last = last.min(LAST_PORT);
        if first <= last {
            rules.insert(Rule::Exclude(Ports { first, last }));
        }
    };
    ports.except.iter().for_each(|ports| exclude(ports.first, ports.last));
    match &ports.only {
        Some(only) if only.iter().all(|ports| ports.last <= LAST_PORT) => {
            rules.extend(only.iter().map(|ports| Rule::Capture(Some(*ports))));
        }
        Some(only) => {
            // All, but those between. They are in order.
            let mut next = 1;
            for ports in only {
                if next < ports.first {
                    exclude(next, ports.first - 1);
                }
                next = next.max(ports.last.saturating_add(1));
            }
            rules.insert(Rule::Capture(None));
        }
        None => {
            rules.insert(Rule::Capture(None));
        }
    }
    rules
}

/// How much of a pod's outbound capture is there in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OutboundState {
    /// The rules are those of the settings.
    pub(super) rules: bool,
    /// So are the routes.
    pub(super) routes: bool,
}

/// An address in the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    /// The index of its interface.
    pub(super) interface: u32,
    /// The name of that.
    pub(super) name: String,
    /// It is good for more than its link.
    pub(super) global: bool,
}

/// What there was in the namespace.
pub(super) struct Seen {
    interfaces: BTreeMap<u32, Link>,
    addresses: Vec<AddressMessage>,
    v4: Family,
    v6: Family,
}

struct Link {
    name: String,
    up: bool,
}

/// The rules of one family that may matter to ours, and the routes of our tables.
struct Family {
    rules: Vec<RuleMessage>,
    routes: Vec<RouteMessage>,
}

impl Seen {
    /// The interfaces: index → name.
    ///
    /// # Errors
    ///
    /// When there are more than can have programs.
    pub(super) fn interfaces(&self) -> Result<BTreeMap<u32, String>> {
        let besides_lo = self.interfaces.keys().filter(|index| **index != LOOPBACK_IFINDEX).count();
        ensure!(
            besides_lo <= POD_INTERFACES,
            "the pod has {besides_lo} network interfaces besides lo, and at most {POD_INTERFACES} can be guarded; remove some"
        );
        Ok(self.interfaces.iter().map(|(index, link)| (*index, link.name.clone())).collect())
    }

    /// Whether `lo` is up.
    pub(super) fn has_lo(&self) -> bool {
        self.interfaces.get(&LOOPBACK_IFINDEX).is_some_and(|lo| lo.up)
    }

    /// The addresses, in the order of their interfaces, but for 127.0.0.0/8, ::1, and those that
    /// somebody else has, too.
    pub(super) fn addresses(&self) -> Vec<Address> {
        let failed = |message: &AddressMessage| {
            message.attributes.iter().any(|a| {
                matches!(a, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Dadfailed))
            })
        };
        let of = |message: &AddressMessage| {
            let ip = own_address(message).filter(|ip| !failed(message) && !ip.is_loopback())?;
            let interface = message.header.index;
            let link = self.interfaces.get(&interface);
            let name = link.map(|link| link.name.clone()).unwrap_or_default();
            let global = message.header.scope == AddressScope::Universe;
            Some(Address { ip, interface, name, global })
        };
        self.addresses.iter().filter_map(of).collect()
    }

    /// Whether istio-cni's rule is there, in either family.
    pub(super) fn has_istio_cni(&self) -> bool {
        [&self.v4, &self.v6].into_iter().any(|family| family.rules.iter().any(is_istio_cnis))
    }

    /// Whether there is a capture rule of ours, in either family.
    pub(super) fn has_capture(&self) -> bool {
        self.v4.has_capture() || self.v6.has_capture()
    }

    /// The same in the family of `source`.
    pub(super) fn has_capture_of(&self, source: IpAddr) -> bool {
        self.family(source).has_capture()
    }

    /// What there is of the outbound capture of one family.
    pub(super) fn outbound(&self, source: IpAddr, traffic: &Traffic) -> OutboundState {
        let family = self.family(source);
        let wanted = Outbound::new(&self.deliveries(source), traffic);
        let (_, rules) = family.capture_rules();
        let mut routes = family.our_routes();
        routes.retain(|route| route.table == TABLE);
        OutboundState { rules: rules == wanted.rules, routes: routes == wanted.routes }
    }

    /// Whether what [`Routing::add_keep`] adds is there: the rules, the routes.
    pub(super) fn has_keep(&self, source: IpAddr, traffic: &Traffic) -> (bool, bool) {
        let family = self.family(source);
        let rules = family.our_rules();
        let wanted = self.deliveries(source).keep_routes();
        (
            keep_rules(traffic).all(|rule| rules.contains(&rule)),
            family.our_routes().is_superset(&wanted),
        )
    }

    /// Whether rules of others come before ours, in either family: they may lead elsewhere what is to
    /// be captured, or what the guard has brought back.
    pub(super) fn has_foreign_rules(&self) -> bool {
        [&self.v4, &self.v6].into_iter().any(|family| !foreign_rules(&family.rules).is_empty())
    }

    fn family(&self, of: IpAddr) -> &Family {
        if of.is_ipv4() { &self.v4 } else { &self.v6 }
    }

    /// The ways to `lo` in the family of `source`, which is what a connection without a source takes.
    fn deliveries(&self, source: IpAddr) -> Deliveries {
        let up =
            |index| index != LOOPBACK_IFINDEX && self.interfaces.get(&index).is_some_and(|l| l.up);
        // The first address of each, a global one before others: those cannot reach everything.
        let mut sources: BTreeMap<u32, Option<IpAddr>> = BTreeMap::new();
        for message in &self.addresses {
            let Some(address) = own_address(message) else { continue };
            if up(message.header.index) && address.is_ipv4() == source.is_ipv4() {
                let first = sources.entry(message.header.index).or_default();
                let global = message.header.scope == AddressScope::Universe;
                *first = first.or(global.then_some(address));
            }
        }
        // One without an address of the family is not of that family.
        let bound = sources
            .into_iter()
            .map(|(interface, first)| Delivery { interface, source: first.unwrap_or(source) });
        let lo = Delivery { interface: LOOPBACK_IFINDEX, source };
        Deliveries { lo, bound: bound.collect() }
    }
}

impl Family {
    fn our_rules(&self) -> BTreeSet<Rule> {
        self.rules.iter().filter_map(Rule::read).collect()
    }

    fn our_routes(&self) -> BTreeSet<Route> {
        self.routes.iter().filter_map(Route::read).collect()
    }

    fn our_rule_messages(&self) -> Vec<(Rule, RuleMessage)> {
        let ours = |message: &RuleMessage| Some((Rule::read(message)?, message.clone()));
        self.rules.iter().filter_map(ours).collect()
    }

    fn has_capture(&self) -> bool {
        self.capture_rules().1.iter().any(|rule| matches!(rule, Rule::Capture(_)))
    }

    /// The rules that say what is captured, and those alone, in the kernel's order.
    fn capture_rules(&self) -> (Vec<(Rule, RuleMessage)>, Vec<Rule>) {
        let mut ours = self.our_rule_messages();
        ours.retain(|(rule, _)| rule.captures());
        let rules = ours.iter().map(|(rule, _)| *rule).collect();
        (ours, rules)
    }
}

fn interface(link: LinkMessage) -> (u32, Link) {
    let up = link.header.flags.contains(LinkFlags::Up);
    let name = link.attributes.into_iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    (link.header.index, Link { name: name.unwrap_or_default(), up })
}

/// The rules of others before the last one of ours. The kernel's own, `local`, stays the first.
fn foreign_rules(rules: &[RuleMessage]) -> Vec<RuleMessage> {
    let ours = |rule: &RuleMessage| Rule::read(rule).is_some_and(|rule| rule != Rule::Landing);
    let local = |rule: &RuleMessage| {
        rule.header.action == RuleAction::ToTable && u32::from(rule.header.table) == TABLE_LOCAL
    };
    let before = &rules[..rules.iter().rposition(ours).unwrap_or(0)];
    before.iter().filter(|rule| Rule::read(rule).is_none() && !local(rule)).cloned().collect()
}

/// A connection to the kernel's routing in the namespace that it was opened in.
pub(super) struct Routing {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Routing {
    /// Connects in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("start a runtime for netlink")?;
        let _context = runtime.enter();
        // The kernel, and not we, leaves out the routes of other tables.
        let (connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().context("open netlink")?;
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    /// Reads everything that the other functions need to know.
    pub(super) fn look(&self) -> Result<Seen> {
        self.runtime.block_on(async {
            let links = self.handle.link().get().execute();
            let links = collect("network interfaces", links, |link| Some(interface(link))).await?;
            let addresses = self.handle.address().get().execute();
            let mut interfaces: BTreeMap<u32, Link> = links.into_iter().collect();
            // One whose name is not UTF-8 is not among them.
            for interface in &if_nameindex().context("list the interfaces")? {
                interfaces.entry(interface.index()).or_insert_with(|| Link {
                    name: interface.name().to_string_lossy().into_owned(),
                    up: true,
                });
            }
            Ok(Seen {
                interfaces,
                addresses: collect("addresses", addresses, Some).await?,
                v4: self.family(IpVersion::V4).await?,
                v6: self.family(IpVersion::V6).await?,
            })
        })
    }

    async fn family(&self, family: IpVersion) -> Result<Family> {
        let rules = self.rules(family.clone()).await?;
        Ok(Family { rules, routes: self.routes(family).await? })
    }

    /// Adds what keeps redirected connections so, in the family of `source`; that is the source that
    /// a connection without one takes. And what redirects those of the virtual interfaces, and what the
    /// guard brings to `lo`.
    pub(super) fn add_keep(&self, seen: &Seen, source: IpAddr, traffic: &Traffic) -> Result<()> {
        let family = seen.family(source);
        self.runtime.block_on(async {
            let present = family.our_routes();
            for route in seen.deliveries(source).keep_routes().difference(&present) {
                self.add_route(*route).await?;
            }
            // Those of another layout, say: nobody else's lead there.
            for stale in family.rules.iter().filter(|rule| is_stale(rule)) {
                done(self.handle.rule().del(stale.clone()).execute().await)
                    .context("delete a stale rule")?;
            }
            let present = family.our_rules();
            for rule in keep_rules(traffic).filter(|rule| !present.contains(rule)) {
                self.add_rule(source, rule).await?;
            }
            Ok(())
        })
    }

    /// Adds the rule alone, in the family of `family`.
    pub(super) fn add_keep_rule(&self, family: IpAddr) -> Result<()> {
        self.runtime.block_on(async {
            let present = self.family(version(family)).await?.our_rules();
            if present.contains(&Rule::Keep) {
                return Ok(());
            }
            self.add_rule(family, Rule::Keep).await
        })
    }

    /// Makes the outbound capture of one family what the settings say. What is captured before and
    /// after is captured at every moment between: what is new comes before what is old goes.
    pub(super) fn set_outbound(
        &self,
        seen: &Seen,
        source: IpAddr,
        traffic: &Traffic,
    ) -> Result<()> {
        let family = seen.family(source);
        self.runtime.block_on(async {
            let wanted = Outbound::new(&seen.deliveries(source), traffic);
            let routes = family.our_routes();
            for route in wanted.routes.difference(&routes) {
                self.add_route(*route).await?;
            }
            let (stale, present) = family.capture_rules();
            if present != wanted.rules {
                // As a whole, because their order counts.
                for rule in &wanted.rules {
                    self.add_rule(source, *rule).await?;
                }
                self.delete_rules_of(stale).await?;
            }
            // Anew: some of them have been replaced.
            for message in self.routes(version(source)).await? {
                let route = Route::read(&message);
                if route.is_none_or(|r| r.table == TABLE && !wanted.routes.contains(&r)) {
                    self.delete_route(message).await?;
                }
            }
            Ok(())
        })
    }

    /// Ends the outbound capture in both families.
    pub(super) fn delete_capture(&self) -> Result<()> {
        self.delete_rules(Rule::captures)
    }

    /// Removes all rules and routes in both families.
    pub(super) fn delete_all(&self) -> Result<()> {
        self.delete_capture()?;
        self.delete_rules(|_| true)?;
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                for route in self.routes(family).await? {
                    self.delete_route(route).await?;
                }
            }
            Ok(())
        })
    }

    /// Lets the rules of others follow ours: they are added once more, in their order, and their first
    /// copies deleted.
    pub(super) fn precede_foreign_rules(&self) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                let foreign = foreign_rules(&self.rules(family).await?);
                ensure!(
                    foreign.len() <= FOREIGN_RULES,
                    "the pod has {} routing rules of priority 0 before ours; remove them",
                    foreign.len()
                );
                for rule in &foreign {
                    let mut request = self.handle.rule().add().replace();
                    *request.message_mut() = rule.clone();
                    request.execute().await.context("add a rule of the pod behind ours")?;
                }
                for rule in foreign {
                    done(self.handle.rule().del(rule).execute().await)
                        .context("delete a rule of the pod before ours")?;
                }
            }
            Ok(())
        })
    }

    /// Removes istio-cni's route and, last, its rule, in both families.
    pub(super) fn delete_istio_cni(&self) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                for route in self.routes_of(family, TABLE_ISTIO_CNI).await? {
                    let default = route.header.destination_prefix_length == 0;
                    let to_lo = route.attributes.contains(&RouteAttribute::Oif(LOOPBACK_IFINDEX));
                    if route.header.kind == RouteType::Local && default && to_lo {
                        done(self.handle.route().del(route).execute().await)
                            .context("delete istio-cni's route")?;
                    }
                }
            }
            for family in [IpVersion::V4, IpVersion::V6] {
                for rule in self.rules(family).await?.into_iter().filter(is_istio_cnis) {
                    done(self.handle.rule().del(rule).execute().await)
                        .context("delete istio-cni's rule")?;
                }
            }
            Ok(())
        })
    }

    fn delete_rules(&self, which: impl Fn(Rule) -> bool) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                let mut ours = self.family(family).await?.our_rule_messages();
                ours.retain(|(rule, _)| which(*rule));
                self.delete_rules_of(ours).await?;
            }
            Ok(())
        })
    }

    /// Captures go before exclusions, lest what is excluded be captured for a moment. Of rules that are
    /// alike the kernel deletes the first.
    async fn delete_rules_of(&self, mut rules: Vec<(Rule, RuleMessage)>) -> Result<()> {
        rules.sort_by_key(|(rule, _)| std::cmp::Reverse(*rule));
        for (rule, message) in rules {
            done(self.handle.rule().del(message).execute().await)
                .with_context(|| format!("delete rule {rule:?}"))?;
        }
        Ok(())
    }

    async fn add_rule(&self, family: IpAddr, rule: Rule) -> Result<()> {
        let mut request = self
            .handle
            .rule()
            .add()
            // Also where there is one that is alike: it is about to be deleted.
            .replace()
            .priority(rule.priority())
            .input_interface(rule.input())
            .fw_mark(rule.mark());
        request = match rule {
            Rule::Exclude(_) => request.table_id(0).action(RuleAction::Goto),
            Rule::Capture(_) => request.table_id(TABLE).action(RuleAction::ToTable),
            // All of it, whatever ranges the other table leaves out.
            Rule::Rescue | Rule::Keep | Rule::Virtual(_) => {
                request.table_id(TABLE_KEEP).action(RuleAction::ToTable)
            }
            Rule::Hold(_) => request.table_id(0).action(RuleAction::Blackhole),
            Rule::Landing => request.table_id(0).action(RuleAction::Nop),
        };
        let message = request.message_mut();
        message.header.family = match family {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes.push(RuleAttribute::FwMask(MARK_MASK));
        message.attributes.extend(rule.protocol().map(RuleAttribute::IpProtocol));
        if let Rule::Exclude(_) = rule {
            message.attributes.push(RuleAttribute::Goto(PRIORITY_LANDING));
        }
        if let Some(ports) = rule.ports() {
            let range = RulePortRange { start: ports.first, end: ports.last };
            message.attributes.push(RuleAttribute::DestinationPortRange(range));
        }
        request.execute().await.with_context(|| format!("add rule {rule:?}"))
    }

    async fn add_route(&self, route: Route) -> Result<()> {
        let request = self.handle.route().add(route.message()).replace();
        request.execute().await.with_context(|| format!("add route {route}"))
    }

    async fn delete_route(&self, message: RouteMessage) -> Result<()> {
        done(self.handle.route().del(message).execute().await)
            .with_context(|| format!("delete a route of table {TABLE} or {TABLE_KEEP}"))
    }

    async fn rules(&self, family: IpVersion) -> Result<Vec<RuleMessage>> {
        let rules = self.handle.rule().get(family).execute();
        let matters = |rule: &RuleMessage| {
            priority(rule) <= PRIORITY_LANDING || leads_to_ours(rule) || is_istio_cnis(rule)
        };
        let what = "routing rules of priority 0 or 1, or to our tables";
        collect(what, rules, |rule| Some(rule).filter(matters)).await
    }

    async fn routes(&self, family: IpVersion) -> Result<Vec<RouteMessage>> {
        let mut routes = self.routes_of(family.clone(), TABLE).await?;
        routes.extend(self.routes_of(family, TABLE_KEEP).await?);
        Ok(routes)
    }

    async fn routes_of(&self, family: IpVersion, table: u32) -> Result<Vec<RouteMessage>> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = match family {
            IpVersion::V4 => AddressFamily::Inet,
            IpVersion::V6 => AddressFamily::Inet6,
        };
        filter.attributes.push(RouteAttribute::Table(table));
        let routes = self.handle.route().get(filter).execute();
        let within = |route: &RouteMessage| {
            route.attributes.iter().any(|a| matches!(a, RouteAttribute::Table(t) if *t == table))
        };
        // A kernel that leaves out none gives those of other tables, too.
        let what = format!("routes in table {table}");
        collect(&what, routes, |route| Some(route).filter(within)).await
    }
}

/// What of a list that the kernel sends is to be kept.
async fn collect<T, U>(
    what: &str,
    messages: impl Stream<Item = Result<T, Error>>,
    keep: impl Fn(T) -> Option<U>,
) -> Result<Vec<U>> {
    let mut messages = pin!(messages);
    let mut kept = Vec::new();
    while let Some(message) = messages.next().await {
        let message = match message {
            Err(e) if is_absent(&e) => break,
            message => message.with_context(|| format!("list {what}"))?,
        };
        let Some(message) = keep(message) else { continue };
        ensure!(
            kept.len() < POD_ENTRIES,
            "the pod has more than {POD_ENTRIES} {what}; remove some"
        );
        kept.push(message);
    }
    Ok(kept)
}

/// Whether a rule leads to a table of ours.
fn leads_to_ours(rule: &RuleMessage) -> bool {
    let tables = [RuleAttribute::Table(TABLE), RuleAttribute::Table(TABLE_KEEP)];
    tables.iter().any(|table| rule.attributes.contains(table))
}

/// Whether a rule leads to a table of ours and is none of ours.
fn is_stale(rule: &RuleMessage) -> bool {
    leads_to_ours(rule) && Rule::read(rule).is_none()
}

/// Whether a rule is istio-cni's.
fn is_istio_cnis(rule: &RuleMessage) -> bool {
    [
        RuleAttribute::Table(TABLE_ISTIO_CNI),
        RuleAttribute::FwMark(MARK_ISTIO_CNI),
        RuleAttribute::FwMask(MARK_MASK),
    ]
    .iter()
    .all(|attribute| rule.attributes.contains(attribute))
}

/// All addresses of the family of `address`.
fn everything(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    }
}

/// On a point-to-point interface `Local` is ours and `Address` is the peer's.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let find =
        |of: &dyn Fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(of);
    let local = find(&|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    local.or_else(|| {
        find(&|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

fn address(address: RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.into()),
        RouteAddress::Inet6(ip) => Some(ip.into()),
        _ => None,
    }
}

fn version(address: IpAddr) -> IpVersion {
    match address {
        IpAddr::V4(_) => IpVersion::V4,
        IpAddr::V6(_) => IpVersion::V6,
    }
}

/// Already there, and already gone, are success.
fn done(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::NetlinkError(e))
            if matches!(-e.raw_code(), libc::EEXIST | libc::ENOENT | libc::ESRCH) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// A kernel without IPv6 has none of its rules, and a table without a route does not exist.
fn is_absent(error: &Error) -> bool {
    let Error::NetlinkError(e) = error else { return false };
    matches!(-e.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> Vec<Ports> {
        text.split_whitespace().map(|ports| ports.parse().unwrap()).collect()
    }

    #[test]
    fn rules_capture_exactly_the_selected_ports() {
        for (only, except) in [
            (None, ""),
            (None, "80 8000-8010"),
            (Some("80 8000-8010"), "8005"),
            (Some("1-65535"), "443"),
            (Some("80 1024-65535"), ""),
            (Some("80-90 85-95 60000-65535"), "65000"),
            (Some(""), ""),
        ] {
            let selection = Selection { only: only.map(ports), except: ports(except) };
            let rules = port_rules(&selection);
            let within = |ports: &Ports, port| (ports.first..=ports.last).contains(&port);
            for port in 1..=u16::MAX {
                // In the order of their priorities.
                let decides = rules.iter().find_map(|rule| match rule {
                    Rule::Exclude(ports) if within(ports, port) => Some(false),
                    Rule::Capture(None) => Some(true),
                    Rule::Capture(Some(ports)) if within(ports, port) => Some(true),
                    _ => None,
                });
                let selected =
                    selection.only.as_ref().is_none_or(|only| only.iter().any(|p| within(p, port)))
                        && !selection.except.iter().any(|p| within(p, port));
                assert_eq!(decides.unwrap_or(false), selected, "{port} of {selection:?}");
            }
        }
        let last = Selection { only: None, except: ports("65535") };
        assert_eq!(port_rules(&last), BTreeSet::from([Rule::Capture(None)]));
    }
}
