//! A network of the node, as its configuration file describes it, with or without our entry.
//!
//! Files are edited as text, so that everything else stays as it is, byte for byte: unknown fields, their
//! order, numbers, and the layout. Removing our entry undoes adding it.

use std::fmt;

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use super::entry::{Entry, PLUGIN, VERSIONS};

/// istio-cni's plugin, which does the same as ours.
const ISTIO_PLUGIN: &str = "istio-cni";

/// Why a file cannot be used.
#[derive(Debug, Error)]
pub enum Invalid {
    /// It is not JSON, or not what CNI requires.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// It is JSON, but not an object.
    #[error("it is no object")]
    NoObject,
    /// A required field is missing or empty.
    #[error("there is no {0}")]
    Missing(&'static str),
}

/// A network that a runtime accepts. Source: libcni `conf.go`, `NetworkConfFromBytes`,
/// `NetworkPluginConfFromBytes`.
#[derive(Debug)]
pub enum Network<'a> {
    /// One plugin: a `.conf` or `.json` file.
    Single(Single<'a>),
    /// A chain of plugins: a `.conflist` file.
    List(List<'a>),
}

/// A network of one plugin.
#[derive(Debug)]
pub struct Single<'a> {
    text: &'a str,
    head: Head,
}

/// A network of a chain of plugins.
#[derive(Debug)]
pub struct List<'a> {
    text: &'a str,
    head: Head,
    plugins: Vec<Plugin<'a>>,
}

#[derive(Debug)]
struct Plugin<'a> {
    text: &'a str,
    name: String,
}

/// What a network and a single plugin have in common.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    name: String,
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    cni_versions: Vec<String>,
}

#[derive(Deserialize)]
struct Plugins<'a> {
    #[serde(borrow)]
    plugins: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct Type {
    #[serde(rename = "type", default)]
    name: String,
}

/// Reads an object: serde would take an array for one, too.
fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Invalid> {
    let object = serde_json::from_str(text)?;
    if text.trim_start().starts_with('{') { Ok(object) } else { Err(Invalid::NoObject) }
}

impl Head {
    fn read(text: &str) -> Result<Self, Invalid> {
        let head: Head = object(text)?;
        if head.name.is_empty() {
            return Err(Invalid::Missing("name"));
        }
        Ok(head)
    }

    /// Why our plugin cannot be in a chain of these versions.
    fn too_old_or_new(&self) -> Option<String> {
        let versions = std::iter::once(&self.cni_version).chain(&self.cni_versions);
        let spoken = versions.into_iter().any(|version| VERSIONS.contains(&version.as_str()));
        (!spoken).then(|| {
            format!(
                "its cniVersion is {:?}, and a chain with {PLUGIN} takes one of {}",
                self.cni_version,
                VERSIONS.join(", ")
            )
        })
    }
}

fn plugin_name(text: &str) -> Result<String, Invalid> {
    let Type { name } = object(text)?;
    if name.is_empty() {
        return Err(Invalid::Missing("type of a plugin"));
    }
    Ok(name)
}

impl<'a> Network<'a> {
    /// Reads the content of a file with this name.
    ///
    /// # Errors
    ///
    /// When a runtime would not accept it.
    pub fn read(file: &str, text: &'a str) -> Result<Self, Invalid> {
        if !file.ends_with(".conflist") {
            plugin_name(text)?;
            return Ok(Network::Single(Single { text, head: Head::read(text)? }));
        }
        List::read(text).map(Network::List)
    }

    /// Why our plugin cannot be in it.
    pub fn unfit(&self) -> Option<String> {
        match self {
            Network::Single(single) => single.head.too_old_or_new(),
            Network::List(list) => list.head.too_old_or_new(),
        }
    }
}

