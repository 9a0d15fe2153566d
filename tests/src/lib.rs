//! Fixtures for the tests and the demo.

pub mod apiserver;
pub mod app;
pub mod attached;
pub mod bench;
pub mod browser;
pub mod cni;
pub mod demo;
pub mod dns;
pub mod footprint;
pub mod hbone;
pub mod istio_cni;
pub mod manifests;
pub mod netns;
pub mod plain_proxy;
pub mod process;
pub mod raw;
pub mod sniff;
pub mod sock_diag;
pub mod sockets;
pub mod topology;
