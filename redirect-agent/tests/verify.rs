//! What `verify` prints, against files that people can read.
#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod support;

use std::{fs, path::Path};

use redirect_agent::{
    explain::API_VERSION,
    output,
    verify::{self, Outcome, Verification, Verifications},
};

use crate::support::golden;

/// A document of a running agent.
fn document() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/verify.json");
    fs::read_to_string(path).unwrap()
}

fn found() -> Verification {
    serde_json::from_str(&document()).unwrap()
}

#[test]
fn verification_is_text_and_json() {
    let found = found();
    assert_eq!(output::json(&found).unwrap(), document());
    golden("verify.txt", &verify::text(&found));
}

#[test]
fn verifications_of_all_pods_are_a_table() {
    let mut cart = found();
    cart.pod.name = "shop/cart".to_owned();
    cart.calls.retain(|call| call.outcome == Outcome::Captured);
    (cart.result, cart.ok, cart.finding) = (Outcome::Captured, true, None);
    cart.message = "3 of 3 connections".to_owned();
    let all = Verifications {
        api_version: API_VERSION.to_owned(),
        kind: "VerificationList".to_owned(),
        items: vec![cart, found()],
        failed: vec!["shop/web: there is no pod shop/web on this node".to_owned()],
    };
    golden("verify-all.txt", &verify::table(&all));
}

#[test]
fn text_from_objects_does_not_move_the_cursor() {
    let mut found = found();
    found.message = "\u{1b}[2J\nresult".to_owned();
    found.finding.as_mut().unwrap().message = "\u{1b}[2J\nresult".to_owned();
    let text = verify::text(&found);
    assert!(!text.contains('\u{1b}') && text.matches("\nresult").count() == 1, "{text}");
}
