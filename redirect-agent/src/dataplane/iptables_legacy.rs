//! The tables of `iptables-legacy` by socket options, as far as others' have to be read and emptied: no
//! `iptables` is needed on the node. Every function here runs inside the network namespace.
//!
//! Source: Linux `include/uapi/linux/netfilter/x_tables.h`, `netfilter_ipv4/ip_tables.h` and
//! `netfilter_ipv6/ip6_tables.h`, on machines of 64 bits.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::sys;

/// Source: `IPT_SO_GET_INFO`, `IPT_SO_GET_ENTRIES`; in IPv6 the same.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// `struct ipt_getinfo`.
const INFO: usize = 84;
const INFO_VALID_HOOKS: usize = 32;
const INFO_HOOK_ENTRY: usize = 36;
const INFO_UNDERFLOW: usize = 56;
const INFO_ENTRIES: usize = 76;
const INFO_SIZE: usize = 80;
/// `struct ipt_get_entries`, without the entries.
const ENTRIES: usize = 40;
const ENTRIES_SIZE: usize = 32;
/// `XT_TABLE_MAXNAMELEN`, `NF_INET_NUMHOOKS`.
const NAME: usize = 32;
const HOOKS: usize = 5;
/// `struct xt_entry_target`: its size, its name; and what follows that in the standard one and in the
/// one that stands at the head of a chain.
const TARGET_NAME: usize = 2;
const TARGET: usize = 32;
const STANDARD_TARGET: usize = 40;
const ERROR_TARGET: usize = 64;
const STANDARD: &str = "";
const ERROR: &str = "ERROR";
/// Verdicts: `-NF_ACCEPT - 1`. One that is not negative is where to jump.
const ACCEPT: i32 = -2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    family: Family,
    pub(super) name: String,
    valid_hooks: u32,
    /// How many entries it has: rules, policies, and heads of chains.
    entries: u32,
    pub(super) chains: Vec<Chain>,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    /// None of one that the kernel calls, at a hook.
    pub(super) name: Option<String>,
    /// Whether it is called by the kernel, and lets pass what no rule decides on.
    pub(super) accepts: bool,
    /// For each of its rules, the chain that it jumps to.
    pub(super) rules: Vec<Option<String>>,
}

/// Reads those of these tables that there are, in this order. Asks for no other: that would make one.
pub(super) fn read(names: &[&str]) -> Result<Vec<Table>> {
    let mut tables = Vec::new();
    for family in [Family::V4, Family::V6] {
        let present = match fs::read_to_string(family.list()) {
            // Without the module there is no such file.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            present => present.with_context(|| format!("read {}", family.list()))?,
        };
        for name in names.iter().filter(|name| present.lines().any(|line| line == **name)) {
            let table = read_table(family, name);
            tables
                .push(table.with_context(|| format!("read table {name} of {family:?} iptables"))?);
        }
    }
    Ok(tables)
}

