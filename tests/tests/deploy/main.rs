//! What is in `deploy/`: that Kubernetes and Helm take it, and that it agrees with the agent. How the
//! agent fares as the DaemonSet runs it is a scenario of its own (`tests/agent/container.rs`).

mod agreement;
mod chart;
mod docs;
mod monitoring;
