//! CNI: the network plugin that holds a pod's start until the pod is where it should be.

pub mod entry;
pub mod install;
pub mod network;
pub mod plugin;
pub mod records;
pub mod request;
pub mod server;
