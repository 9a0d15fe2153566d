//! Replaces addresses and names, each by the same alias wherever it is.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use clap::{Arg, Command, CommandFactory as _};
use serde_json::Value;

use super::{
    Content, Part,
    names::{Alias, Kind, Names},
};
use crate::cli::Cli;

/// Fields with names.
const NAMED: [&str; 14] = [
    "namespace",
    "name",
    "node",
    "target",
    "pod",
    "gateway",
    "object",
    "reason",
    "elsewhere",
    "excludeNamespaces",
    "commandLine",
    "excluded-namespaces",
    "node-name",
    "daemonset",
];
/// What is before a name in a message or a command.
const BEFORE_A_NAME: [&str; 10] = [
    "namespace ",
    "-n ",
    "--namespace ",
    "node ",
    "pod ",
    "enroll ",
    "unenroll ",
    "auto ",
    "explain ",
    "Service ",
];
/// What is between the cells of a table, at least.
const BETWEEN_CELLS: &str = "   ";

/// Replaces.
pub(super) struct Redactor {
    /// The names and their aliases, by the letters and digits that a name begins with, the longest name first.
    names: HashMap<String, Vec<(String, String)>>,
    /// Those of digits alone, which may be anything: they count only where a name stands.
    numbers: BTreeMap<String, String>,
    /// The flags of every command.
    flags: BTreeSet<String>,
    addresses: BTreeMap<IpAddr, String>,
    counts: [usize; 2],
}

