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
    output::printable,
    source::EventKind,
};

/// Namespaces that every cluster has. They stay as they are, and the names of what is in them do not.
const WELL_KNOWN_NAMESPACES: [&str; 5] =
    ["default", "kube-node-lease", "kube-public", "kube-system", "istio-system"];
/// What else every cluster has, and the output is full of.
const WELL_KNOWN: [&str; 4] = ["istio-cni-node", "ztunnel", "redirect-agent", "localhost"];

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
pub(super) struct Names {
    all: BTreeMap<String, Kind>,
    /// Namespace and name of what is in one.
    pairs: BTreeSet<(String, String)>,
}

/// What stands for a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alias {
    pub(super) kind: Kind,
    pub(super) text: String,
}

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
                Content::Json(value) => messages.extend(texts(Some(value))),
                Content::Text(text) => messages.push(text),
            }
        }
        names.in_messages(&messages);
        messages.into_iter().flat_map(|text| uids(text)).for_each(|uid| names.add(&uid, Kind::Uid));
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
    pub(super) fn aliases(&self) -> BTreeMap<String, Alias> {
        let mut counts = BTreeMap::new();
        let alias = |(name, kind): (&String, &Kind)| {
            let count = counts.entry(*kind).or_insert(0_usize);
            *count += 1;
            (name.clone(), Alias { kind: *kind, text: format!("{}-{count}", kind.as_str()) })
        };
        self.all.iter().map(alias).collect()
    }

    /// What is known to be in a namespace: that, and its name.
    pub(super) fn pairs(&self) -> &BTreeSet<(String, String)> {
        &self.pairs
    }

    fn add(&mut self, name: &str, kind: Kind) {
        if name.is_empty() || WELL_KNOWN.contains(&name) || WELL_KNOWN_NAMESPACES.contains(&name) {
            return;
        }
        let known = self.all.entry(name.to_owned()).or_insert(kind);
        *known = (*known).min(kind);
    }

    /// What an operator has written, in JSON and in `status`.
    fn add_text(&mut self, text: &str) {
        self.add(text, Kind::Text);
        self.add(&printable(text), Kind::Text);
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
            self.pairs.insert((namespace.to_owned(), name.to_owned()));
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
                    self.add_text(reason);
                }
                // `unenroll by pid 7, uid 0: REASON`
                let is_change = text("event") == Some(EventKind::Overridden.as_str());
                let said = text("message").filter(|_| is_change);
                if let Some((_, reason)) = said.and_then(|said| said.split_once(": ")) {
                    self.add_text(reason);
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
            ("node-name", Value::Object(flag)) => {
                texts(flag.get("value")).into_iter().for_each(|node| self.add_node(node));
            }
            ("excluded-namespaces" | "daemonset", Value::Object(flag)) => {
                texts(flag.get("value")).into_iter().for_each(|target| self.add_target(target));
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
        let is_namespace = |name: &str| {
            WELL_KNOWN_NAMESPACES.contains(&name) || self.all.get(name) == Some(&Kind::Namespace)
        };
        let found: BTreeSet<(&str, &str)> = words
            .filter_map(|word| word.split_once('/'))
            .filter(|(namespace, _)| is_namespace(namespace))
            .map(|(namespace, name)| (namespace, name.trim_end_matches('.')))
            .collect();
        found.into_iter().for_each(|(namespace, name)| self.add_pod(namespace, name));
    }
}

/// Every text in a value.
fn texts(value: Option<&Value>) -> Vec<&String> {
    match value {
        Some(Value::Array(values)) => values.iter().flat_map(|value| texts(Some(value))).collect(),
        Some(Value::Object(fields)) => {
            fields.values().flat_map(|value| texts(Some(value))).collect()
        }
        Some(Value::String(text)) => vec![text],
        _ => Vec::new(),
    }
}

/// The uids in a text, as Kubernetes writes them: also those in the paths of pods' cgroups, which have `_` for
/// `-`, and after `pod` those of static pods, which have neither.
fn uids(text: &str) -> BTreeSet<String> {
    let bytes = text.as_bytes();
    let is_word = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    let mut found = BTreeSet::new();
    for start in 0..bytes.len() {
        let after_pod = bytes.get(..start).is_some_and(|before| before.ends_with(b"pod"));
        if start > 0 && is_word(start - 1) && !after_pod {
            continue;
        }
        let of = |length: usize| {
            let uid = text.get(start..start + length)?;
            (!is_word(start + length)).then_some(uid)
        };
        let is_hyphen = |at| matches!(at, 8 | 13 | 18 | 23);
        let is_long = |uid: &&str| {
            uid.bytes().enumerate().all(|(at, byte)| match byte {
                b'-' | b'_' => is_hyphen(at),
                byte => byte.is_ascii_hexdigit() && !is_hyphen(at),
            })
        };
        let is_hash = |uid: &&str| uid.bytes().all(|byte| byte.is_ascii_hexdigit());
        found.extend(of(36).filter(is_long).map(|uid| uid.replace('_', "-")));
        found.extend(of(32).filter(|_| after_pod).filter(is_hash).map(str::to_owned));
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn aliases(value: Value) -> BTreeMap<String, Alias> {
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
            "found": "Service kube-system/metrics and default/4711; redirect-agent/v1",
            "settings": { "daemonset": { "value": ["infra/sunset"], "from": "environment" } },
            "cgroup": "0::/kubepods-pod01234567_89ab_cdef_0123_456789abcdef.slice",
            "root": "/kubepods/burstable/pod0123456789abcdef0123456789abcdef/x",
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
            ("metrics", "pod-"),
            ("4711", "pod-"),
            ("infra", "ns-"),
            ("sunset", "pod-"),
            ("01234567-89ab-cdef-0123-456789abcdef", "uid-"),
            ("0123456789abcdef0123456789abcdef", "uid-"),
            ("api.example.com", "host-"),
            ("INC 4711", "text-"),
        ] {
            let alias = found.get(name).unwrap_or_else(|| panic!("no {name} in {found:?}"));
            assert!(alias.text.starts_with(kind), "{name}: {alias:?}");
        }
        for word in ["kube-system", "default", "redirect-agent", "v1", "override", "unenroll"] {
            assert!(!found.contains_key(word), "{word} in {found:?}");
        }
    }
}
