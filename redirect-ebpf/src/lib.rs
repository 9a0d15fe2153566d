//! What the kernel programs and the agent share: the ABI ([`abi`]) and the decisions ([`verdict`]).
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod verdict;
