//! What istio-cni leaves in an ambient pod, as far as it is in nf_tables.
//!
//! Source: Istio `cni/pkg/iptables`, `cni/pkg/nftables`. Per family, in the pod:
//!
//! - rule 32764, `fwmark 0x111/0xfff` → table 100, `local default dev lo`: set in every mode, so it
//!   identifies such a pod;
//! - chains `ISTIO_PRERT` and `ISTIO_OUTPUT` in the tables `nat`, `mangle` and, for DNS, `raw` of iptables,
//!   which are nf_tables' or, with `iptables-legacy`, the kernel's older ones; or, with native nftables,
//!   the tables `istio-ambient-nat`, `-mangle` and `-raw`.
//!
//! Connections that its rules have redirected are translated (NAT) to the proxy's ports as long as they live.
//! When its rules are gone, a table of ours keeps that translation active ([`KEEPER`]).

use anyhow::Result;
use redirect_ebpf::abi::MARK_REDIRECTED;

use super::nftables::{
    self, Batch, Chain, FAMILY_INET, FAMILY_IPV4, FAMILY_IPV6, Ruleset, TableName,
};

/// Source: Istio `cni/pkg/iptables/iptables.go`, `ChainInpodOutput`, `ChainInpodPrerouting`.
const CHAINS: [&str; 2] = ["ISTIO_OUTPUT", "ISTIO_PRERT"];
/// The tables of iptables that it uses.
pub(super) const TABLES: [&str; 3] = ["nat", "mangle", "raw"];
/// Source: Istio `cni/pkg/nftables/nftables.go`, `AmbientNatTable` and the like.
pub(super) const NATIVE_TABLES: [&str; 3] =
    ["istio-ambient-mangle", "istio-ambient-nat", "istio-ambient-raw"];
/// Our table that keeps the translation of open connections active, and its only chain.
const KEEPER: &str = "redirect-agent-nat";
const KEEPER_CHAIN: &str = "open-connections";

fn keeper() -> TableName {
    TableName { family: FAMILY_INET, name: KEEPER.to_owned() }
}

/// Whether our table for translated connections exists.
pub(super) fn has_keeper(ruleset: &Ruleset) -> bool {
    ruleset.tables.iter().any(|table| table.name == keeper())
}

/// Removes our table for translated connections.
pub(super) fn remove_keeper() -> Result<()> {
    let mut batch = Batch::default();
    batch.delete_table(&keeper());
    batch.commit()
}

fn is_istios(chain: &str) -> bool {
    CHAINS.contains(&chain)
}

/// What has to be removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Removal<'a> {
    /// Tables that contain nothing of anybody else.
    tables: Vec<&'a TableName>,
    /// In all other tables: the rules in istio-cni's chains, and those that jump there.
    rules: Vec<&'a nftables::Rule>,
    /// istio-cni's chains in these.
    chains: Vec<&'a Chain>,
}

impl Removal<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.rules.is_empty() && self.chains.is_empty()
    }

    /// Removes all of it atomically, and adds our table for translated connections.
    pub(super) fn carry_out(&self, has_keeper: bool) -> Result<()> {
        self.batch(has_keeper).commit()
    }

    pub(super) fn batch(&self, has_keeper: bool) -> Batch {
        let mut batch = Batch::default();
        if !has_keeper {
            batch.add_keeper(&keeper(), KEEPER_CHAIN, MARK_REDIRECTED);
        }
        self.rules.iter().for_each(|rule| batch.delete_rule(rule));
        self.chains.iter().for_each(|chain| batch.delete_chain(chain));
        self.tables.iter().for_each(|table| batch.delete_table(table));
        batch
    }
}

