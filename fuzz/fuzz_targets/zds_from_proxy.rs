//! Whatever a proxy sends on the ZDS socket is a message or a clear error, and never a panic.
//!
//! `cargo +nightly fuzz run zds_from_proxy`
#![no_main]

use libfuzzer_sys::fuzz_target;
use redirect_agent::zds::messages::{decode_hello, decode_response};

fuzz_target!(|packet: &[u8]| {
    if let Err(error) = decode_hello(packet) {
        assert!(!error.to_string().is_empty());
    }
    match decode_response(packet) {
        // An empty reason would have been an ack.
        Ok(answer) => assert_ne!(answer, Err(String::new())),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
