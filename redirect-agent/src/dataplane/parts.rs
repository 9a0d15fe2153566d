//! What the kernel has, or should have, for an enrolled pod, by name.

use std::fmt;

/// A kind of thing that the kernel has for an enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// What the row in the map `pods` says about the capture.
    Row,
    /// The entry of an address in the map `addresses`.
    Address,
    /// The inbound settings for ports, in the map `inbound_ports`.
    InboundPorts,
    /// The inbound settings for ranges, in the map `inbound_ranges`.
    InboundRanges,
    /// The outbound settings in the maps `outbound_ports` and `outbound_ranges`.
    Outbound,
    /// The `sk_lookup` link.
    Lookup,
    /// A tcx link.
    Tcx,
    /// A clsact filter, or that it is the first.
    Clsact,
    /// The settings of a virtual interface, in the map `virtual_ifs`.
    Reroute,
    /// The redirection routes of a family.
    Route,
    /// The capture rules of a family.
    Rule,
    /// The drain route of a family.
    DrainRoute,
    /// The drain rule of a family.
    DrainRule,
    /// The order of rules: no foreign rule comes before ours.
    RuleOrder,
    /// A sysctl.
    Sysctl,
}

impl PartKind {
    /// Every kind.
    pub const ALL: [Self; 15] = [
        Self::Row,
        Self::Address,
        Self::InboundPorts,
        Self::InboundRanges,
        Self::Outbound,
        Self::Lookup,
        Self::Tcx,
        Self::Clsact,
        Self::Reroute,
        Self::Route,
        Self::Rule,
        Self::DrainRoute,
        Self::DrainRule,
        Self::RuleOrder,
        Self::Sysctl,
    ];

    /// Whether [`super::Dataplane::capture`] makes it. [`super::Dataplane::prepare`] makes all others.
    pub(super) fn is_made_by_capture(self) -> bool {
        matches!(self, PartKind::Row | PartKind::Route | PartKind::Rule)
    }

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            PartKind::Row => "row",
            PartKind::Address => "address",
            PartKind::InboundPorts => "inbound_ports",
            PartKind::InboundRanges => "inbound_ranges",
            PartKind::Outbound => "outbound",
            PartKind::Lookup => "sk_lookup",
            PartKind::Tcx => "tcx",
            PartKind::Clsact => "clsact",
            PartKind::Reroute => "reroute",
            PartKind::Route => "route",
            PartKind::Rule => "rule",
            PartKind::DrainRoute => "drain_route",
            PartKind::DrainRule => "drain_rule",
            PartKind::RuleOrder => "rule_order",
            PartKind::Sysctl => "sysctl",
        }
    }
}

/// One thing that the kernel has, or should have, for an enrolled pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is.
    pub kind: PartKind,
    /// Which one, where there are several: an address, an interface, a family, a sysctl.
    pub of: Option<String>,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            PartKind::Row => "capture",
            PartKind::InboundPorts => "inbound ports",
            PartKind::InboundRanges => "inbound ranges",
            PartKind::Outbound => "outbound exclusions",
            PartKind::DrainRoute => "drain route",
            PartKind::DrainRule => "drain rule",
            PartKind::RuleOrder => "precedence of our rules",
            kind => kind.as_str(),
        };
        match &self.of {
            Some(of) => write!(f, "{kind} {of}"),
            None => f.write_str(kind),
        }
    }
}

/// What the kernel has for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// What is there.
    pub present: Vec<Part>,
    /// What is missing.
    pub missing: Vec<Part>,
}

impl Inspection {
    pub(super) fn add(&mut self, present: bool, kind: PartKind, of: impl Into<Option<String>>) {
        let part = Part { kind, of: of.into() };
        if present { &mut self.present } else { &mut self.missing }.push(part);
    }
}
