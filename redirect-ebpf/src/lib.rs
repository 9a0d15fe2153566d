//! What the kernel programs and the agent share: the ABI ([`abi`]) and the decisions ([`verdict`],
//! and [`dns`] for a pod's DNS).
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod dns;
#[cfg(test)]
mod draw;
pub mod shown;
pub mod verdict;
