//! CNI: the network plugin that delays a pod's start until the pod is in its desired state.

pub mod entry;
pub mod install;
pub mod network;
pub mod plugin;
pub mod records;
pub mod request;
pub mod server;
