//! Enablement selectors: which labels of a pod and its namespace put it into the mesh, instead of
//! `istio.io/dataplane-mode`.
//!
//! The text is that of istio-cni's chart value `ambient.enablementSelectors`, which istio-cni reads as
//! `AMBIENT_ENABLEMENT_SELECTOR`: a list, of which one entry must match. Both selectors of an entry must
//! match; an omitted one matches everything.
//!
//! Source: Istio `cni/pkg/util/enablement_selector.go`, `CompiledEnablementSelectors.Matches`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail, ensure};
use kube::core::{Expression, Selector, SelectorExt as _};
use serde::Deserialize;

/// istio-cni's default, which is equivalent to the label `istio.io/dataplane-mode`. Source: Istio
/// `manifests/charts/istio-cni/values.yaml`.
pub const DEFAULT: &str = "\
- podSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
- podSelector:
    matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: [none]}]
  namespaceSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
";

/// The label with its own name that Kubernetes gives every namespace.
/// Source: Kubernetes `staging/src/k8s.io/api/core/v1/types.go`, `LabelMetadataName`.
const LABEL_NAME: &str = "kubernetes.io/metadata.name";

type Labels = BTreeMap<String, String>;

/// Selectors in place of the label `istio.io/dataplane-mode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selectors {
    pairs: Vec<Pair>,
    namespace_keys: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    pod: Selector,
    namespace: Selector,
}

impl Selectors {
    /// Reads the YAML or JSON `text`, or the file `PATH` for `@PATH`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or the text is not a list of selectors. Unknown fields are an error,
    /// too: a selector with a typing error would match everything.
    pub fn read(text: &str) -> Result<Self> {
        match text.strip_prefix('@') {
            Some(path) => fs::read_to_string(path)
                .with_context(|| format!("read enablement selectors from {path}"))?
                .parse(),
            None => text.parse(),
        }
    }

    /// Whether a pod with these labels, in the namespace `namespace` with those labels, should be in the
    /// mesh.
    pub fn matches(&self, pod: &Labels, namespace: &str, namespace_labels: &Labels) -> bool {
        let mut namespace_labels = namespace_labels.clone();
        namespace_labels.insert(LABEL_NAME.to_owned(), namespace.to_owned());
        self.pairs
            .iter()
            .any(|pair| pair.pod.matches(pod) && pair.namespace.matches(&namespace_labels))
    }

    /// The namespace labels that the selectors use, except the one that follows from the name.
    pub fn namespace_keys(&self) -> &BTreeSet<String> {
        &self.namespace_keys
    }
}

impl FromStr for Selectors {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(
            !text.trim().is_empty(),
            "read enablement selectors: there are none; [] selects no pod"
        );
        let options = serde_saphyr::options! { with_snippet: false };
        let written: Vec<WrittenPair> = serde_saphyr::from_str_with_options(text, options)
            .context("read enablement selectors: a list of podSelector and namespaceSelector")?;
        let mut namespace_keys = BTreeSet::new();
        let mut pairs = Vec::with_capacity(written.len());
        for (index, WrittenPair { pod, namespace }) in written.into_iter().enumerate() {
            let of = |which: &str| format!("read the {which} of enablement selector {}", index + 1);
            let pod = pod.expressions().with_context(|| of("podSelector"))?;
            let namespace = namespace.expressions().with_context(|| of("namespaceSelector"))?;
            namespace_keys.extend(
                namespace.iter().map(|(key, _)| key.clone()).filter(|key| key != LABEL_NAME),
            );
            let selector =
                |from: Vec<(String, Expression)>| from.into_iter().map(|(_, e)| e).collect();
            pairs.push(Pair { pod: selector(pod), namespace: selector(namespace) });
        }
        Ok(Selectors { pairs, namespace_keys })
    }
}

/// An entry as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPair {
    #[serde(default, rename = "podSelector")]
    pod: WrittenSelector,
    #[serde(default, rename = "namespaceSelector")]
    namespace: WrittenSelector,
}

