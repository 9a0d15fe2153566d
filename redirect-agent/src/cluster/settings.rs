//! By what settings the agents decide: their flags, as their pods have them.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1 as k8s;

use super::report::SettingsRow;
use crate::{
    enablement::Selectors,
    membership::{Config, check_namespace_name},
    words::Reading,
};

/// The agent's flags that decide, and the variables that stand for them.
const EXCLUDED: [&str; 2] = ["--excluded-namespaces", "EXCLUDE_NAMESPACES"];
const SELECTORS: [&str; 2] = ["--enablement-selectors", "AMBIENT_ENABLEMENT_SELECTOR"];

/// The settings, and where they are from.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// What is decided by.
    pub membership: Config,
    /// Whether the sidecar's annotations count.
    pub sidecar_annotations: bool,
    /// Where they were found.
    pub from: String,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// What an operator says in place of the agents.
#[derive(Clone, Debug, Default)]
pub struct SettingsOverrides {
    /// `--excluded-namespaces`
    pub excluded_namespaces: Option<Vec<String>>,
    /// `--enablement-selectors`
    pub selectors: Option<Selectors>,
}

impl SettingsOverrides {
    /// Whether nothing needs to be read.
    pub(super) fn is_complete(&self) -> bool {
        self.excluded_namespaces.is_some() && self.selectors.is_some()
    }
}

/// The arguments and the environment of an agent's container.
#[derive(Clone, Debug, Default)]
pub(super) struct AgentArgs {
    args: Vec<String>,
    /// Where the environment is from; a later source takes precedence, as for the kubelet.
    sources: Vec<EnvSource>,
    /// What the ConfigMaps say, as far as they could be read.
    config_maps: BTreeMap<String, BTreeMap<String, String>>,
}

#[derive(Clone, Debug)]
enum EnvSource {
    Value {
        variable: String,
        value: String,
    },
    ConfigMapKey {
        variable: String,
        map: String,
        key: String,
    },
    ConfigMap {
        prefix: String,
        map: String,
    },
    /// Not read, because it may be secret, or is known on the node only.
    Unread {
        variable: String,
        what: String,
    },
    /// The same, of all variables with a prefix.
    UnreadSecret {
        prefix: String,
        secret: String,
    },
}

/// The value of a setting, and what could not be read that may take precedence.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found<'a> {
    value: Option<&'a str>,
    unread: Option<String>,
}

impl EnvSource {
    fn of_env_from(source: &k8s::EnvFromSource) -> Option<Self> {
        let prefix = source.prefix.clone().unwrap_or_default();
        match (&source.config_map_ref, &source.secret_ref) {
            (Some(map), _) => Some(Self::ConfigMap { prefix, map: map.name.clone() }),
            (None, Some(secret)) => {
                Some(Self::UnreadSecret { prefix, secret: secret.name.clone() })
            }
            (None, None) => None,
        }
    }

    fn of_env(source: &k8s::EnvVar) -> Self {
        let variable = source.name.clone();
        let Some(from) = &source.value_from else {
            return Self::Value { variable, value: source.value.clone().unwrap_or_default() };
        };
        match (&from.config_map_key_ref, &from.secret_key_ref) {
            (Some(at), _) => {
                Self::ConfigMapKey { variable, map: at.name.clone(), key: at.key.clone() }
            }
            (None, Some(at)) => Self::Unread { variable, what: format!("Secret {}", at.name) },
            (None, None) => Self::Unread { variable, what: "its valueFrom".to_owned() },
        }
    }
}

impl AgentArgs {
    pub(super) fn of(container: &k8s::Container) -> Self {
        let args = [&container.command, &container.args].into_iter().flatten().flatten();
        let env_from = container.env_from.iter().flatten().filter_map(EnvSource::of_env_from);
        let env = container.env.iter().flatten().map(EnvSource::of_env);
        Self {
            args: args.cloned().collect(),
            sources: env_from.chain(env).collect(),
            config_maps: BTreeMap::new(),
        }
    }