fn read_table(family: Family, name: &str) -> Result<Table> {
    let socket = family.socket()?;
    let mut info = named(name, INFO);
    sys::get_iptables(socket.as_fd(), family.level(), GET_INFO, &mut info)?;
    let size = number(&info, INFO_SIZE)?;
    let mut entries = named(name, ENTRIES + usize::try_from(size)?);
    entries[ENTRIES_SIZE..ENTRIES_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
    sys::get_iptables(socket.as_fd(), family.level(), GET_ENTRIES, &mut entries)?;
    parse(family, name, &info, &entries[ENTRIES..])
}

fn parse(family: Family, name: &str, info: &[u8], entries: &[u8]) -> Result<Table> {
    let valid_hooks = number(info, INFO_VALID_HOOKS)?;
    let is_hooks = |at: usize, offset: usize| -> Result<bool> {
        for hook in (0..HOOKS).filter(|hook| valid_hooks & 1 << hook != 0) {
            if usize::try_from(number(info, at + 4 * hook)?)? == offset {
                return Ok(true);
            }
        }
        Ok(false)
    };
    // Chains as they are named, where their rules start, and where the rules jump to.
    let mut chains: Vec<(Chain, usize, Vec<Option<usize>>)> = Vec::new();
    let (mut offset, mut count, mut complete) = (0, 0_u32, false);
    while let Some(rest) = entries.get(offset..).filter(|rest| !rest.is_empty()) {
        let target = usize::from(short(rest, family.target_offset())?);
        let next = usize::from(short(rest, family.target_offset() + 2)?);
        ensure!(target >= family.entry() && next > target, "an entry overlaps itself");
        let target = rest.get(target..next).context("an entry is cut off")?;
        let start = offset;
        offset += next;
        count += 1;
        let kind = text(target, TARGET_NAME, TARGET - 1)?;
        if kind == ERROR {
            complete = offset == entries.len();
            if !complete {
                let name = Some(text(target, TARGET, ERROR_TARGET)?);
                let chain = Chain { name, accepts: false, rules: Vec::new() };
                chains.push((chain, offset, Vec::new()));
            }
            continue;
        }
        if is_hooks(INFO_HOOK_ENTRY, start)? {
            let chain = Chain { name: None, accepts: false, rules: Vec::new() };
            chains.push((chain, start, Vec::new()));
        }
        let (chain, _, jumps) = chains.last_mut().context("an entry is in no chain")?;
        let verdict = match &*kind {
            STANDARD => Some(number(target, TARGET)?.cast_signed()),
            _ => None,
        };
        if chain.name.is_none() && is_hooks(INFO_UNDERFLOW, start)? {
            chain.accepts = verdict == Some(ACCEPT);
        } else {
            jumps.push(verdict.and_then(|verdict| usize::try_from(verdict).ok()));
        }
    }
    ensure!(complete && count == number(info, INFO_ENTRIES)?, "its end is missing");
    let starts: Vec<_> = chains.iter().map(|(chain, at, _)| (*at, chain.name.clone())).collect();
    let name_of = |jump: usize| starts.iter().find(|(at, _)| *at == jump)?.1.clone();
    let named = |(mut chain, _, jumps): (Chain, usize, Vec<Option<usize>>)| {
        chain.rules = jumps.into_iter().map(|jump| jump.and_then(name_of)).collect();
        chain
    };
    Ok(Table {
        family,
        name: name.to_owned(),
        valid_hooks,
        entries: count,
        chains: chains.into_iter().map(named).collect(),
    })
}

impl Table {
    /// Takes everything out of it, at once. It stays in the namespace: the kernel removes none.
    ///
    /// # Errors
    ///
    /// Also when rules were added to it, or removed, since it was read.
    pub(super) fn clear(&self) -> Result<()> {
        let socket = self.family.socket()?;
        sys::replace_iptables(socket.as_fd(), self.family.level(), &mut self.cleared())
            .with_context(|| format!("empty table {} of {:?} iptables", self.name, self.family))
    }

    /// `struct ipt_replace` with the entries: for each hook the policy, and the end.
    fn cleared(&self) -> Vec<u8> {
        let hooks = (0..HOOKS).filter(|hook| self.valid_hooks & 1 << hook != 0);
        let mut offsets = [0_u32; HOOKS];
        let mut entries = Vec::new();
        let mut count = 1_u32;
        for hook in hooks {
            offsets[hook] = u32::try_from(entries.len()).unwrap_or(u32::MAX);
            let policy = self.family.entry_of(STANDARD_TARGET, STANDARD, &ACCEPT.to_ne_bytes());
            entries.extend(policy);
            count += 1;
        }
        entries.extend(self.family.entry_of(ERROR_TARGET, ERROR, ERROR.as_bytes()));

        let mut bytes = named(&self.name, NAME);
        let size = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        // Where a chain starts, its policy is.
        let numbers = [&[self.valid_hooks, count, size][..], &offsets, &offsets, &[self.entries]];
        bytes.extend(numbers.concat().iter().flat_map(|number| number.to_ne_bytes()));
        bytes.extend([0; 8]);
        bytes.extend(entries);
        bytes
    }
}

impl Family {
    /// Which tables there are.
    fn list(self) -> &'static str {
        match self {
            Self::V4 => "/proc/thread-self/net/ip_tables_names",
            Self::V6 => "/proc/thread-self/net/ip6_tables_names",
        }
    }

    fn level(self) -> i32 {
        match self {
            Self::V4 => libc::IPPROTO_IP,
            Self::V6 => libc::IPPROTO_IPV6,
        }
    }

    /// Any socket of the family will do.
    fn socket(self) -> Result<OwnedFd> {
        let family = match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        };
        socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).context("open a socket")
    }

    /// The size of `struct ipt_entry`, `struct ip6t_entry`.
    fn entry(self) -> usize {
        match self {
            Self::V4 => 112,
            Self::V6 => 168,
        }
    }

    /// Where it has `target_offset`; `next_offset` follows.
    fn target_offset(self) -> usize {
        match self {
            Self::V4 => 88,
            Self::V6 => 140,
        }
    }

    /// An entry that matches everything.
    fn entry_of(self, target_size: usize, target: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; self.entry() + target_size];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let short = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_ne_bytes();
        put(self.target_offset(), &short(self.entry()));
        put(self.target_offset() + 2, &short(self.entry() + target_size));
        put(self.entry(), &short(target_size));
        put(self.entry() + TARGET_NAME, target.as_bytes());
        put(self.entry() + TARGET, data);
        bytes
    }
}

/// A struct of that size, or more, which starts with a table's name.
fn named(name: &str, size: usize) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(size, 0);
    bytes
}

fn short(bytes: &[u8], at: usize) -> Result<u16> {
    let value = bytes.get(at..).and_then(<[u8]>::first_chunk).context("an entry is cut off")?;
    Ok(u16::from_ne_bytes(*value))
}