/// Kubernetes' LabelSelector. Its own type would ignore unknown fields.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct WrittenSelector {
    match_labels: BTreeMap<String, String>,
    match_expressions: Vec<WrittenExpression>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenExpression {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl WrittenSelector {
    /// Each with its label's key.
    fn expressions(self) -> Result<Vec<(String, Expression)>> {
        let mut expressions = Vec::new();
        for (key, value) in self.match_labels {
            ensure!(!key.is_empty(), "a label has no name");
            expressions.push((key.clone(), Expression::Equal(key, value)));
        }
        for WrittenExpression { key, operator, values } in self.match_expressions {
            ensure!(!key.is_empty(), "a label has no name");
            let expression = match (operator, values.is_empty()) {
                (Operator::In, false) => Expression::In(key.clone(), values),
                (Operator::NotIn, false) => Expression::NotIn(key.clone(), values),
                (Operator::Exists, true) => Expression::Exists(key.clone()),
                (Operator::DoesNotExist, true) => Expression::DoesNotExist(key.clone()),
                (Operator::In | Operator::NotIn, true) => {
                    bail!("{operator:?} of label {key} needs values")
                }
                (Operator::Exists | Operator::DoesNotExist, false) => {
                    bail!("{operator:?} of label {key} takes no values")
                }
            };
            expressions.push((key, expression));
        }
        Ok(expressions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(of: &[(&str, &str)]) -> Labels {
        of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn one_entry_has_to_match_and_of_an_entry_both_selectors() {
        let selectors: Selectors = "\
- podSelector: {matchLabels: {mesh: in}}
- podSelector: {matchExpressions: [{key: mesh, operator: NotIn, values: [out, never]}]}
  namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [a, b]}]}
- namespaceSelector: {matchExpressions: [{key: all, operator: Exists}, {key: but, operator: DoesNotExist}]}
"
        .parse()
        .unwrap();
        for (pod, namespace, expected) in [
            (&[][..], &[][..], false),
            (&[("mesh", "in")], &[], true),
            (&[("mesh", "In")], &[], false),
            (&[], &[("team", "a")], true),
            (&[("mesh", "out")], &[("team", "a")], false),
            (&[("mesh", "")], &[("team", "b")], true),
            (&[], &[("team", "c")], false),
            (&[("mesh", "out")], &[("all", "")], true),
            (&[], &[("all", ""), ("but", "")], false),
        ] {
            let matched = selectors.matches(&labels(pod), "shop", &labels(namespace));
            assert_eq!(matched, expected, "pod {pod:?}, namespace {namespace:?}");
        }
        assert_eq!(*selectors.namespace_keys(), ["all", "but", "team"].map(str::to_owned).into());
    }

    #[test]
    fn a_namespace_is_selected_by_its_name_without_its_labels() {
        let text =
            r#"[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}]"#;
        let selectors: Selectors = text.parse().unwrap();
        assert!(selectors.matches(&labels(&[]), "shop", &labels(&[])));
        assert!(!selectors.matches(&labels(&[]), "other", &labels(&[])));
        assert!(selectors.namespace_keys().is_empty());
    }

    #[test]
    fn an_empty_selector_matches_everything_and_an_empty_list_nothing() {
        let matches = |text: &str| {
            text.parse::<Selectors>().unwrap().matches(&labels(&[]), "shop", &labels(&[]))
        };
        assert!(matches("- podSelector: {}"));
        assert!(matches("- namespaceSelector: {matchLabels: {}}"));
        assert!(!matches("[]"));
    }

    #[test]
    fn a_slip_is_an_error_and_never_matches_everything() {
        for (text, complaint) in [
            ("", "there are none"),
            ("podSelector: {}", "a list"),
            ("- podselector: {}", "podselector"),
            ("- podSelector: {matchLabel: {a: b}}", "matchLabel"),
            ("- podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}", "in"),
            ("- podSelector: {matchExpressions: [{key: a, operator: In}]}", "needs values"),
            (
                "- podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
                "takes no values",
            ),
            ("- namespaceSelector: {matchLabels: {'': b}}", "has no name"),
        ] {
            let error = format!("{:#}", text.parse::<Selectors>().unwrap_err());
            assert!(error.contains(complaint), "{text:?}: {error}");
        }
        let error = format!("{:#}", Selectors::read("@/nonexistent/selectors.yaml").unwrap_err());
        assert!(error.contains("/nonexistent/selectors.yaml"), "{error}");
    }
}
