//! The cluster as the source: the agent's real client against a stand-in API server over HTTP. What
//! the running agent does with it is among the scenarios of the agent.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

mod events;
mod fixture;
mod following;
mod objects;
mod publishing;