fn number(bytes: &[u8], at: usize) -> Result<u32> {
    let value = bytes.get(at..).and_then(<[u8]>::first_chunk).context("an entry is cut off")?;
    Ok(u32::from_ne_bytes(*value))
}

/// What stands there up to a zero.
fn text(bytes: &[u8], from: usize, to: usize) -> Result<String> {
    let text = bytes.get(from..to).context("a target is cut off")?;
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table `nat` with one rule, by which `OUTPUT` jumps to `ISTIO_OUTPUT`: what the kernel says of it.
    fn nat(family: Family) -> (Vec<u8>, Vec<u8>) {
        let policy = || family.entry_of(STANDARD_TARGET, STANDARD, &ACCEPT.to_ne_bytes());
        let step = u32::try_from(policy().len()).unwrap();
        let head = family.entry_of(ERROR_TARGET, ERROR, b"ISTIO_OUTPUT");
        let start = i32::try_from(4 * policy().len() + head.len()).unwrap();
        let jump = family.entry_of(STANDARD_TARGET, STANDARD, &start.to_ne_bytes());
        let redirect = family.entry_of(56, "REDIRECT", &[1; 24]);
        let end = family.entry_of(ERROR_TARGET, ERROR, ERROR.as_bytes());
        // PREROUTING, OUTPUT with the rule and its policy, POSTROUTING.
        let entries = [policy(), jump, policy(), policy(), head, redirect, policy(), end].concat();
        let mut info = named("nat", NAME);
        let hook_entry = [0, 0, 0, step, 3 * step];
        let underflow = [0, 0, 0, 2 * step, 3 * step];
        let size = u32::try_from(entries.len()).unwrap();
        let numbers = [&[0b11001][..], &hook_entry, &underflow, &[8, size]].concat();
        info.extend(numbers.iter().flat_map(|number: &u32| number.to_ne_bytes()));
        assert_eq!(info.len(), INFO);
        (info, entries)
    }

    fn base(rules: &[Option<&str>]) -> Chain {
        let rules = rules.iter().map(|rule| rule.map(str::to_owned)).collect();
        Chain { name: None, accepts: true, rules }
    }

    #[test]
    fn chains_and_their_jumps_are_read() {
        for family in [Family::V4, Family::V6] {
            let (info, mut entries) = nat(family);
            let table = parse(family, "nat", &info, &entries).unwrap();
            let istios = Chain {
                name: Some("ISTIO_OUTPUT".to_owned()),
                accepts: false,
                rules: vec![None, None],
            };
            let chains = [base(&[]), base(&[Some("ISTIO_OUTPUT")]), base(&[]), istios];
            assert_eq!(table.chains, chains);

            // The first chain's policy is another one.
            let verdict = family.entry() + TARGET;
            entries[verdict..verdict + 4].copy_from_slice(&(-1_i32).to_ne_bytes());
            let table = parse(family, "nat", &info, &entries).unwrap();
            assert!(!table.chains[0].accepts && table.chains[1].accepts);
        }
    }

    #[test]
    fn emptied_table_has_its_policies_and_nothing_else() {
        for family in [Family::V4, Family::V6] {
            let (info, entries) = nat(family);
            let cleared = parse(family, "nat", &info, &entries).unwrap().cleared();
            let (head, entries) = cleared.split_at(96);
            assert_eq!(text(head, 0, NAME).unwrap(), "nat");
            assert_eq!(number(head, 36).unwrap(), 4, "entries");
            assert_eq!(usize::try_from(number(head, 40).unwrap()).unwrap(), entries.len());
            assert_eq!(number(head, 84).unwrap(), 8, "counters of what was there");
            // Hooks and where they start are in another place than in what is read.
            let info = [&head[..36], &head[44..84], &head[36..44]].concat();
            let table = parse(family, "nat", &info, entries).unwrap();
            assert_eq!(table.valid_hooks, 0b11001);
            assert_eq!(table.chains, [base(&[]), base(&[]), base(&[])]);
        }
    }

    #[test]
    fn odd_bytes_are_an_error_and_no_panic() {
        for family in [Family::V4, Family::V6] {
            let (info, entries) = nat(family);
            for length in 0..entries.len() {
                assert!(parse(family, "nat", &info, &entries[..length]).is_err(), "{length}");
            }
            for length in 0..INFO_SIZE {
                assert!(parse(family, "nat", &info[..length], &entries).is_err(), "{length}");
            }
            for at in 0..entries.len() {
                for odd in [0, 1, 0x7f, 0xff] {
                    let mut entries = entries.clone();
                    entries[at] = odd;
                    // Whatever it says.
                    let _ = parse(family, "nat", &info, &entries);
                }
            }
            for at in [family.target_offset(), family.target_offset() + 2] {
                for odd in [0_u16, 1, u16::MAX] {
                    let mut entries = entries.clone();
                    entries[at..at + 2].copy_from_slice(&odd.to_ne_bytes());
                    assert!(parse(family, "nat", &info, &entries).is_err(), "{odd} at {at}");
                }
            }
        }
    }
}
