//! Which names are in a bundle: those of pods, namespaces, nodes, and what else tells where it is from.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use clap::Parser as _;
use serde_json::Value;

use super::{Content, Part};
use crate::{
    cli::{Cli, Command},
    membership::{check_namespace_name, is_dns_subdomain},
    source::EventKind,
};

/// Every cluster has these, and the output is full of the words. They stay as they are.
const WELL_KNOWN: [&str; 9] = [
    "default",
    "kube-node-lease",
    "kube-public",
    "kube-system",
    "istio-system",
    "istio-cni-node",
    "ztunnel",
    "redirect-agent",
    "localhost",
];

/// What a name is of. Of a name that is several, the first counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Namespace,
    Node,
    Pod,
    Host,
    Uid,
    /// What an operator has given as a reason.
    Text,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Namespace => "ns",
            Kind::Node => "node",
            Kind::Pod => "pod",
            Kind::Host => "host",
            Kind::Uid => "uid",
            Kind::Text => "text",
        }
    }
}

/// The names, each with its kind.
#[derive(Debug, Default)]
pub(super) struct Names(BTreeMap<String, Kind>);

impl Names {
    /// The names in these parts, and those of the namespaces mounted in `netns_dir`.
    pub(super) fn of(parts: &[Part], netns_dir: &Path) -> Self {
        let mut names = Self::default();
        for part in parts {
            if let Content::Json(value) = &part.content {
                names.in_value(value);
            }
        }
        for entry in fs::read_dir(netns_dir).into_iter().flatten().flatten() {
            let file = entry.file_name();
            if let Some((namespace, pod)) = file.to_str().and_then(|name| name.split_once('_')) {
                names.add_pod(namespace, pod);
            }
        }
        if let Ok(host) = nix::unistd::gethostname() {
            names.add_node(&host.to_string_lossy());
        }
        // Messages name what no field does: services, gateways, pods of other nodes.
        let mut messages = Vec::new();
        for part in parts {
            match &part.content {
                Content::Json(value) => texts(value, &mut messages),
                Content::Text(text) => messages.push(text),
            }
        }
        names.in_messages(&messages);
        names
    }

    /// A node, and the first label of its name, which is its name elsewhere.
    pub(super) fn add_node(&mut self, name: &str) {
        self.add(name, Kind::Node);
        if let Some((first, _)) = name.split_once('.') {
            self.add(first, Kind::Node);
        }
    }

    /// The names, each with an alias.
    pub(super) fn aliases(&self) -> BTreeMap<String, String> {
        let mut counts = BTreeMap::new();
        let alias = |(name, kind): (&String, &Kind)| {
            let count = counts.entry(*kind).or_insert(0_usize);
            *count += 1;
            (name.clone(), format!("{}-{count}", kind.as_str()))
        };
        self.0.iter().map(alias).collect()
    }

    fn add(&mut self, name: &str, kind: Kind) {
        // A number may be anything.
        if name.is_empty() || WELL_KNOWN.contains(&name) || name.bytes().all(|b| b.is_ascii_digit())
        {
            return;
        }
        let known = self.0.entry(name.to_owned()).or_insert(kind);
        *known = (*known).min(kind);
    }

    fn add_namespace(&mut self, name: &str) {
        if check_namespace_name(name).is_ok() {
            self.add(name, Kind::Namespace);
        }
    }

    fn add_pod(&mut self, namespace: &str, name: &str) {
        if check_namespace_name(namespace).is_ok() && is_dns_subdomain(name) {
            self.add(namespace, Kind::Namespace);
            self.add(name, Kind::Pod);
        }
    }

    /// `NAMESPACE/NAME`, or a namespace alone.
    fn add_target(&mut self, target: &str) {
        match target.split_once('/') {
            Some((namespace, name)) => self.add_pod(namespace, name),
            None => self.add_namespace(target),
        }
    }

    fn in_value(&mut self, value: &Value) {
        match value {
            Value::Array(values) => values.iter().for_each(|value| self.in_value(value)),
            Value::Object(fields) => {
                let text = |key: &str| fields.get(key).and_then(Value::as_str);
                if let (Some(namespace), Some(name)) = (text("namespace"), text("name")) {
                    self.add_pod(namespace, name);
                }
                let is_override = fields.contains_key("mode") || fields.contains_key("until");
                if let Some(reason) = text("reason").filter(|_| is_override) {
                    self.add(reason, Kind::Text);
                }
                // `unenroll by pid 7, uid 0: REASON`
                let is_change = text("kind") == Some(EventKind::Overridden.as_str());
                let said = text("message").filter(|_| is_change);
                if let Some((_, reason)) = said.and_then(|said| said.split_once(": ")) {
                    self.add(reason, Kind::Text);
                }
                for (key, value) in fields {
                    self.in_field(key, value);
                    self.in_value(value);
                }
            }
            _ => {}
        }
    }

