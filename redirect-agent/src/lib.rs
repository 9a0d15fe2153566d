//! The node agent of the ambient redirector, as a library: `main.rs` only wires it up.

pub mod membership;
pub mod source;
pub mod commands;
pub mod dataplane;
pub mod netns;
pub mod zds;
