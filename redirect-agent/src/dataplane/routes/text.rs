//! Rules and routes as `ip rule` and `ip route` print them, as far as that matters for a report.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::{Debug, Write as _},
    pin::pin,
};

use anyhow::{Context as _, Result};
use futures_util::{Stream, StreamExt as _};
use rtnetlink::{
    Error, IpVersion,
    packet_route::{
        AddressFamily,
        route::{RouteAttribute, RouteMessage, RouteType},
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
    },
};

use super::{
    Routing, TABLE_LOCAL, is_absent,
    route::{Route, address},
    rule::{Rule, is_istio_cnis, priority},
};

/// How many lines are kept of each kind: a pod with `NET_ADMIN` may create any number.
const LINES: usize = 2000;

/// The rules or the routes of a network namespace, in lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(in crate::dataplane) struct Lines {
    pub(in crate::dataplane) ipv4: Vec<String>,
    pub(in crate::dataplane) ipv6: Vec<String>,
}

impl Routing {
    /// Every rule, in the kernel's order. Ours and istio-cni's are marked.
    pub(in crate::dataplane) fn rules_text(&self) -> Result<Lines> {
        let of = |family: IpVersion| {
            let rules = self.handle.rule().get(family).execute();
            self.runtime.block_on(lines("routing rules", rules, |message| Some(rule(message))))
        };
        Ok(Lines { ipv4: of(IpVersion::V4)?, ipv6: of(IpVersion::V6)? })
    }

    /// Every route. Ours are marked.
    pub(in crate::dataplane) fn routes_text(
        &self,
        interfaces: &BTreeMap<u32, String>,
    ) -> Result<Lines> {
        let of = |family| {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let routes = self.handle.route().get(filter).execute();
            self.runtime.block_on(lines("routes", routes, |message| {
                // Addresses and broadcasts of the interfaces themselves say nothing more.
                let matters = message.header.kind != RouteType::Broadcast
                    && message.header.kind != RouteType::Multicast
                    && table(message) != TABLE_LOCAL;
                matters.then(|| route(message, interfaces))
            }))
        };
        Ok(Lines { ipv4: of(AddressFamily::Inet)?, ipv6: of(AddressFamily::Inet6)? })
    }
}

async fn lines<T>(
    what: &str,
    messages: impl Stream<Item = Result<T, Error>>,
    text: impl Fn(&T) -> Option<String>,
) -> Result<Vec<String>> {
    let (mut messages, mut found) = (pin!(messages), Vec::new());
    while let Some(message) = messages.next().await {
        match message {
            Err(error) if is_absent(&error) => break,
            message => found.extend(text(&message.with_context(|| format!("list {what}"))?)),
        }
        if found.len() == LINES {
            found.push("…".to_owned());
            break;
        }
    }
    Ok(found)
}

/// `unicast`: the kernel's words are the names of the variants.
fn word(kind: &impl Debug) -> String {
    format!("{kind:?}").to_lowercase()
}

/// A rule may name an interface that cannot exist, in words that look like more of the line.
fn shown(name: &str) -> Cow<'_, str> {
    let odd = |c: char| c.is_whitespace() || c.is_control() || c == '#';
    if name.contains(odd) { format!("{name:?}").into() } else { name.into() }
}

