//! What a pod's network namespace contains.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Result, ensure};
use redirect_ebpf::abi::LOOPBACK_IFINDEX;
use rtnetlink::packet_route::{
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    route::RouteMessage,
    rule::{RuleAction, RuleMessage},
};

use super::{
    TABLE, TABLE_LOCAL,
    route::{Deliveries, Delivery, Outbound, Route},
    rule::{Rule, is_istio_cnis, keep_rules},
};
use crate::traffic::Traffic;

/// How many interfaces of a pod get programs, besides `lo`. An interface without programs would be a way past
/// the proxy, so a pod with more interfaces is not set up.
const POD_INTERFACES: usize = 64;

/// Which parts of a pod's outbound capture are present in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct OutboundState {
    /// The rules match the settings.
    pub(in crate::dataplane) rules: bool,
    /// The routes match the settings.
    pub(in crate::dataplane) routes: bool,
}

/// An address in the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct Address {
    pub(in crate::dataplane) ip: IpAddr,
    /// The index of its interface.
    pub(in crate::dataplane) interface: u32,
    /// The name of its interface.
    pub(in crate::dataplane) name: String,
    /// Its scope is more than its link.
    pub(in crate::dataplane) global: bool,
}

/// What was in the namespace when it was read.
pub(in crate::dataplane) struct Seen {
    pub(super) interfaces: BTreeMap<u32, Link>,
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) v4: Family,
    pub(super) v6: Family,
}

pub(super) struct Link {
    pub(super) name: String,
    pub(super) up: bool,
}

/// The rules of one family that may affect ours, and the routes of our tables.
pub(super) struct Family {
    pub(super) rules: Vec<RuleMessage>,
    pub(super) routes: Vec<RouteMessage>,
}

impl Seen {
    /// The interfaces: index → name.
    ///
    /// # Errors
    ///
    /// When there are more interfaces than can have programs.
    pub(in crate::dataplane) fn interfaces(&self) -> Result<BTreeMap<u32, String>> {
        let besides_lo = self.interfaces.keys().filter(|index| **index != LOOPBACK_IFINDEX).count();
        ensure!(
            besides_lo <= POD_INTERFACES,
            "the pod has {besides_lo} network interfaces besides lo, and at most {POD_INTERFACES} can be guarded; remove some"
        );
        Ok(self.interfaces.iter().map(|(index, link)| (*index, link.name.clone())).collect())
    }

    /// Every interface, however many there are: index, name, and whether it is up.
    pub(in crate::dataplane) fn all_interfaces(&self) -> impl Iterator<Item = (u32, &str, bool)> {
        self.interfaces.iter().map(|(index, link)| (*index, link.name.as_str(), link.up))
    }

    /// Whether `lo` is up.
    pub(in crate::dataplane) fn has_lo(&self) -> bool {
        self.interfaces.get(&LOOPBACK_IFINDEX).is_some_and(|lo| lo.up)
    }

