//! What comes over the control API, from the command line, and from a proxy.

use std::{
    fmt::{Debug, Display},
    str::FromStr,
};

use super::{fuzz, same_again, text};
use crate::{
    cni::entry::DaemonSet,
    control::{
        Answer, LogRequest, OverrideRequest, PauseRequest, Remaining, ResumeRequest, StatusRequest,
    },
    enablement::Selectors,
    explain, health, journal,
    membership::PodKey,
    overrides::Target,
    selector::LabelSelector,
    traffic::{Ports, parse_range},
    verdicts, verify,
    zds::messages::{decode_hello, decode_response},
};

const REQUESTS: [&str; 14] = [
    r#"{"targets":["shop/cart","bank"],"selector":"app=cart,tier!=db"}"#,
    r#"{"pod":"shop/cart","to":"bank/web:80"}"#,
    r#"{"pod":"shop/cart","to":"cart.shop.svc.cluster.local:8080"}"#,
    r#"{"pod":"shop/cart","to":"[fd00::2]:80"}"#,
    r#"{"pod":"shop/cart","to":"10.0.0.2:80"}"#,
    r#"{"targets":["shop"],"to":"fd00::/8","port":80,"verdicts":["refused_past_proxy"],"refused":true}"#,
    r#"{"target":"shop/cart","mode":"unenroll","for_seconds":3600,"reason":"ticket 7"}"#,
    r#"{"target":"shop","mode":null}"#,
    r#"{"for_seconds":18446744073709551615}"#,
    r#"{"reason":"over"}"#,
    r#"{"filter":"debug,kube=off","for_seconds":60}"#,
    r#"{"changed":true,"message":"m","wanted":{"shop/cart":false},"notes":["n"]}"#,
    r#"{"pods":3,"failed":1,"why":"w"}"#,
    r#"{"dropped":7}"#,
];

#[test]
fn requests_and_answers_of_the_control_api_are_read_as_they_were_written() {
    fuzz!(&REQUESTS, |bytes| {
        same_again::<StatusRequest>(bytes);
        same_again::<explain::Request>(bytes);
        same_again::<verify::Request>(bytes);
        same_again::<verdicts::Request>(bytes);
        same_again::<OverrideRequest>(bytes);
        same_again::<PauseRequest>(bytes);
        same_again::<ResumeRequest>(bytes);
        same_again::<LogRequest>(bytes);
        same_again::<Answer>(bytes);
        same_again::<Remaining>(bytes);
        same_again::<verdicts::Line>(bytes);
        same_again::<journal::Note>(bytes);
    });
}

const WORDS: [&str; 20] = [
    "shop",
    "shop/cart-7d9.x",
    "shop/cart:80",
    "cart.shop.svc:80",
    "cart.shop.svc.cluster.local",
    "10.0.0.2",
    "10.0.0.2:80",
    "::ffff:10.0.0.2",
    "::ffff:10.0.0.0/104",
    "fd00::2",
    "[fd00::2]:80",
    "[fe80::1%3]:80",
    "fd00::/8",
    "10.0.0.1/8",
    "80",
    "8000-8010",
    "off",
    "[::]:15014",
    "istio-system/redirect-agent",
    "0",
];

