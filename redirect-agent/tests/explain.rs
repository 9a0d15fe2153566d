//! What `explain` prints, against files that people can read.
#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod support;

use std::{fs, path::Path};

use redirect_agent::{
    explain::{self, Area, Cause, Explanation},
    membership::Config,
    output,
};

use crate::support::golden;

/// The document is from a running agent.
#[test]
fn explanation_is_text_and_json() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/explain.json");
    let document = fs::read_to_string(path).unwrap();
    let explanation: Explanation = serde_json::from_str(&document).unwrap();
    assert_eq!(output::json(&explanation).unwrap(), document);
    golden("explain.txt", &explain::text(&explanation));
}

#[test]
fn text_from_objects_does_not_move_the_cursor() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/explain.json");
    let document = fs::read_to_string(path).unwrap();
    let mut explanation: Explanation = serde_json::from_str(&document).unwrap();
    explanation.pod.message = Some("\u{1b}[2J\nverdict".to_owned());
    explanation.verdict.message = "\u{1b}[2J\nnone".to_owned();
    let text = explain::text(&explanation);
    assert!(!text.contains('\u{1b}') && !text.contains("\nnone"), "{text}");
}

const MANIFESTS: &str = "\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: gw}}
- apiVersion: apps/v1
  kind: Deployment
  metadata: {name: cart, namespace: shop}
  spec:
    template:
      metadata:
        annotations: {traffic.redirect-agent/excludeOutboundPort: \"3306\"}
      spec: {hostNetwork: false}
- apiVersion: v1
  kind: Pod
  metadata: {name: vault, namespace: bank, labels: {istio.io/dataplane-mode: ambeint}}
";

#[test]
fn manifests_are_explained_with_their_workloads_and_without_uids() {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("a.yaml", MANIFESTS), ("b.txt", "no manifest")] {
        fs::write(dir.path().join(name), content).unwrap();
    }
    let file = dir.path().join("a.yaml");
    let explained = |path: &Path, pod: &str| {
        explain::file::explain(path, &pod.parse().unwrap(), &Config::default()).unwrap()
    };
    for path in [dir.path(), &file] {
        let cart = explained(path, "shop/cart");
        assert!(cart.pod.decision.as_ref().unwrap().enrolled);
        assert_eq!(cart.verdict.cause, Cause::UnknownAnnotation);
        let waypoint = cart.pod.waypoint.unwrap();
        assert_eq!(waypoint.gateway.as_deref(), Some("shop/gw"));
        let vault = explained(path, "bank/vault");
        assert_eq!(
            (vault.verdict.area, vault.verdict.cause),
            (Area::Configuration, Cause::MisspelledLabelValue)
        );
        assert_eq!(explained(path, "bank/cart").verdict.cause, Cause::WrongNamespace);
        assert_eq!(explained(path, "bank/none").verdict.cause, Cause::NoSuchPod);
    }
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: cart, namespace: shop}, spec: {containers: []}}";
    fs::write(&file, pod).unwrap();
    let alone = explained(&file, "shop/cart");
    assert_eq!(alone.verdict.cause, Cause::NamespaceMissing, "its label may decide");
    let text = explain::text(&alone);
    assert!(text.contains("no manifest has the Namespace shop"), "{text}");
    fs::write(&file, "kind: [").unwrap();
    let broken = explain::file::explain(&file, &"shop/cart".parse().unwrap(), &Config::default());
    assert!(format!("{:#}", broken.unwrap_err()).contains("a.yaml"));
}