    /// The ConfigMaps that say something about the settings.
    pub(super) fn needed_config_maps(&self) -> BTreeSet<&str> {
        let needed = |source: &EnvSource| {
            [EXCLUDED, SELECTORS].iter().any(|[_, name]| match source {
                EnvSource::ConfigMap { prefix, .. } => name.starts_with(prefix.as_str()),
                EnvSource::ConfigMapKey { variable, .. } => variable == name,
                _ => false,
            })
        };
        let maps = self.sources.iter().filter(|source| needed(source));
        maps.filter_map(|source| match source {
            EnvSource::ConfigMap { map, .. } | EnvSource::ConfigMapKey { map, .. } => {
                Some(map.as_str())
            }
            _ => None,
        })
        .collect()
    }

    /// Adds what a ConfigMap says.
    pub(super) fn add(&mut self, map: &str, data: BTreeMap<String, String>) {
        self.config_maps.insert(map.to_owned(), data);
    }

    /// The value of a flag, or of the variable that stands for it. The last flag counts, as for the agent,
    /// whose other flags may be those of another version.
    fn find(&self, [flag, variable]: [&str; 2]) -> Found<'_> {
        let mut by_flag = None;
        let mut args = self.args.iter().map(String::as_str).peekable();
        while let Some(arg) = args.next() {
            match arg.strip_prefix(flag) {
                Some("") => by_flag = args.peek().copied(),
                Some(rest) => by_flag = rest.strip_prefix('=').or(by_flag),
                None => {}
            }
        }
        let mut found = match by_flag {
            Some(_) => Found { value: by_flag, unread: None },
            None => self.find_variable(variable),
        };
        found.value = found.value.filter(|value| !value.is_empty());
        found
    }

    fn find_variable(&self, name: &str) -> Found<'_> {
        let in_map = |map: &str, key: &str| self.config_maps.get(map)?.get(key).map(String::as_str);
        let mut unread = None;
        for source in self.sources.iter().rev() {
            let value = match source {
                EnvSource::Value { variable, value } if variable == name => Some(value.as_str()),
                EnvSource::ConfigMapKey { variable, map, key } if variable == name => {
                    in_map(map, key)
                }
                EnvSource::ConfigMap { prefix, map } => {
                    name.strip_prefix(prefix.as_str()).and_then(|key| in_map(map, key))
                }
                EnvSource::Unread { variable, what } if variable == name => {
                    let unread = Some(format!("its variable {name} is from {what}"));
                    return Found { value: None, unread };
                }
                EnvSource::UnreadSecret { prefix, secret } if name.starts_with(prefix.as_str()) => {
                    unread = Some(format!("its variable {name} may be from Secret {secret}"));
                    None
                }
                _ => None,
            };
            if value.is_some() {
                return Found { value, unread };
            }
        }
        Found { value: None, unread }
    }
}

impl Settings {
    /// Those of the agent `from`, if there is one, and what is given in place of them.
    pub(super) fn new(overrides: SettingsOverrides, from: Option<(String, &AgentArgs)>) -> Self {
        let named = match (&from, overrides.is_complete()) {
            (_, true) => "the command line".to_owned(),
            (Some((from, _)), _) => format!("pod {from}"),
            (None, _) => "the defaults".to_owned(),
        };
        let mut settings = Self { from: named, ..Self::default() };
        let args = from.map(|(_, args)| args);
        settings.sidecar_annotations =
            args.is_some_and(|args| args.args.iter().any(|arg| arg == "--sidecar-annotations"));
        match (overrides.excluded_namespaces, args) {
            (Some(names), _) => {
                settings.membership.excluded_namespaces = names.into_iter().collect()
            }
            (None, Some(args)) => settings.read_excluded(args),
            (None, None) => {}
        }
        match (overrides.selectors, args) {
            (Some(selectors), _) => settings.membership.selectors = Some(selectors),
            (None, Some(args)) => settings.read_selectors(args),
            (None, None) => {}
        }
        settings
    }

