//! Whatever is in a node's CNI configuration, our entry goes in and out without a trace, or the file is
//! refused with a clear error.
//!
//! `cargo +nightly fuzz run cni_configuration`
#![no_main]

use libfuzzer_sys::fuzz_target;
use redirect_agent::cni::{entry::Entry, network::Network};

fuzz_target!(|text: &str| {
    let entry = Entry::default();
    match Network::read("10-net.conflist", text) {
        Ok(Network::List(list)) => {
            let Ok(without) = list.without() else { return };
            if !list.has_ours() {
                assert_eq!(without, text);
            }
            let with = list.with(&entry).expect("put the entry in");
            let Ok(Network::List(list)) = Network::read("10-net.conflist", &with) else {
                panic!("{with}");
            };
            assert!(list.has(&entry), "{with}");
            assert_eq!(list.with(&entry).expect("put the entry in again"), with);
            assert_eq!(list.without().expect("take the entry out"), without);
        }
        Ok(Network::Single(_)) => panic!("a list is no single network"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Ok(Network::Single(single)) = Network::read("10-net.conf", text) {
        let made = single.to_list(&entry);
        let Ok(Network::List(list)) = Network::read("10-net.conflist", &made) else {
            panic!("{made}");
        };
        assert!(list.has(&entry), "{made}");
    }
});
