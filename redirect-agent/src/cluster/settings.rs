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
pub struct Given {
    /// `--excluded-namespaces`
    pub excluded_namespaces: Option<Vec<String>>,
    /// `--enablement-selectors`
    pub selectors: Option<Selectors>,
}

impl Given {
    /// Whether nothing needs to be read.
    fn is_all(&self) -> bool {
        self.excluded_namespaces.is_some() && self.selectors.is_some()
    }
}

/// The arguments and the environment of an agent's container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    args: Vec<String>,
    env: BTreeMap<String, String>,
    /// The ConfigMaps that the rest of the environment is from.
    pub(super) config_maps: Vec<String>,
}

impl Written {
    pub(super) fn of(container: &k8s::Container) -> Self {
        let args = [&container.command, &container.args].into_iter().flatten().flatten();
        let env = container.env.iter().flatten();
        let from = container.env_from.iter().flatten();
        Self {
            args: args.cloned().collect(),
            env: env.filter_map(|var| Some((var.name.clone(), var.value.clone()?))).collect(),
            config_maps: from
                .filter_map(|from| Some(from.config_map_ref.as_ref()?.name.clone()))
                .collect(),
        }
    }

    /// Adds what a ConfigMap says; the container's own variables take precedence.
    pub(super) fn add(&mut self, data: BTreeMap<String, String>) {
        for (name, value) in data {
            self.env.entry(name).or_insert(value);
        }
    }

    /// The value of a flag, or of the variable that stands for it. The last flag counts, as for the agent,
    /// whose other flags may be those of another version.
    fn value(&self, [flag, variable]: [&str; 2]) -> Option<&str> {
        let mut by_flag = None;
        let mut args = self.args.iter().map(String::as_str).peekable();
        while let Some(arg) = args.next() {
            match arg.strip_prefix(flag) {
                Some("") => by_flag = args.peek().copied(),
                Some(rest) => by_flag = rest.strip_prefix('=').or(by_flag),
                None => {}
            }
        }
        by_flag.or_else(|| self.env.get(variable).map(String::as_str)).filter(|v| !v.is_empty())
    }
}

impl Settings {
    /// Those of the agent `from`, if there is one, and what is given in place of them.
    pub(super) fn new(given: Given, from: Option<(String, &Written)>) -> Self {
        let named = match (&from, given.is_all()) {
            (_, true) => "the command line".to_owned(),
            (Some((from, _)), _) => format!("pod {from}"),
            (None, _) => "the defaults".to_owned(),
        };
        let mut settings = Self { from: named, ..Self::default() };
        if let Some((_, written)) = from {
            settings.read(written);
        }
        if let Some(namespaces) = given.excluded_namespaces {
            settings.membership.excluded_namespaces = namespaces.into_iter().collect();
        }
        if given.selectors.is_some() {
            settings.membership.selectors = given.selectors;
        }
        settings
    }

    fn read(&mut self, written: &Written) {
        self.sidecar_annotations = written.args.iter().any(|arg| arg == "--sidecar-annotations");
        if let Some(list) = written.value(EXCLUDED) {
            let names: BTreeSet<String> = list.split(',').map(str::to_owned).collect();
            match names.iter().find_map(|name| check_namespace_name(name).err()) {
                None => self.membership.excluded_namespaces = names,
                Some(error) => self.note(EXCLUDED[0], &error.to_string()),
            }
        }
        match written.value(SELECTORS) {
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

    fn settings(container: serde_json::Value, config_map: &[(&str, &str)]) -> Settings {
        let container: k8s::Container = serde_json::from_value(container).unwrap();
        let mut written = Written::of(&container);
        let data = config_map.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        written.add(data.collect());
        Settings::new(Given::default(), Some(("istio-system/agent".to_owned(), &written)))
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
        let given = Given {
            excluded_namespaces: Some(vec!["x".to_owned()]),
            selectors: Some("[]".parse().unwrap()),
        };
        let settings = Settings::new(given, None);
        assert_eq!((excluded(&settings), settings.from.as_str()), (vec!["x"], "the command line"));
        assert!(settings.membership.selectors.is_some());
    }
}
