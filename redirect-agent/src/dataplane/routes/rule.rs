//! Our routing rules in a pod, and foreign rules that affect them.

use std::collections::BTreeSet;

use redirect_ebpf::abi::{MARK_MASK, MARK_REDIRECTED, MARK_RESCUED, MARK_VIRTUAL};
use rtnetlink::packet_route::{
    IpProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{TABLE, TABLE_ISTIO_CNI, TABLE_KEEP};
use crate::traffic::{Ports, Selection, Traffic};

/// All our rules follow the very first rule, `local`, and share its priority. A rule that somebody adds
/// without a priority gets the second rule's priority minus one, or 0, and so comes behind ours. Rules of one
/// priority keep the order in which they were added.
pub(super) const PRIORITY: u32 = 0;
/// Where excluded ports continue, behind all our rules.
pub(super) const PRIORITY_LANDING: u32 = 1;
const MARK_ISTIO_CNI: u32 = 0x111;

/// Which connections of the pod take the redirection route, and which do not. Except for those of virtual
/// interfaces, they all apply to what the pod itself sends. They are declared in the order that the kernel
/// needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::dataplane) enum Rule {
    /// What the guard moves to `lo`.
    Rescue,
    /// Connections that were redirected when the capture ended.
    Keep,
    /// Connections that come in on this virtual interface and that its program redirects.
    Virtual(Interface),
    /// Excludes unmarked connections to these ports: they continue behind [`Rule::Landing`].
    Exclude(Ports),
    /// All unmarked connections to these ports, or to any port.
    Capture(Option<Ports>),
    /// Drops what comes in on this virtual interface until its program is attached.
    Hold(Interface),
    /// Does nothing: this is where [`Rule::Exclude`] continues.
    Landing,
}

/// The name of an interface, padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::dataplane) struct Interface([u8; 16]);

impl Interface {
    /// `None` if it is too long.
    pub(super) fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self(bytes))
    }

    pub(super) fn name(&self) -> String {
        String::from_utf8_lossy(&self.0).trim_end_matches('\0').to_owned()
    }
}

/// The virtual interfaces that a pod's settings name, whether or not they exist.
pub(super) fn virtual_interfaces(traffic: &Traffic) -> impl Iterator<Item = Interface> {
    traffic.virtual_interfaces.iter().filter_map(|name| Interface::new(name))
}

impl Rule {
    pub(super) fn priority(self) -> u32 {
        if self == Self::Landing { PRIORITY_LANDING } else { PRIORITY }
    }

    pub(super) fn mark(self) -> u32 {
        match self {
            Self::Exclude(_) | Self::Capture(_) | Self::Hold(_) => 0,
            Self::Keep => MARK_REDIRECTED,
            Self::Virtual(_) => MARK_VIRTUAL,
            Self::Rescue | Self::Landing => MARK_RESCUED,
        }
    }

    /// `None` matches any protocol. The kernel does not parse incoming packets for rules of `lo`. Source:
    /// Linux `include/net/fib_rules.h`, `fib_rule_requires_fldissect`.
    pub(super) fn protocol(self) -> Option<IpProtocol> {
        match self {
            Self::Rescue | Self::Landing => None,
            _ => Some(IpProtocol::Tcp),
        }
    }

    pub(super) fn ports(self) -> Option<Ports> {
        match self {
            Self::Exclude(ports) => Some(ports),
            Self::Capture(ports) => ports,
            _ => None,
        }
    }

    /// The input interface: `lo` for the pod itself, or a virtual interface.
    pub(super) fn input(self) -> String {
        match self {
            Self::Hold(interface) | Self::Virtual(interface) => interface.name(),
            _ => "lo".to_owned(),
        }
    }

    /// Whether it decides which of the pod's own connections are captured. All other rules stay as long as
    /// the pod is in the mesh.
    pub(super) fn captures(self) -> bool {
        matches!(self, Self::Exclude(_) | Self::Capture(_) | Self::Hold(_))
    }

    /// Reads one of our rules from what the kernel shows.
    pub(super) fn read(message: &RuleMessage) -> Option<Self> {
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

/// The kernel does not show priority 0.
pub(super) fn priority(message: &RuleMessage) -> u32 {
    let priority = message.attributes.iter().find_map(|a| match a {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    priority.unwrap_or_default()
}

/// The rules that stay as long as the pod is in the mesh.
pub(super) fn keep_rules(traffic: &Traffic) -> impl Iterator<Item = Rule> {
    [Rule::Rescue, Rule::Keep, Rule::Landing]
        .into_iter()
        .chain(virtual_interfaces(traffic).map(Rule::Virtual))
}

/// The last port that a rule can name. Source: Linux `include/net/fib_rules.h`,
/// `fib_rule_port_range_valid`.
pub(super) const LAST_PORT: u16 = u16::MAX - 1;

/// No rule can name port 65535: it is captured with all the others or not at all. If it is excluded,
/// `verdict::on_lo` sends it out again.
pub(super) fn port_rules(ports: &Selection<Ports>) -> BTreeSet<Rule> {
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
            // All ports except those of the ranges, which are in order.
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

/// Whether a rule leads to a table of ours.
pub(super) fn leads_to_ours(rule: &RuleMessage) -> bool {
    let tables = [RuleAttribute::Table(TABLE), RuleAttribute::Table(TABLE_KEEP)];
    tables.iter().any(|table| rule.attributes.contains(table))
}

/// Whether a rule leads to one of our tables but is not one of our rules.
pub(super) fn is_stale(rule: &RuleMessage) -> bool {
    leads_to_ours(rule) && Rule::read(rule).is_none()
}

/// Whether a rule is istio-cni's.
pub(super) fn is_istio_cnis(rule: &RuleMessage) -> bool {
    [
        RuleAttribute::Table(TABLE_ISTIO_CNI),
        RuleAttribute::FwMark(MARK_ISTIO_CNI),
        RuleAttribute::FwMask(MARK_MASK),
    ]
    .iter()
    .all(|attribute| rule.attributes.contains(attribute))
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
                // In order of priority.
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
