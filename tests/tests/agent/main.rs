//! The running agent on real packets: `redirect-agent run` with a directory of manifests, and the
//! stand-in proxy on its ZDS socket. Every scenario asserts who answered and whom they saw, or what
//! became of the pod.

mod api_server;
mod attack;
mod bad_input;
mod cgroup;
mod clsact;
mod cluster;
mod cmdadd;
mod cni;
mod commands;
mod container;
mod decoy;
mod dns;
mod drift;
mod explain;
mod first_packets;
mod half_open;
mod health;
mod interfaces;
mod isolation;
mod labels;
mod load;
mod lost_addresses;
mod neighbours;
mod no_peer;
mod observe;
mod oddities;
mod owner;
mod past_the_proxy;
mod pods;
mod probes;
mod processes;
mod proxies;
mod proxys_mark;
mod reroute;
mod reserved_ports;
mod resources;
mod restart;
mod soak;
mod status;
mod takeover;
mod toggles;
mod traffic;
mod untouched;
mod vm;