/// What is read and written is read as the same, and an error says something.
fn same_word<T: FromStr<Err: Display> + Display + PartialEq + Debug>(word: &str) {
    match word.parse::<T>() {
        Ok(read) => match read.to_string().parse::<T>() {
            Ok(again) => assert_eq!(again, read),
            Err(error) => panic!("{read:?} became {read}: {error}"),
        },
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[test]
fn words_of_the_command_line_are_read_as_they_are_printed() {
    fuzz!(&WORDS, |bytes| {
        let word = &*text(bytes);
        same_word::<PodKey>(word);
        same_word::<Target>(word);
        same_word::<explain::To>(word);
        same_word::<verdicts::To>(word);
        same_word::<health::Address>(word);
        same_word::<Ports>(word);
        same_word::<DaemonSet>(word);
        match parse_range(word) {
            Ok(range) => {
                assert_eq!(range.trunc(), range);
                assert_eq!(parse_range(&range.to_string()), Ok(range));
            }
            Err(error) => assert!(!error.is_empty()),
        }
        if let Ok(key) = word.parse::<PodKey>() {
            // They become names of files.
            assert!(!key.namespace.contains(['/', '.', '\0']) && !key.name.contains(['/', '\0']));
            assert!(!key.name.starts_with('.'));
        }
    });
}

const SELECTORS: [&str; 6] = [
    "app=cart,tier!=db,env in (a, b),!canary",
    " app = cart , example.com/tier == web ",
    "app notin (shop,bank),example.com/tier in(web)",
    "none notin (x)",
    "app=",
    "!app,app",
];

#[test]
fn parts_of_a_selector_each_mean_what_they_mean_alone() {
    fuzz!(&SELECTORS, |bytes| {
        let text = &*text(bytes);
        let labels = [("app", "cart"), ("example.com/tier", "web"), ("env", "")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let whole = match text.parse::<LabelSelector>() {
            Ok(selector) => selector,
            Err(error) => return assert!(!error.is_empty()),
        };
        assert_eq!(String::from(whole.clone()).parse(), Ok(whole.clone()));
        // Split at the commas that end a part which is one by itself.
        let (mut part, mut all) = (String::new(), true);
        for piece in text.split(',') {
            part.push_str(piece);
            match part.parse::<LabelSelector>() {
                Ok(selector) => {
                    all &= selector.matches(&labels);
                    part.clear();
                }
                Err(_) => part.push(','),
            }
        }
        assert_eq!(part, "");
        assert_eq!(whole.matches(&labels), all);
    });
}

const ENABLEMENT: [&str; 4] = [
    "[]",
    "- podSelector:\n    matchLabels: {istio.io/dataplane-mode: ambient}\n- podSelector:\n    matchExpressions:\n    - {key: istio.io/dataplane-mode, operator: NotIn, values: [none]}\n  namespaceSelector:\n    matchLabels:\n      istio.io/dataplane-mode: ambient\n",
    r#"[{"podSelector":{"matchExpressions":[{"key":"a","operator":"Exists"}]},"namespaceSelector":{"matchExpressions":[{"key":"kubernetes.io/metadata.name","operator":"In","values":["shop"]}]}}]"#,
    "- &a {podSelector: {}}\n- *a\n",
];

#[test]
fn enablement_selectors_are_read_or_refused_with_a_reason() {
    fuzz!(&ENABLEMENT, |bytes| {
        match text(bytes).parse::<Selectors>() {
            Ok(selectors) => {
                let none = Default::default();
                let matches = selectors.matches(&none, "shop", &none);
                assert_eq!(matches, selectors.matches(&none, "shop", &none));
                assert!(selectors.namespace_keys().iter().all(|key| !key.is_empty()));
            }
            Err(error) => assert!(format!("{error:#}").starts_with("read "), "{error:#}"),
        }
    });
}

const PACKETS: [&[u8]; 7] = [
    b"\x08\x01",
    b"\x08\x01\x12\x03new",
    b"",
    b"\x0a\x00",
    b"\x0a\x06\x0a\x04busy",
    b"\x0a\x05\x12\x03new",
    b"\x0a\x17\x0a\x03u-1\x12\x10\x0a\x04pod1\x12\x03ns1\x1a\x03sa1",
];

#[test]
fn packet_of_a_proxy_is_a_message_or_a_clear_error() {
    fuzz!(&PACKETS, |packet| {
        if let Err(error) = decode_hello(packet) {
            assert!(!error.to_string().is_empty());
        }
        match decode_response(packet) {
            // An empty reason would have been an ack.
            Ok(answer) => assert_ne!(answer, Err(String::new())),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}
