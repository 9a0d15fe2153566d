//! Label selectors as in `kubectl -l`: `app=cart,tier!=db,env in (a, b),!canary`.

use std::{collections::BTreeMap, str::FromStr};

use kube::core::{Expression, Selector, SelectorExt as _};
use serde::{Deserialize, Serialize};

/// The requirements on a pod's labels, all of which have to be met.
///
/// Source: Kubernetes `staging/src/k8s.io/apimachinery/pkg/labels/selector.go`, `Parse`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct LabelSelector {
    text: String,
    selector: Selector,
}

impl LabelSelector {
    /// Whether these labels match.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.selector.matches(labels)
    }
}

impl FromStr for LabelSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = split(text).into_iter().map(str::trim);
        let selector = parts.map(requirement).collect::<Result<Selector, String>>()?;
        Ok(Self { text: text.to_owned(), selector })
    }
}

impl TryFrom<String> for LabelSelector {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LabelSelector> for String {
    fn from(selector: LabelSelector) -> Self {
        selector.text
    }
}

/// Splits at commas outside parentheses.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0_i32;
    text.split(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == ',' && depth == 0
    })
    .collect()
}

fn requirement(part: &str) -> Result<Expression, String> {
    if let Some((key, value)) = part.split_once("!=") {
        return Ok(Expression::NotEqual(name(key)?, value_of(value)?));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Ok(Expression::Equal(name(key)?, value_of(value)?));
    }
    if let Some(key) = part.strip_prefix('!') {
        return Ok(Expression::DoesNotExist(name(key)?));
    }
    let Some((before, values)) = part.split_once('(') else {
        return Ok(Expression::Exists(name(part)?));
    };
    let values = values.trim_end().strip_suffix(')').ok_or_else(|| no_selector(part))?;
    let values = values.split(',').map(value_of).collect::<Result<_, _>>()?;
    match before.split_whitespace().collect::<Vec<_>>()[..] {
        [key, "in"] => Ok(Expression::In(name(key)?, values)),
        [key, "notin"] => Ok(Expression::NotIn(name(key)?, values)),
        _ => Err(no_selector(part)),
    }
}

fn name(key: &str) -> Result<String, String> {
    let key = key.trim();
    let odd = |c: char| !(c.is_ascii_alphanumeric() || "-_./".contains(c));
    if key.is_empty() || key.contains(odd) {
        return Err(format!("{key:?} is not the key of a label"));
    }
    Ok(key.to_owned())
}

fn value_of(value: &str) -> Result<String, String> {
    let value = value.trim();
    let odd = |c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c));
    if value.contains(odd) {
        return Err(format!("{value:?} is not the value of a label"));
    }
    Ok(value.to_owned())
}

fn no_selector(part: &str) -> String {
    format!("{part:?} is not like app=cart, app!=cart, app in (a,b), app notin (a,b), app or !app")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_mean_what_they_mean_to_kubectl() {
        let labels: BTreeMap<String, String> = [("app", "cart"), ("example.com/tier", "web")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        for (text, expected) in [
            ("app=cart", true),
            ("app==cart", true),
            (" app = cart , example.com/tier = web ", true),
            ("app=cart,example.com/tier=db", false),
            ("app!=cart", false),
            ("none!=cart", true),
            ("app", true),
            ("none", false),
            ("!app", false),
            ("!none", true),
            ("app in (shop, cart)", true),
            ("app in (shop,bank),example.com/tier", false),
            ("app notin (shop,bank),example.com/tier in(web)", true),
            ("none notin (x)", true),
            ("app=", false),
        ] {
            let selector: LabelSelector = text.parse().unwrap();
            assert_eq!(selector.matches(&labels), expected, "{text}");
            assert_eq!(String::from(selector), text);
        }
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for text in ["", "app=cart,", "=cart", "app in (a", "app within (a)", "app=a b", "a b", "!"]
        {
            assert!(text.parse::<LabelSelector>().is_err(), "{text:?}");
        }
    }
}
