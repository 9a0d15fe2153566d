//! The node agent of the ambient redirector, as a library: `main.rs` only wires it up.

pub mod agent;
pub mod cgroup;
pub mod cli;
pub mod cni;
pub mod commands;
pub mod control;
pub mod dataplane;
pub mod enablement;
pub mod finder;
pub mod health;
pub mod kubelet;
pub mod latest;
pub mod membership;
pub mod metrics;
pub mod netns;
pub mod output;
pub mod overrides;
pub mod preflight;
pub mod probes;
pub mod reconcile;
pub mod root_socket;
pub mod socket_file;
pub mod source;
pub mod takeover;
pub mod traffic;
pub mod zds;