    /// The addresses, in the order of their interfaces, without 127.0.0.0/8, ::1, and those that failed
    /// duplicate address detection.
    pub(in crate::dataplane) fn addresses(&self) -> Vec<Address> {
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
    pub(in crate::dataplane) fn has_istio_cni(&self) -> bool {
        [&self.v4, &self.v6].into_iter().any(|family| family.rules.iter().any(is_istio_cnis))
    }

    /// Whether there is a capture rule of ours, in either family.
    pub(in crate::dataplane) fn has_capture(&self) -> bool {
        self.v4.has_capture() || self.v6.has_capture()
    }

    /// The same, in the family of `source`.
    pub(in crate::dataplane) fn has_capture_of(&self, source: IpAddr) -> bool {
        self.family(source).has_capture()
    }

    /// Which parts of the outbound capture are present, in one family.
    pub(in crate::dataplane) fn outbound(
        &self,
        source: IpAddr,
        traffic: &Traffic,
    ) -> OutboundState {
        let family = self.family(source);
        let wanted = Outbound::new(&self.deliveries(source), traffic);
        let (_, rules) = family.capture_rules();
        let mut routes = family.our_routes();
        routes.retain(|route| route.table == TABLE);
        OutboundState { rules: rules == wanted.rules, routes: routes == wanted.routes }
    }

    /// Whether what [`Routing::add_keep`] adds is present: the rules, the routes.
    pub(in crate::dataplane) fn has_keep(&self, source: IpAddr, traffic: &Traffic) -> (bool, bool) {
        let family = self.family(source);
        let rules = family.our_rules();
        let wanted = self.deliveries(source).keep_routes();
        (
            keep_rules(traffic).all(|rule| rules.contains(&rule)),
            family.our_routes().is_superset(&wanted),
        )
    }

    /// Whether foreign rules come before ours, in either family. They could divert what should be captured,
    /// or what the guard has moved to `lo`.
    pub(in crate::dataplane) fn has_foreign_rules(&self) -> bool {
        [&self.v4, &self.v6].into_iter().any(|family| !foreign_rules(&family.rules).is_empty())
    }

    pub(super) fn family(&self, of: IpAddr) -> &Family {
        if of.is_ipv4() { &self.v4 } else { &self.v6 }
    }

    /// The deliveries to `lo` in the family of `source`, which is the source address of connections that have
    /// none.
    pub(super) fn deliveries(&self, source: IpAddr) -> Deliveries {
        let up =
            |index| index != LOOPBACK_IFINDEX && self.interfaces.get(&index).is_some_and(|l| l.up);
        // The first address of each interface, global ones first: others cannot reach everything.
        let mut sources: BTreeMap<u32, Option<IpAddr>> = BTreeMap::new();
        for message in &self.addresses {
            let Some(address) = own_address(message) else { continue };
            if up(message.header.index) && address.is_ipv4() == source.is_ipv4() {
                let first = sources.entry(message.header.index).or_default();
                let global = message.header.scope == AddressScope::Universe;
                *first = first.or(global.then_some(address));
            }
        }
        // An interface without an address of the family does not take part in it.
        let bound = sources
            .into_iter()
            .map(|(interface, first)| Delivery { interface, source: first.unwrap_or(source) });
        let lo = Delivery { interface: LOOPBACK_IFINDEX, source };
        Deliveries { lo, bound: bound.collect() }
    }
}

impl Family {
    pub(super) fn our_rules(&self) -> BTreeSet<Rule> {
        self.rules.iter().filter_map(Rule::read).collect()
    }

    pub(super) fn our_routes(&self) -> BTreeSet<Route> {
        self.routes.iter().filter_map(Route::read).collect()
    }

    pub(super) fn our_rule_messages(&self) -> Vec<(Rule, RuleMessage)> {
        let ours = |message: &RuleMessage| Some((Rule::read(message)?, message.clone()));
        self.rules.iter().filter_map(ours).collect()
    }

    pub(super) fn has_capture(&self) -> bool {
        self.capture_rules().1.iter().any(|rule| matches!(rule, Rule::Capture(_)))
    }

    /// Only the rules that decide what is captured, in the kernel's order.
    pub(super) fn capture_rules(&self) -> (Vec<(Rule, RuleMessage)>, Vec<Rule>) {
        let mut ours = self.our_rule_messages();
        ours.retain(|(rule, _)| rule.captures());
        let rules = ours.iter().map(|(rule, _)| *rule).collect();
        (ours, rules)
    }
}

pub(super) fn interface(link: LinkMessage) -> (u32, Link) {
    let up = link.header.flags.contains(LinkFlags::Up);
    let name = link.attributes.into_iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    (link.header.index, Link { name: name.unwrap_or_default(), up })
}

/// The foreign rules before our last one. The kernel's own rule `local` stays first.
pub(super) fn foreign_rules(rules: &[RuleMessage]) -> Vec<RuleMessage> {
    let ours = |rule: &RuleMessage| Rule::read(rule).is_some_and(|rule| rule != Rule::Landing);
    let local = |rule: &RuleMessage| {
        rule.header.action == RuleAction::ToTable && u32::from(rule.header.table) == TABLE_LOCAL
    };
    let before = &rules[..rules.iter().rposition(ours).unwrap_or(0)];
    before.iter().filter(|rule| Rule::read(rule).is_none() && !local(rule)).cloned().collect()
}

/// On a point-to-point interface `Local` is ours and `Address` is the peer's.
pub(super) fn own_address(message: &AddressMessage) -> Option<IpAddr> {
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
