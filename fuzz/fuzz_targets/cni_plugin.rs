//! Whatever a container runtime hands to the plugin, it passes the result on, or fails with a clear error,
//! and never panics.
//!
//! `cargo +nightly fuzz run cni_plugin`
#![no_main]

use libfuzzer_sys::fuzz_target;
use redirect_agent::cni::plugin::{Environment, run};

fuzz_target!(|input: (String, &[u8])| {
    let (args, configuration) = input;
    // No agent is asked: there is no pod.
    let args = args.replace("K8S_POD_NAME", "X");
    for command in ["ADD", "CHECK", "VERSION", "DEL", "GC"] {
        let environment = Environment {
            command: Some(command.to_owned()),
            container: Some("c".to_owned()),
            netns: Some("/proc/self/ns/net".to_owned()),
            interface: Some("eth0".to_owned()),
            args: Some(args.clone()),
        };
        match run(&environment, configuration) {
            Ok(answer) if command == "ADD" => assert!(answer.starts_with('{'), "{answer}"),
            Ok(_) => {}
            Err(failure) => assert!(failure.code > 0 && !failure.msg.is_empty()),
        }
    }
});