    fn read_excluded(&mut self, args: &AgentArgs) {
        let Found { value, unread } = args.find(EXCLUDED);
        if let Some(why) = unread {
            self.note(EXCLUDED[0], &why);
        }
        let Some(list) = value else { return };
        let names: BTreeSet<String> = list.split(',').map(str::to_owned).collect();
        match names.iter().find_map(|name| check_namespace_name(name).err()) {
            None => self.membership.excluded_namespaces = names,
            Some(error) => self.note(EXCLUDED[0], &error.to_string()),
        }
    }

    fn read_selectors(&mut self, args: &AgentArgs) {
        let Found { value, unread } = args.find(SELECTORS);
        if let Some(why) = unread {
            self.note(SELECTORS[0], &why);
        }
        match value {
            None => {}
            Some(file) if file.starts_with('@') => {
                self.note(SELECTORS[0], &format!("they are in its file {}", &file[1..]));
            }
            Some(text) => match text.parse() {
                Ok(selectors) => self.membership.selectors = Some(selectors),
                Err(error) => self.note(SELECTORS[0], &format!("{error:#}")),
            },
        }
    }

    fn note(&mut self, flag: &str, why: &str) {
        let from = &self.from;
        self.notes.push(format!("the {flag} of {from} cannot be read: {why}; give {flag}"));
    }

    /// Which labels and annotations count.
    pub fn reading(&self) -> Reading {
        Reading::new(&self.membership, self.sidecar_annotations)
    }