impl Redactor {
    pub(super) fn new(names: Names) -> Self {
        let cli = Cli::command();
        let arguments = cli.get_subcommands().flat_map(Command::get_arguments);
        let flags = arguments.filter_map(Arg::get_long).map(str::to_owned).collect();
        let aliases = names.aliases();
        let (numbers, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            aliases.into_iter().partition(|(name, _)| name.bytes().all(|b| b.is_ascii_digit()));
        let mut forms = places(&numbers, &others, names.pairs());
        let numbers = numbers.into_iter().map(|(name, alias)| (name, alias.text)).collect();
        let (names, addresses, counts) = (HashMap::new(), BTreeMap::new(), [0; 2]);
        let mut redactor = Self { names, numbers, flags, addresses, counts };
        for (name, alias) in &others {
            match alias.kind {
                // What an operator has written is looked for when the addresses in it are replaced already.
                Kind::Text => forms.push((redactor.without_addresses(name), alias.text.clone())),
                _ => forms.extend(spellings(name, alias)),
            }
        }
        for (name, alias) in forms {
            redactor.names.entry(word(&name).to_owned()).or_default().push((name, alias));
        }
        for names in redactor.names.values_mut() {
            names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        }
        redactor
    }

    pub(super) fn part(&mut self, part: &mut Part) {
        part.name = self.text(&part.name);
        match &mut part.content {
            Content::Text(text) => *text = self.text(text),
            Content::Json(value) => self.value(value, false),
        }
    }

    fn value(&mut self, value: &mut Value, is_name: bool) {
        match value {
            Value::String(text) if is_name => *text = self.named(text),
            Value::String(text) => *text = self.text(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.value(value, is_name)),
            Value::Object(fields) => {
                let old = std::mem::take(fields);
                for (key, mut value) in old {
                    if key == "targets" {
                        self.keys(&mut value);
                    }
                    // Not a name, though it may be spelled like one.
                    if !matches!(key.as_str(), "apiVersion" | "kind") {
                        // Of a flag, the values are in a field of their own.
                        let is_name =
                            NAMED.contains(&key.as_str()) || is_name && key.as_str() == "value";
                        self.value(&mut value, is_name);
                    }
                    fields.insert(key, value);
                }
            }
            _ => {}
        }
    }

    /// The stored overrides are by their target. All other keys are the format's.
    fn keys(&mut self, targets: &mut Value) {
        let Value::Object(overrides) = targets else { return };
        let old = std::mem::take(overrides);
        overrides.extend(old.into_iter().map(|(target, found)| (self.named(&target), found)));
    }

    /// The text with all of its names and addresses replaced.
    pub(super) fn text(&mut self, text: &str) -> String {
        // A name like `db` may be a part of an address.
        let text = self.without_addresses(text);
        self.without_names(&text, false)
    }

    /// The same of a text in which a number is a name, if it is spelled like one.
    pub(super) fn named(&mut self, text: &str) -> String {
        let text = self.without_addresses(text);
        self.without_names(&text, true)
    }

    /// A name counts where no letter or digit is right before or behind it.
    fn without_names(&self, text: &str, numbers_too: bool) -> String {
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        while let Some(c) = text[at..].chars().next() {
            let rest = &text[at..];
            let word = word(rest);
            let number = || {
                let (alias, before) = (self.numbers.get(word)?, &text[..at]);
                let is_name = numbers_too
                    || BEFORE_A_NAME.iter().any(|words| before.ends_with(words))
                    || is_cell(before, &rest[word.len()..]);
                is_name.then_some(alias)
            };
            // A name begins with a letter or a digit; what an operator has written, with anything.
            let (length, by) = if let Some((name, alias)) = self.find(word, rest) {
                (name.len(), alias)
            } else if let Some(flag) = self.flag(rest) {
                (flag.len(), flag)
            } else if word.is_empty() {
                (c.len_utf8(), &rest[..c.len_utf8()])
            } else {
                (word.len(), number().map_or(word, String::as_str))
            };
            out.push_str(by);
            at += length;
        }
        out
    }

    /// A flag of ours that the text begins with: it may have the word of a name in it.
    fn flag<'a>(&self, text: &'a str) -> Option<&'a str> {
        let name = text.strip_prefix("--")?;
        let is_of_flag = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let end = name.find(|c| !is_of_flag(c)).unwrap_or(name.len());
        self.flags.contains(&name[..end]).then(|| &text[..2 + end])
    }

    fn find(&self, word: &str, text: &str) -> Option<(&str, &str)> {
        let ends =
            |name: &str| !text[name.len()..].starts_with(|c: char| c.is_ascii_alphanumeric());
        let names = self.names.get(word)?.iter();
        let mut found = names.filter(|(name, _)| text.starts_with(name) && ends(name));
        found.next().map(|(name, alias)| (name.as_str(), alias.as_str()))
    }

    fn without_addresses(&mut self, text: &str) -> String {
        let is_of_token = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '_');
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.find(|c| !is_of_token(c)).unwrap_or(rest.len());
            let (token, behind) = rest.split_at(end);
            // Most words have no address in them.
            if token.bytes().filter(|byte| matches!(byte, b':' | b'.')).count() < 2 {
                out.push_str(token);
            } else {
                out.push_str(&self.token(token));
            }
            let next = behind.find(is_of_token).unwrap_or(behind.len());
            out.push_str(&behind[..next]);
            rest = &behind[next..];
        }
        out
    }

    /// An address, perhaps with a port, or with the end of a sentence.
    fn token(&mut self, token: &str) -> String {
        let whole = token.trim_end_matches('.');
        for body in [whole, whole.strip_suffix(':').unwrap_or(whole)] {
            if let Some(alias) = self.address(body) {
                return alias + &token[body.len()..];
            }
        }
        // 10.0.0.1:80, or name:fd00::1
        let mut at = Vec::new();
        for (colon, _) in token.match_indices(':') {
            at.push(colon + 1);
        }
        for start in at {
            if let Some(alias) = self.address(&token[start..]) {
                return self.pieces(&token[..start]) + &alias;
            }
        }
        self.pieces(token)
    }

    fn pieces(&mut self, token: &str) -> String {
        let pieces = token.split(':').map(|piece| {
            let body = piece.trim_end_matches('.');
            match self.address(body) {
                Some(alias) => alias + &piece[body.len()..],
                None => piece.to_owned(),
            }
        });
        pieces.collect::<Vec<_>>().join(":")
    }

    /// `None` for what is not an address, and for those that are the same everywhere.
    fn address(&mut self, text: &str) -> Option<String> {
        let ip = text.parse::<IpAddr>().ok()?.to_canonical();
        if ip.is_loopback() || ip.is_unspecified() {
            return None;
        }
        let alias = self.addresses.entry(ip).or_insert_with(|| {
            let count = &mut self.counts[usize::from(ip.is_ipv6())];
            *count += 1;
            format!("v{}-{count}", if ip.is_ipv6() { 6 } else { 4 })
        });
        Some(alias.clone())
    }
}