impl Single<'_> {
    /// The list of this plugin and `entry`.
    pub fn to_list(&self, entry: &Entry) -> String {
        let head = |value: &str| serde_json::Value::from(value).to_string();
        format!(
            "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"plugins\": [\n    {},\n    {}\n  ]\n}}\n",
            head(&self.head.cni_version),
            head(&self.head.name),
            self.text.trim(),
            Written { entry, before: "\n    " }
        )
    }
}

impl<'a> List<'a> {
    fn read(text: &'a str) -> Result<Self, Invalid> {
        let head = Head::read(text)?;
        let Plugins { plugins } = object(text)?;
        let plugins = plugins.unwrap_or_default();
        if plugins.is_empty() {
            return Err(Invalid::Missing("plugin"));
        }
        let plugins = plugins
            .into_iter()
            .map(|plugin| Ok(Plugin { text: plugin.get(), name: plugin_name(plugin.get())? }))
            .collect::<Result<_, Invalid>>()?;
        Ok(List { text, head, plugins })
    }

    /// Whether `entry` is in it correctly: once, and last.
    pub fn has(&self, entry: &Entry) -> bool {
        let is_ours = |plugin: &Plugin| plugin.name == PLUGIN;
        self.plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1
            && self.plugins.last().is_some_and(|last| {
                is_ours(last) && serde_json::from_str::<Entry>(last.text).is_ok_and(|e| e == *entry)
            })
    }

    /// Whether any entry of ours is in it.
    pub fn has_ours(&self) -> bool {
        self.plugins.iter().any(|plugin| plugin.name == PLUGIN)
    }

    /// Whether an entry of istio-cni is in it.
    pub fn has_istio(&self) -> bool {
        self.plugins.iter().any(|plugin| plugin.name == ISTIO_PLUGIN)
    }

    /// The file with a single network that it replaces.
    pub fn replaces(&self) -> Option<String> {
        let ours = self.plugins.iter().filter(|plugin| plugin.name == PLUGIN);
        ours.filter_map(|plugin| serde_json::from_str::<Entry>(plugin.text).ok()?.replaces).next()
    }

    /// The same with `entry` at its end, and no other one of ours.
    ///
    /// # Errors
    ///
    /// When it has no plugin but ours.
    pub fn with(&self, entry: &Entry) -> Result<String, Invalid> {
        let text = self.without()?;
        let list = List::read(&text)?;
        let Some(last) = list.plugins.last() else { return Err(Invalid::Missing("plugin")) };
        let Place { start, end } = list.place(last);
        // The new entry gets the layout of the last one.
        let before = &text[text[..start].trim_end().len()..start];
        Ok(format!("{},{before}{}{}", &text[..end], Written { entry, before }, &text[end..]))
    }

    /// The same without any entry of ours.
    ///
    /// # Errors
    ///
    /// When it has no plugin but ours.
    pub fn without(&self) -> Result<String, Invalid> {
        if self.plugins.iter().all(|plugin| plugin.name == PLUGIN) {
            return Err(Invalid::Missing("plugin but ours"));
        }
        let mut text = String::new();
        let mut copied = 0;
        let mut plugins = self.plugins.iter().peekable();
        let mut kept = None;
        while let Some(plugin) = plugins.next() {
            let place = self.place(plugin);
            if plugin.name != PLUGIN {
                kept = Some(place.end);
                continue;
            }
            // With the comma before it, or, at the beginning, the one after it.
            let (from, to) = match (kept, plugins.peek()) {
                (Some(end), _) => (end.max(copied), place.end),
                (None, Some(next)) => (place.start, self.place(next).start),
                (None, None) => (place.start, place.end),
            };
            text.push_str(&self.text[copied..from]);
            copied = to;
        }
        text.push_str(&self.text[copied..]);
        Ok(text)
    }

    /// A plugin's position in the text, from which it was borrowed.
    fn place(&self, plugin: &Plugin) -> Place {
        let start = plugin.text.as_ptr().addr() - self.text.as_ptr().addr();
        Place { start, end: start + plugin.text.len() }
    }
}

