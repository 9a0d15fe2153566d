//! The whole cluster as its API server shows it: what should be in the mesh and is not, since when, and why.
//!
//! It needs no agent and no root, but rights to list. [`collect`] reads objects page by page and keeps of
//! each what counts ([`Snapshot`]). [`Snapshot::report`] is a pure function of that: the same decision as the
//! agents' ([`crate::membership::decide`]), compared with the annotation that they wrote.

pub mod collect;
mod object;
mod print;
mod report;
pub mod settings;
mod snapshot;
mod watch;

pub use self::{
    object::{AgentSeen, EventSeen, NamespaceSeen, PodSeen},
    print::{changes, text},
    report::{ByVersion, Counts, NodeProblem, NodeRow, PodRow, Report, SettingsRow, State, Why},
    settings::Settings,
    snapshot::Snapshot,
    watch::watch,
};
