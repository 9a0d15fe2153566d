//! What the agent finds in its state directory.

use std::time::{Duration, SystemTime};

use super::{fuzz, text};
use crate::{
    cni::records,
    membership::{Decision, PodKey, Reason},
    overrides::{
        Change, Mode, Override,
        store::{content, understand},
    },
};

/// The record of uid `u-1`.
const RECORDS: [&str; 4] = [
    r#"{"uid":"u-1","netns":"/var/run/netns/cni-1","addresses":["10.0.0.2","fd00::2"]}"#,
    r#"{"uid":"../../etc/passwd","netns":"/a","addresses":[]}"#,
    r#"{"uid":"u-1","netns":"","addresses":["::ffff:10.0.0.2","10.0.0.2"]}"#,
    r#"{"uid":"u-1"}"#,
];

#[test]
fn record_of_a_sandbox_is_of_the_pod_whose_name_its_file_has() {
    fuzz!(&RECORDS, |bytes| {
        match records::understand("u-1.json", bytes) {
            Ok(sandbox) => {
                assert_eq!(sandbox.uid, "u-1");
                let written = serde_json::to_vec(&sandbox).unwrap();
                assert_eq!(records::understand("u-1.json", &*written).unwrap(), sandbox);
                assert!(records::understand("u-2.json", bytes).is_err());
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        // Whatever the name of the file, no other directory is reached.
        let uid = text(bytes);
        let of_uid = serde_json::json!({"uid": uid, "netns": "/a", "addresses": []});
        let name = format!("{uid}.json");
        if records::understand(&name, of_uid.to_string().as_bytes()).is_ok() {
            assert!(!name.contains(['/', '\0']) && !name.starts_with('.') && name.len() < 256);
        }
    });
}

const OVERRIDES: [&str; 5] = [
    r#"{"version":1,"targets":{"shop":{"mode":"enroll"},"shop/cart":{"mode":"unenroll","until":"2999-11-30T16:30:00Z","reason":"ticket 7"}},"pause":{"until":"2026-11-30T16:30:00Z","reason":"r"}}"#,
    r#"{"version":1,"targets":{},"pause":{}}"#,
    r#"{"version":1}"#,
    r#"{"version":2,"targets":{}}"#,
    r#"{"version":1,"targets":{"shop/cart":{"mode":"enroll","until":"2026-11-30T16:30:00.5Z"}}}"#,
];

#[test]
fn overrides_are_read_as_they_were_stored_and_always_decide() {
    fuzz!(&OVERRIDES, |bytes| {
        let overrides = match understand(bytes) {
            Ok(overrides) => overrides,
            Err(error) => return assert!(!error.is_empty()),
        };
        assert_eq!(understand(&content(&overrides).unwrap()).as_ref(), Ok(&overrides));
        let pod = PodKey::new("shop", "cart").unwrap();
        for after in [0, 1_796_056_200, 99_999_999_999] {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(after);
            let bypass = Decision::bypass(Reason::Paused);
            let decided = overrides.apply(bypass, &pod, now);
            assert!(!decided.enrolled || overrides.pause(now).is_none());
            // What is asked for holds, and is stored as it holds.
            let target = pod.to_string().parse().unwrap();
            let value = Override { mode: Mode::Enroll, until: None, reason: None };
            let next = overrides.with(Change::Set { target, value }, now).with(Change::Resume, now);
            assert!(next.apply(bypass, &pod, now).enrolled);
            assert!(next.pause(now).is_none());
            assert_eq!(understand(&content(&next).unwrap()).as_ref(), Ok(&next));
            for end in overrides.next_end(now).into_iter() {
                assert!(!end.from(now).is_zero() && !end.clock(now).is_empty());
            }
        }
    });
}