struct Place {
    start: usize,
    end: usize,
}

/// An entry as text, on one line or on several, as what is `before` it suggests.
struct Written<'a> {
    entry: &'a Entry,
    before: &'a str,
}

impl fmt::Display for Written<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(line) = self.before.rfind('\n') else {
            return f.write_str(&serde_json::to_string(self.entry).map_err(|_| fmt::Error)?);
        };
        let text = serde_json::to_string_pretty(self.entry).map_err(|_| fmt::Error)?;
        // Every line break of a pretty print is one of its layout: in strings they are escaped.
        f.write_str(&text.replace('\n', &self.before[line..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPACT: &str =
        r#"{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp","mtu":1e3}]}"#;
    /// As somebody writes it by hand: odd layout, an unknown field, a number that no `f64` holds.
    const ODD: &str = "{ \"plugins\" : [\n\n\t{\"type\":\"bridge\", \"x\": 123456789012345678901234567890.10},\n\n\t{\"type\":\"portmap\",\"capabilities\":{\"portMappings\":true}}  ] ,\r\n  \"zzz\": [\"plugins\"],\"name\":\"\u{e4}\",\"cniVersion\":\"1.0.0\"}\n\n";

    fn list(text: &str) -> List<'_> {
        match Network::read("10-net.conflist", text) {
            Ok(Network::List(list)) => list,
            other => panic!("{other:?}"),
        }
    }

    fn types(text: &str) -> Vec<String> {
        list(text).plugins.iter().map(|plugin| plugin.name.clone()).collect()
    }

    #[test]
    fn entry_goes_to_the_end_and_everything_else_stays_to_the_byte() {
        let entry = Entry::default();
        assert_eq!(
            list(COMPACT).with(&entry).unwrap(),
            r#"{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp","mtu":1e3},{"type":"redirect-cni","socket":"/var/run/istio-cni/pluginevent.sock","excludeNamespaces":["kube-system"],"timeoutSeconds":30}]}"#
        );
        let with = list(ODD).with(&entry).unwrap();
        let (before, after) = with.split_once(",\n\n\t{\n\t  \"type\": \"redirect-cni\"").unwrap();
        assert!(ODD.starts_with(before), "{with}");
        assert!(ODD.ends_with(after.split_once("\n\t}").unwrap().1), "{with}");
        for text in [COMPACT, ODD] {
            let with = list(text).with(&entry).unwrap();
            assert!(list(&with).has(&entry));
            assert_eq!(list(&with).with(&entry).unwrap(), with);
            assert_eq!(list(&with).without().unwrap(), text);
            assert_eq!(list(text).without().unwrap(), text);
            assert!(!list(text).has(&entry) && !list(text).has_ours());
        }
    }

    #[test]
    fn entries_of_ours_that_are_old_or_elsewhere_or_several_become_one() {
        let ours = r#"{"type":"redirect-cni","socket":"/old"}"#;
        let (a, b) = (r#"{"type":"a"}"#, r#"{"type":"b"}"#);
        for plugins in [
            vec![ours, a, b],
            vec![a, ours, b],
            vec![a, b, ours],
            vec![ours, ours, a, ours, b, ours, ours],
        ] {
            let text = format!(
                r#"{{"name":"n","cniVersion":"1.1.0","plugins":[ {} ]}}"#,
                plugins.join(" , ")
            );
            let entry = Entry::default();
            assert!(!list(&text).has(&entry), "{text}");
            let with = list(&text).with(&entry).unwrap();
            assert_eq!(types(&with), ["a", "b", "redirect-cni"], "{text}");
            assert!(list(&with).has(&entry), "{with}");
            assert_eq!(types(&list(&with).without().unwrap()), ["a", "b"], "{text}");
        }
        let alone = format!(r#"{{"name":"n","cniVersion":"1.0.0","plugins":[{ours}]}}"#);
        assert!(list(&alone).without().is_err() && list(&alone).with(&Entry::default()).is_err());
    }

    #[test]
    fn single_network_becomes_a_list_with_its_plugin_as_it_is() {
        let text =
            "{\"type\": \"ptp\",\n \"name\": \"a \\\"net\\\"\", \"cniVersion\": \"0.4.0\"}\n";
        for file in ["10-net.conf", "10-net.json"] {
            let Ok(Network::Single(single)) = Network::read(file, text) else { panic!("{file}") };
            let entry = Entry { replaces: Some(file.to_owned()), ..Entry::default() };
            let made = single.to_list(&entry);
            let made = list(&made);
            assert_eq!(
                (made.head.name.as_str(), made.head.cni_version.as_str()),
                ("a \"net\"", "0.4.0")
            );
            assert_eq!(made.plugins[0].text, text.trim());
            assert!(made.has(&entry));
            assert_eq!(made.replaces().as_deref(), Some(file));
        }
    }

    #[test]
    fn what_a_runtime_would_not_accept_is_no_network() {
        for (file, text) in [
            ("a.conflist", ""),
            ("a.conflist", "null"),
            ("a.conflist", "[]"),
            ("a.conflist", "{"),
            ("a.conflist", "{}"),
            ("a.conflist", r#"{"name":"n"}"#),
            ("a.conflist", r#"{"name":"n","plugins":null}"#),
            ("a.conflist", r#"{"name":"n","plugins":{}}"#),
            ("a.conflist", r#"{"name":"n","plugins":[]}"#),
            ("a.conflist", r#"{"name":"n","plugins":["ptp"]}"#),
            ("a.conflist", r#"{"name":"n","plugins":[["ptp"]]}"#),
            ("a.conflist", r#"["n","1.0.0",[]]"#),
            ("a.conf", r#"["ptp"]"#),
            ("a.conflist", r#"{"name":"n","plugins":[{}]}"#),
            ("a.conflist", r#"{"name":"n","plugins":[{"type":""}]}"#),
            ("a.conflist", r#"{"name":"n","plugins":[{"type":1}]}"#),
            ("a.conflist", r#"{"name":"","plugins":[{"type":"a"}]}"#),
            ("a.conflist", r#"{"name":1,"plugins":[{"type":"a"}]}"#),
            ("a.conflist", r#"{"plugins":[{"type":"a"}]}"#),
            ("a.conflist", r#"{"name":"n","cniVersion":1,"plugins":[{"type":"a"}]}"#),
            ("a.conflist", r#"{"name":"n","plugins":[{"type":"a"}]} x"#),
            ("a.conflist", r#"{"name":"n","type":"a"}"#),
            ("a.conf", COMPACT),
            ("a.json", COMPACT),
            ("a.conf", r#"{"type":"a"}"#),
            ("a.conf", "{"),
        ] {
            assert!(Network::read(file, text).is_err(), "{file} {text}");
        }
    }

    #[test]
    fn versions_that_have_no_chains_or_that_we_do_not_know_are_unfit() {
        for (version, fit) in [
            (r#""cniVersion":"0.3.0","#, true),
            (r#""cniVersion":"1.1.0","#, true),
            (r#""cniVersion":"0.2.0","#, false),
            (r#""cniVersion":"2.0.0","#, false),
            (r#""cniVersion":"2.0.0","cniVersions":["1.0.0","2.0.0"],"#, true),
            ("", false),
        ] {
            let plugin = format!(r#"{{{version}"name":"n","type":"a"}}"#);
            let chain = format!(r#"{{{version}"name":"n","plugins":[{{"type":"a"}}]}}"#);
            for (file, text) in [("a.conf", plugin), ("a.conflist", chain)] {
                assert_eq!(Network::read(file, &text).unwrap().unfit().is_none(), fit, "{text}");
            }
        }
    }
}