/// Finds what belongs to istio-cni.
pub(super) fn removal(ruleset: &Ruleset) -> Removal<'_> {
    let mut removal = Removal::default();
    for table in &ruleset.tables {
        if table.name.family == FAMILY_INET && NATIVE_TABLES.contains(&&*table.name.name) {
            removal.tables.push(&table.name);
            continue;
        }
        let iptables = matches!(table.name.family, FAMILY_IPV4 | FAMILY_IPV6);
        if !iptables || !TABLES.contains(&&*table.name.name) {
            continue;
        }
        let chains = || ruleset.chains.iter().filter(|chain| chain.table == table.name);
        if !chains().any(|chain| is_istios(&chain.name)) {
            continue;
        }
        let (istios, others): (Vec<_>, Vec<_>) =
            ruleset.rules.iter().filter(|rule| rule.table == table.name).partition(|rule| {
                is_istios(&rule.chain) || rule.jumps_to.as_deref().is_some_and(is_istios)
            });
        let only = others.is_empty()
            && usize::try_from(table.holds).is_ok_and(|holds| holds == chains().count())
            && chains().all(|chain| is_istios(&chain.name) || (chain.base && chain.accepts));
        if only {
            removal.tables.push(&table.name);
        } else {
            removal.rules.extend(istios);
            removal.chains.extend(chains().filter(|chain| is_istios(&chain.name)));
        }
    }
    removal
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What istio-cni makes of iptables' `nat`, in a family.
    fn nat(family: u8) -> Ruleset {
        let table = TableName { family, name: "nat".to_owned() };
        let chain = |name: &str, base| Chain {
            table: table.clone(),
            name: name.to_owned(),
            base,
            accepts: true,
        };
        let rule = |chain: &str, handle, jumps_to: Option<&str>| nftables::Rule {
            table: table.clone(),
            chain: chain.to_owned(),
            handle,
            jumps_to: jumps_to.map(str::to_owned),
        };
        Ruleset {
            tables: vec![nftables::Table { name: table.clone(), holds: 3 }],
            chains: vec![chain("OUTPUT", true), chain("INPUT", true), chain("ISTIO_OUTPUT", false)],
            rules: vec![rule("OUTPUT", 1, Some("ISTIO_OUTPUT")), rule("ISTIO_OUTPUT", 2, None)],
        }
    }

    #[test]
    fn table_goes_whole_only_when_nobody_else_has_anything_in_it() {
        for family in [FAMILY_IPV4, FAMILY_IPV6] {
            let istios = nat(family);
            let whole = removal(&istios);
            assert_eq!(whole.tables, [&istios.tables[0].name]);
            assert!(whole.rules.is_empty() && whole.chains.is_empty());

            let others: [fn(&mut Ruleset); 4] = [
                // A rule, a chain, a policy, a set.
                |set| {
                    set.rules.push(nftables::Rule {
                        handle: 3,
                        jumps_to: None,
                        ..set.rules[0].clone()
                    })
                },
                |set| {
                    set.chains.push(Chain { name: "OTHERS".to_owned(), ..set.chains[2].clone() });
                    set.tables[0].holds += 1;
                },
                |set| set.chains[1].accepts = false,
                |set| set.tables[0].holds += 1,
            ];
            for add in others {
                let mut shared = nat(family);
                add(&mut shared);
                let part = removal(&shared);
                assert!(part.tables.is_empty(), "{shared:?}");
                let handles: Vec<u64> = part.rules.iter().map(|rule| rule.handle).collect();
                assert_eq!(handles, [1, 2], "{shared:?}");
                assert_eq!(part.chains, [&shared.chains[2]]);
            }
        }
    }

    #[test]
    fn tables_of_others_are_left_alone() {
        let mut others = nat(FAMILY_IPV4);
        others.chains.pop();
        others.rules.clear();
        assert!(removal(&others).is_empty());
        // Not one of iptables'.
        assert!(removal(&nat(FAMILY_INET)).is_empty());
        let keeper = Ruleset {
            tables: vec![nftables::Table { name: keeper(), holds: 1 }],
            ..Ruleset::default()
        };
        assert!(removal(&keeper).is_empty() && has_keeper(&keeper));
    }
}
