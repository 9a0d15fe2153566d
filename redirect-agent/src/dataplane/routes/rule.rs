//! Our routing rules of a pod, and those of others that matter to them.

use std::collections::BTreeSet;

use redirect_ebpf::abi::{MARK_MASK, MARK_REDIRECTED, MARK_RESCUED, MARK_VIRTUAL};
use rtnetlink::packet_route::{
    IpProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{TABLE, TABLE_ISTIO_CNI, TABLE_KEEP};
use crate::traffic::{Ports, Selection, Traffic};

/// All our rules follow the first one of all, `local`, at its own priority: so a rule that somebody adds
/// without a priority, which is that of the second rule less one if it is not 0 itself, comes behind
/// them. Rules of one priority are in the order in which they were added.
pub(super) const PRIORITY: u32 = 0;
/// Where the rules for excluded ports go on, behind all of ours.
pub(super) const PRIORITY_LANDING: u32 = 1;
const MARK_ISTIO_CNI: u32 = 0x111;

/// Which connections of the pod take the redirection route, and which do not. All are for what the
/// pod itself sends, but for those of virtual interfaces. They are declared in the order that the kernel
/// needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::dataplane) enum Rule {
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
pub(in crate::dataplane) struct Interface([u8; 16]);

impl Interface {
    /// `None` for what is too long to be one.
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

    /// `None`: whatever it is. Packets that come in are not looked into for rules of `lo`. Source: Linux
    /// `include/net/fib_rules.h`, `fib_rule_requires_fldissect`.
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

    /// Where the packets come from: the pod itself, or a virtual interface.
    pub(super) fn input(self) -> String {
        match self {
            Self::Hold(interface) | Self::Virtual(interface) => interface.name(),
            _ => "lo".to_owned(),
        }
    }

    /// Whether it says what of the pod's own connections is captured; all others stay for as long as
    /// the pod is in the mesh.
    pub(super) fn captures(self) -> bool {
        matches!(self, Self::Exclude(_) | Self::Capture(_) | Self::Hold(_))
    }

    /// The rule of ours that the kernel shows.
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

/// 0 is not shown.
pub(super) fn priority(message: &RuleMessage) -> u32 {
    let priority = message.attributes.iter().find_map(|a| match a {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    priority.unwrap_or_default()
}

/// What stays for as long as the pod is in the mesh.
pub(super) fn keep_rules(traffic: &Traffic) -> impl Iterator<Item = Rule> {
    [Rule::Rescue, Rule::Keep, Rule::Landing]
        .into_iter()
        .chain(virtual_interfaces(traffic).map(Rule::Virtual))
}

/// The last port that a rule can name. Source: Linux `include/net/fib_rules.h`,
/// `fib_rule_port_range_valid`.
pub(super) const LAST_PORT: u16 = u16::MAX - 1;

/// Port 65535, which no rule can name, is captured with all the others or not at all; where it is excluded,
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

/// Whether a rule leads to a table of ours.
pub(super) fn leads_to_ours(rule: &RuleMessage) -> bool {
    let tables = [RuleAttribute::Table(TABLE), RuleAttribute::Table(TABLE_KEEP)];
    tables.iter().any(|table| rule.attributes.contains(table))
}

/// Whether a rule leads to a table of ours and is none of ours.
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