    fn in_field(&mut self, key: &str, value: &Value) {
        match (key, value) {
            ("node", Value::String(node)) => self.add_node(node),
            ("node", Value::Object(node)) => {
                if let Some(name) = node.get("name").and_then(Value::as_str) {
                    self.add_node(name);
                }
            }
            ("namespace", Value::String(namespace)) => self.add_namespace(namespace),
            ("uid", Value::String(uid)) => self.add(uid, Kind::Uid),
            ("source", Value::String(source)) => self.add_host(source),
            ("target", Value::String(target)) => self.add_target(target),
            ("pod" | "name" | "gateway" | "daemonSet", Value::String(name))
                if name.contains('/') =>
            {
                self.add_target(name);
            }
            ("excludeNamespaces" | "elsewhere", Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).for_each(|name| self.add_target(name));
            }
            ("commandLine", Value::Array(words)) => {
                self.in_command(words.iter().filter_map(Value::as_str));
            }
            // The stored overrides.
            ("targets", Value::Object(overrides)) => {
                overrides.keys().for_each(|target| self.add_target(target));
            }
            _ => {}
        }
    }

    /// The API server's host is in `kube:https://api.example.com:6443/`.
    fn add_host(&mut self, source: &str) {
        let Some((_, rest)) = source.split_once("://") else { return };
        let host = rest.split(['/', ':', ' ']).next().unwrap_or_default();
        if !host.starts_with('[') && host.parse::<std::net::IpAddr>().is_err() {
            self.add(host, Kind::Host);
        }
    }

    fn in_command<'a>(&mut self, words: impl Iterator<Item = &'a str>) {
        let Ok(Cli { command: Command::Run(args) }) = Cli::try_parse_from(words) else { return };
        args.excluded_namespaces.iter().for_each(|namespace| self.add_namespace(namespace));
        args.node_name.iter().for_each(|node| self.add_node(node));
        if let Some(daemon_set) = &args.daemonset {
            self.add_pod(&daemon_set.namespace, &daemon_set.name);
        }
    }

    /// What is after a namespace and a slash is the name of something in it.
    fn in_messages(&mut self, messages: &[&String]) {
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '/');
        let words = messages.iter().flat_map(|text| text.split(|c: char| !is_of_name(c)));
        // A path has more slashes, or begins with one.
        let found: BTreeSet<&str> = words
            .filter_map(|word| word.split_once('/'))
            .filter(|(namespace, _)| self.0.get(*namespace) == Some(&Kind::Namespace))
            .map(|(_, name)| name.trim_end_matches('.'))
            .filter(|name| is_dns_subdomain(name))
            .collect();
        found.into_iter().for_each(|name| self.add(name, Kind::Pod));
    }
}

fn texts<'a>(value: &'a Value, found: &mut Vec<&'a String>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| texts(value, found)),
        Value::Object(fields) => fields.values().for_each(|value| texts(value, found)),
        Value::String(text) => found.push(text),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn aliases(value: Value) -> BTreeMap<String, String> {
        let part = Part { name: "x.json".to_owned(), content: Content::Json(value) };
        Names::of(&[part], Path::new("/nonexistent")).aliases()
    }

    #[test]
    fn names_are_found_wherever_they_are() {
        let found = aliases(json!({
            "source": "kube:https://api.example.com:6443/",
            "pods": [{ "namespace": "shop", "name": "cart-1", "uid": "u-1" }],
            "overrides": [{ "target": "bank", "mode": "unenroll", "reason": "INC 4711" }],
            "targets": { "stored/one": { "mode": "unenroll" } },
            "override": { "mode": "unenroll", "target": "bank" },
            "problems": [{ "message": "pod shop/web.1 has the address of shop/cart-1." }],
            "entry": { "excludeNamespaces": ["kube-system", "ops"] },
            "commandLine": ["redirect-agent", "run", "--excluded-namespaces", "hidden"],
        }));
        for (name, kind) in [
            ("shop", "ns-"),
            ("bank", "ns-"),
            ("ops", "ns-"),
            ("hidden", "ns-"),
            ("stored", "ns-"),
            ("one", "pod-"),
            ("cart-1", "pod-"),
            ("web.1", "pod-"),
            ("u-1", "uid-"),
            ("api.example.com", "host-"),
            ("INC 4711", "text-"),
        ] {
            let alias = found.get(name).unwrap_or_else(|| panic!("no {name} in {found:?}"));
            assert!(alias.starts_with(kind), "{name}: {alias}");
        }
        for word in ["kube-system", "redirect-agent", "override", "unenroll"] {
            assert!(!found.contains_key(word), "{word} in {found:?}");
        }
    }
}