    pub(super) fn row(&self) -> SettingsRow {
        SettingsRow {
            from: self.from.clone(),
            excluded_namespaces: self.membership.excluded_namespaces.iter().cloned().collect(),
            enablement_selectors: self.membership.selectors.is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Those of an agent whose ConfigMaps are `maps`.
    fn settings_with(container: serde_json::Value, maps: &[(&str, &[(&str, &str)])]) -> Settings {
        let container: k8s::Container = serde_json::from_value(container).unwrap();
        let mut args = AgentArgs::of(&container);
        for (name, data) in maps {
            let data = data.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            args.add(name, data.collect());
        }
        let from = Some(("istio-system/agent".to_owned(), &args));
        Settings::new(SettingsOverrides::default(), from)
    }

    /// The same, of an agent with one ConfigMap.
    fn settings(mut container: serde_json::Value, map: &[(&str, &str)]) -> Settings {
        container["envFrom"] = json!([{"configMapRef": {"name": "map"}}]);
        settings_with(container, &[("map", map)])
    }

    fn excluded(settings: &Settings) -> Vec<&str> {
        settings.membership.excluded_namespaces.iter().map(String::as_str).collect()
    }

    #[test]
    fn settings_are_those_of_the_agents_container() {
        let of = |args: &[&str]| json!({"name": "agent", "args": args});
        assert_eq!(excluded(&settings(of(&["run"]), &[])), ["kube-system"]);
        let map = [("EXCLUDE_NAMESPACES", "kube-system,infra")];
        assert_eq!(excluded(&settings(of(&["run"]), &map)), ["infra", "kube-system"]);
        for args in [
            &["run", "--excluded-namespaces=a,b"][..],
            &["run", "--excluded-namespaces", "a,b", "--a-newer-flag"],
            &["run", "--excluded-namespaces=x", "--excluded-namespaces=a,b"],
        ] {
            assert_eq!(excluded(&settings(of(args), &map)), ["a", "b"], "{args:?}");
        }
        let env = json!({"name": "agent", "env": [
            {"name": "EXCLUDE_NAMESPACES", "value": "own"},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ]});
        assert_eq!(excluded(&settings(env, &map)), ["own"]);
        let selectors = [("AMBIENT_ENABLEMENT_SELECTOR", "- podSelector: {matchLabels: {a: b}}\n")];
        let found = settings(of(&["run"]), &selectors);
        assert!(found.membership.selectors.is_some() && found.notes.is_empty());
        assert!(!found.reading().by_label);
    }

    #[test]
    fn the_last_source_of_the_environment_counts() {
        let maps: &[(&str, &[(&str, &str)])] = &[
            (
                "first",
                &[("EXCLUDE_NAMESPACES", "first"), ("NAMESPACES", "by-prefix"), ("n", "by-key")],
            ),
            ("second", &[("EXCLUDE_NAMESPACES", "second")]),
            ("other", &[("a", "b")]),
        ];
        let from = |map: &str| json!({"configMapRef": {"name": map}});
        let by_prefix = json!({"configMapRef": {"name": "first"}, "prefix": "EXCLUDE_"});
        let of = |env_from: serde_json::Value, env: serde_json::Value| {
            let container = json!({"name": "agent", "envFrom": env_from, "env": env});
            excluded(&settings_with(container, maps)).join(",")
        };
        assert_eq!(of(json!([from("first"), from("second")]), json!([])), "second");
        assert_eq!(of(json!([from("second"), from("first"), from("other")]), json!([])), "first");
        assert_eq!(of(json!([from("second"), by_prefix]), json!([])), "by-prefix");
        assert_eq!(of(json!([by_prefix, from("second")]), json!([])), "second");
        let key = |map: &str, key: &str| {
            let at = json!({"name": map, "key": key, "optional": true});
            json!({"name": "EXCLUDE_NAMESPACES", "valueFrom": {"configMapKeyRef": at}})
        };
        assert_eq!(of(json!([from("second")]), json!([key("first", "n")])), "by-key");
        assert_eq!(of(json!([from("second")]), json!([key("first", "nosuch")])), "second");
        let container = json!({"name": "agent", "env": [key("keyed", "n")], "envFrom": [
            by_prefix, {"configMapRef": {"name": "irrelevant"}, "prefix": "OTHER_"}]});
        let args = AgentArgs::of(&serde_json::from_value(container).unwrap());
        assert_eq!(args.needed_config_maps(), BTreeSet::from(["first", "keyed"]));
    }

    #[test]
    fn an_environment_that_is_secret_is_said() {
        let key = json!({"secretKeyRef": {"name": "hidden", "key": "k"}});
        let of = |args: &[&str], prefix: &str| {
            settings_with(
                json!({"name": "agent", "args": args,
                       "envFrom": [{"secretRef": {"name": "all"}, "prefix": prefix}],
                       "env": [{"name": "EXCLUDE_NAMESPACES", "valueFrom": key}]}),
                &[],
            )
            .notes
        };
        let notes = of(&["run"], "AMBIENT_");
        let expected = [
            "the --excluded-namespaces of pod istio-system/agent cannot be read: its variable \
             EXCLUDE_NAMESPACES is from Secret hidden; give --excluded-namespaces",
            "the --enablement-selectors of pod istio-system/agent cannot be read: its variable \
             AMBIENT_ENABLEMENT_SELECTOR may be from Secret all; give --enablement-selectors",
        ];
        assert_eq!(notes, expected);
        assert_eq!(of(&["run", "--excluded-namespaces=a"], "OTHER_"), [""; 0]);
    }

    #[test]
    fn what_cannot_be_read_is_said_and_can_be_given() {
        let args = ["run", "--enablement-selectors=@/etc/selectors", "--excluded-namespaces=A"];
        let found = settings(json!({"name": "agent", "args": args}), &[]);
        assert_eq!(excluded(&found), ["kube-system"]);
        assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
        assert_eq!(
            found.notes[1],
            "the --enablement-selectors of pod istio-system/agent cannot be read: they are in its file \
             /etc/selectors; give --enablement-selectors"
        );
        let overrides = SettingsOverrides {
            excluded_namespaces: Some(vec!["x".to_owned()]),
            selectors: Some("[]".parse().unwrap()),
        };
        let settings = Settings::new(overrides, None);
        assert_eq!((excluded(&settings), settings.from.as_str()), (vec!["x"], "the command line"));
        assert!(settings.membership.selectors.is_some());
    }
}