/// How a name is spelled, with the alias for each: a uid has `_` in the path of a cgroup, and `pod` before it.
fn spellings(name: &str, alias: &Alias) -> Vec<(String, String)> {
    let mut forms = vec![(name.to_owned(), alias.text.clone())];
    if alias.kind == Kind::Uid {
        let in_path = name.replace('-', "_");
        forms.push((format!("pod{name}"), format!("pod{}", alias.text)));
        if in_path != name {
            forms.push((format!("pod{in_path}"), format!("pod{}", alias.text)));
            forms.push((in_path, alias.text.clone()));
        }
    }
    forms
}

/// What has numbers in it that are names, with what stands for that: reasons, and names beside their namespace.
fn places(
    numbers: &BTreeMap<String, Alias>,
    others: &BTreeMap<String, Alias>,
    pairs: &BTreeSet<(String, String)>,
) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (name, Alias { text, .. }) in numbers.iter().filter(|(_, a)| a.kind == Kind::Text) {
        found.push((format!(": {name}"), format!(": {text}")));
        found.push((format!("({name})"), format!("({text})")));
    }
    let of_number = |(namespace, name): &&(String, String)| {
        numbers.contains_key(namespace) || numbers.contains_key(name)
    };
    for (namespace, name) in pairs.iter().filter(of_number) {
        let alias = |name: &str| {
            let alias = numbers.get(name).or_else(|| others.get(name));
            alias.map_or_else(|| name.to_owned(), |alias| alias.text.clone())
        };
        let (of_namespace, of_name) = (alias(namespace), alias(name));
        for between in ['/', '_'] {
            found.push((
                format!("{namespace}{between}{name}"),
                format!("{of_namespace}{between}{of_name}"),
            ));
        }
        found.push((format!("{name}.{namespace}.svc"), format!("{of_name}.{of_namespace}.svc")));
    }
    found
}

/// Whether what is between these two is a cell of a table.
fn is_cell(before: &str, behind: &str) -> bool {
    let first = before.is_empty() || before.ends_with('\n');
    let last = behind.is_empty() || behind.starts_with('\n');
    let (left, right) = (before.ends_with(BETWEEN_CELLS), behind.starts_with(BETWEEN_CELLS));
    (left && (right || last)) || (first && right)
}