pub(super) fn rule(message: &RuleMessage) -> String {
    let header = &message.header;
    let mut text = format!("{}:", priority(message));
    if header.flags.contains(RuleFlags::Invert) {
        text.push_str(" not");
    }
    let (mut table, mut mark, mut mask) = (u32::from(header.table), None, None);
    for attribute in &message.attributes {
        let _infallible = match attribute {
            RuleAttribute::Source(ip) => write!(text, " from {ip}/{}", header.src_len),
            RuleAttribute::Destination(ip) => write!(text, " to {ip}/{}", header.dst_len),
            RuleAttribute::Iifname(name) => write!(text, " iif {}", shown(name)),
            RuleAttribute::Oifname(name) => write!(text, " oif {}", shown(name)),
            RuleAttribute::IpProtocol(protocol) => write!(text, " ipproto {}", word(protocol)),
            RuleAttribute::SourcePortRange(r) => write!(text, " sport {}-{}", r.start, r.end),
            RuleAttribute::DestinationPortRange(r) => write!(text, " dport {}-{}", r.start, r.end),
            RuleAttribute::UidRange(range) => {
                write!(text, " uidrange {}-{}", range.start, range.end)
            }
            RuleAttribute::SuppressPrefixLen(len) if *len != u32::MAX => {
                write!(text, " suppress_prefixlength {len}")
            }
            RuleAttribute::Goto(to) => write!(text, " goto {to}"),
            RuleAttribute::Table(found) => {
                table = *found;
                Ok(())
            }
            RuleAttribute::FwMark(found) => {
                mark = Some(*found);
                Ok(())
            }
            RuleAttribute::FwMask(found) => {
                mask = Some(*found);
                Ok(())
            }
            _ => Ok(()),
        };
    }
    if mark.is_some() || mask.is_some() {
        let (mark, mask) = (mark.unwrap_or_default(), mask.unwrap_or(u32::MAX));
        let _infallible = write!(text, " fwmark {mark:#x}/{mask:#x}");
    }
    let _infallible = match header.action {
        RuleAction::ToTable => write!(text, " lookup {table}"),
        // It has said where to.
        RuleAction::Goto => Ok(()),
        action => write!(text, " {}", word(&action)),
    };
    if let Some(ours) = Rule::read(message) {
        let ours = format!("{ours:?}");
        let name = ours.split('(').next().unwrap_or_default().to_lowercase();
        let _infallible = write!(text, "  # redirect-agent: {name}");
    } else if is_istio_cnis(message) {
        text.push_str("  # istio-cni");
    }
    text
}

fn table(message: &RouteMessage) -> u32 {
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    table.unwrap_or_else(|| message.header.table.into())
}

pub(super) fn route(message: &RouteMessage, interfaces: &BTreeMap<u32, String>) -> String {
    let header = &message.header;
    let mut text = match header.kind {
        RouteType::Unicast => String::new(),
        kind => format!("{} ", word(&kind)),
    };
    let to = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(to) => address(to.clone()),
        _ => None,
    });
    let _infallible = match to {
        Some(to) => write!(text, "{to}/{}", header.destination_prefix_length),
        None => write!(text, "default"),
    };
    for attribute in &message.attributes {
        let _infallible = match attribute {
            RouteAttribute::Gateway(to) => match address(to.clone()) {
                Some(to) => write!(text, " via {to}"),
                None => Ok(()),
            },
            RouteAttribute::Via(via) => write!(text, " via {via:?}"),
            RouteAttribute::Oif(index) => match interfaces.get(index) {
                Some(name) => write!(text, " dev {name}"),
                None => write!(text, " dev {index}"),
            },
            RouteAttribute::PrefSource(from) => match address(from.clone()) {
                Some(from) => write!(text, " src {from}"),
                None => Ok(()),
            },
            RouteAttribute::Priority(metric) => write!(text, " metric {metric}"),
            RouteAttribute::MultiPath(hops) => write!(text, " nexthops {}", hops.len()),
            _ => Ok(()),
        };
    }
    let _infallible = write!(text, " table {}", table(message));
    if Route::read(message).is_some() {
        text.push_str("  # redirect-agent");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_in_a_rule_adds_nothing_to_its_line() {
        for (name, expected) in [
            ("eth0", "0: iif eth0 unspec"),
            ("a\n0: from all", r#"0: iif "a\n0: from all" unspec"#),
            ("a  # istio-cni", r#"0: iif "a  # istio-cni" unspec"#),
        ] {
            let mut message = RuleMessage::default();
            message.attributes.push(RuleAttribute::Iifname(name.to_owned()));
            assert_eq!(rule(&message), expected);
        }
    }
}