/// The letters and digits that a text begins with.
fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::{
        journal::Journal,
        membership::PodKey,
        source::{Event, EventKind},
    };

    fn part(value: Value) -> Part {
        Part { name: "pods/shop/cart-7d9/explain.json".to_owned(), content: Content::Json(value) }
    }

    /// As the journal has it.
    fn note(message: &str) -> Value {
        let journal = Journal::default();
        let pod = PodKey::new("shop", "cart").unwrap();
        journal.note(&pod, &Event::new(EventKind::Overridden, message));
        json!(journal.all())
    }

    fn redactor() -> Redactor {
        let known = part(json!([
            { "namespace": "shop", "name": "cart-7d9", "uid": "uid-of-shop-cart" },
            { "namespace": "shop", "name": "cart" },
            { "namespace": "shop-eu", "name": "web" },
            { "namespace": "excluded", "name": "web" },
            { "node": "n1.example.com" },
            { "namespace": "db", "name": "queue" },
            note("unenroll by pid 7, uid 0: ticket of Ann"),
        ]));
        let names = Names::of(&[known], Path::new("/nonexistent"));
        Redactor::new(names)
    }

    #[test]
    fn address_has_one_alias_however_it_is_written() {
        let mut redactor = redactor();
        for (text, expected) in [
            ("10.0.0.1", "v4-1"),
            ("10.0.0.1:8080 > [fd00::a]:80", "v4-1:8080 > [v6-1]:80"),
            ("::ffff:10.0.0.1", "v4-1"),
            ("src 10.0.0.10, not 10.0.0.1.", "src v4-2, not v4-1."),
            ("10.0.0.0/8 fd00::/8", "v4-3/8 v6-2/8"),
            ("fd00:0:0:0::A and fd00::a: it", "v6-1 and v6-1: it"),
            ("https://10.0.0.1:6443/", "https://v4-1:6443/"),
            ("fe80::1%eth0", "v6-3%eth0"),
            ("at:fd00::a", "at:v6-1"),
            ("127.0.0.1 [::1]:15053 0.0.0.0/0 ::/0", "127.0.0.1 [::1]:15053 0.0.0.0/0 ::/0"),
        ] {
            assert_eq!(redactor.text(text), expected, "{text}");
        }
        let named = redactor.text("fd00:db::5");
        assert!(named.starts_with("v6-") && !named.contains(':'), "{named}");
    }

    #[test]
    fn reason_of_a_change_is_replaced_when_it_no_longer_holds() {
        let said = redactor().text("unenroll by pid 7, uid 0: ticket of Ann");
        assert_eq!(said, "unenroll by pid 7, uid 0: text-1");
    }

    #[test]
    fn reason_is_replaced_with_the_addresses_in_it() {
        let reason = "Bob's\tlaptop, 192.0.2.7, is slow";
        let known = part(json!({ "mode": "unenroll", "reason": reason }));
        let mut redactor = Redactor::new(Names::of(&[known], Path::new("/nonexistent")));
        // In JSON, and as `status` prints it.
        for shown in [reason.to_owned(), crate::output::printable(reason)] {
            let said = redactor.text(&format!("unenroll ({shown})"));
            assert!(said.starts_with("unenroll (text-") && said.len() < 20, "{said}");
        }
    }

    #[test]
    fn what_is_no_address_stays() {
        let mut redactor = redactor();
        for text in [
            "2026-11-30T16:30:00Z",
            "Linux 6.18.44",
            "redirect_agent::zds=debug",
            "std::fs",
            "`--excluded-namespaces`",
            "0: from all fwmark 0xd3/0xfff iif lo lookup 15002",
            "net/ipv4/conf/all/src_valid_mark",
        ] {
            assert_eq!(redactor.text(text), text);
        }
    }

    #[test]
    fn name_has_one_alias_wherever_it_is() {
        let mut redactor = redactor();
        let mut of = |text: &str| redactor.text(text);
        let (shop, eu) = (of("shop"), of("shop-eu"));
        let (cart, other) = (of("cart-7d9"), of("cart"));
        assert!(shop.starts_with("ns-") && eu.starts_with("ns-") && shop != eu);
        assert!(cart.starts_with("pod-") && other.starts_with("pod-") && cart != other);
        assert_eq!(of("pod shop/cart-7d9: x"), format!("pod {shop}/{cart}: x"));
        assert_eq!(of("/run/netns/shop_cart"), format!("/run/netns/{shop}_{other}"));
        assert_eq!(of("cart.shop.svc"), format!("{other}.{shop}.svc"));
        assert!(of("uid-of-shop-cart").starts_with("uid-"));
        assert_eq!(of("--shop shop--"), format!("--{shop} {shop}--"));
        assert_eq!(of("workshop cartoon shops"), "workshop cartoon shops");
        assert_eq!(of("n1"), of("n1"));
        assert!(of("n1.example.com").starts_with("node-"), "{}", of("n1.example.com"));
    }

    fn of(values: Value) -> Redactor {
        Redactor::new(Names::of(&[part(values)], Path::new("/nonexistent")))
    }

    #[test]
    fn uid_has_one_alias_in_paths_of_cgroups_too() {
        let uid = "01234567-89ab-cdef-0123-456789abcdef";
        let static_uid = "0123456789abcdef0123456789abcdef";
        let mut redactor = of(json!([
            { "uid": uid },
            { "cgroup": format!("/kubepods/pod{static_uid}/x") },
        ]));
        let alias = redactor.text(uid);
        assert!(alias.starts_with("uid-"), "{alias}");
        let in_path = uid.replace('-', "_");
        assert_eq!(
            redactor.text(&format!("0::/kubepods-burstable-pod{in_path}.slice/x.scope")),
            format!("0::/kubepods-burstable-pod{alias}.slice/x.scope")
        );
        assert_eq!(
            redactor.text(&format!("/kubepods/pod{uid}/1")),
            format!("/kubepods/pod{alias}/1")
        );
        let static_pod = redactor.text(&format!("/kubepods/pod{static_uid}/2"));
        assert!(static_pod.starts_with("/kubepods/poduid-"), "{static_pod}");
    }

    #[test]
    fn number_is_a_name_where_a_name_stands() {
        let mut redactor = of(json!([
            { "namespace": "4711", "name": "0" },
            { "namespace": "shop", "name": "80" },
            { "found": "Service kube-system/123 and default/web" },
            { "mode": "unenroll", "reason": "99" },
        ]));
        let [namespace, zero, eighty] = ["4711", "0", "80"].map(|name| redactor.named(name));
        let (shop, system) = (redactor.text("shop"), redactor.named("123"));
        for alias in [&zero, &eighty, &system] {
            assert!(alias.starts_with("pod-"), "{alias}");
        }
        assert!(namespace.starts_with("ns-"), "{namespace}");
        for (text, expected) in [
            ("pod 4711/0: lost", format!("pod {namespace}/{zero}: lost")),
            ("/run/netns/4711_0", format!("/run/netns/{namespace}_{zero}")),
            ("0.4711.svc", format!("{zero}.{namespace}.svc")),
            ("kubectl -n 4711 get pod 0", format!("kubectl -n {namespace} get pod {zero}")),
            ("redirect-agent auto 4711/0", format!("redirect-agent auto {namespace}/{zero}")),
            ("shop/80 calls port 80", format!("{shop}/{eighty} calls port 80")),
            (
                "4711   0      ready\nshop   80",
                format!("{namespace}   {zero}      ready\n{shop}   {eighty}"),
            ),
            ("kube-system/123", format!("kube-system/{system}")),
            ("by pid 7, uid 0: 99", "by pid 7, uid 0: text-1".to_owned()),
            ("4711", "4711".to_owned()),
            (
                "2026-11-30T00:47:11Z 0 of 80, 6.80.0",
                "2026-11-30T00:47:11Z 0 of 80, 6.80.0".to_owned(),
            ),
        ] {
            assert_eq!(redactor.text(text), expected, "{text}");
        }
        let mut found = part(json!({ "namespace": "4711", "pod": "4711/0", "value": "4711" }));
        redactor.part(&mut found);
        let Content::Json(value) = &found.content else { panic!("{found:?}") };
        assert_eq!(value["namespace"], namespace);
        assert_eq!(
            (&value["pod"], &value["value"]),
            (&json!(format!("{namespace}/{zero}")), &json!("4711"))
        );
    }

    #[test]
    fn keys_of_the_format_stay_and_targets_do_not() {
        let mut redactor = redactor();
        let mut part = part(json!({
            "kind": "web",
            "web": "web",
            "targets": { "shop/web": { "mode": "enroll" }, "shop": { "mode": "enroll" } },
        }));
        redactor.part(&mut part);
        let Content::Json(value) = &part.content else { panic!("{part:?}") };
        assert_eq!(value["kind"], "web");
        assert_ne!(value["web"], "web");
        let text = value.to_string();
        assert!(!text.contains("shop"), "{text}");
        assert!(!part.name.contains("shop") && part.name.ends_with("/explain.json"), "{part:?}");
    }
}
