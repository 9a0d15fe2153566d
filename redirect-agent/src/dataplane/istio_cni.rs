//! What istio-cni leaves in a pod of ambient mode: finding it, and taking its place.
//!
//! Source: Istio `cni/pkg/iptables`, `cni/pkg/nftables`. Per family, in the pod:
//!
//! - rule 32764, `fwmark 0x111/0xfff` → table 100, `local default dev lo`: whichever way it redirects,
//!   so this is what tells;
//! - chains `ISTIO_PRERT` and `ISTIO_OUTPUT` in the tables `nat`, `mangle` and, for DNS, `raw` of iptables,
//!   which are nf_tables' or, with `iptables-legacy`, the kernel's older ones; or, with native nftables,
//!   the tables `istio-ambient-nat`, `-mangle` and `-raw`.
//!
//! Connections that its rules have redirected are translated (NAT) to the proxy's ports for as long as
//! they live. When its rules are gone, a table of ours keeps that going ([`KEEPER`]), and the rule stays
//! as the sign that there is something left to clean up.

use anyhow::{Result, bail};
use redirect_ebpf::abi::{MARK_REDIRECTED, PORT_INBOUND, PORT_OUTBOUND};

use super::{
    Dataplane, PodNetns, iptables_legacy,
    nftables::{self, Batch, Chain, FAMILY_INET, FAMILY_IPV4, FAMILY_IPV6, Ruleset, TableName},
    routes::Routing,
    sockets,
};
use crate::traffic::Traffic;

/// Source: Istio `cni/pkg/iptables/iptables.go`, `ChainInpodOutput`, `ChainInpodPrerouting`.
const CHAINS: [&str; 2] = ["ISTIO_OUTPUT", "ISTIO_PRERT"];
/// The tables of iptables that it uses. The first to go is the one that redirects: without the others
/// a redirected connection would be stuck.
const TABLES: [&str; 3] = ["nat", "mangle", "raw"];
/// Source: Istio `cni/pkg/nftables/nftables.go`, `AmbientNatTable` and the like.
const NATIVE_TABLES: [&str; 3] = ["istio-ambient-mangle", "istio-ambient-nat", "istio-ambient-raw"];
/// The table of ours that keeps the translation of open connections going, and its one chain.
const KEEPER: &str = "redirect-agent-nat";
const KEEPER_CHAIN: &str = "open-connections";

/// What of istio-cni's is in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IstioCni {
    /// Nothing.
    Absent,
    /// What can be taken over.
    Present,
    /// What is left of a takeover, for connections that it had redirected.
    Displaced,
    /// What is in a table of `iptables-legacy` together with rules of others, and is not taken over.
    Shared,
}

/// How far istio-cni is displaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Displaced {
    /// Its rules are removed just now; connections that they had redirected may be left.
    Now,
    /// Its rules were removed before; connections that they had redirected are left.
    Before,
    /// Nothing of it is left.
    Wholly,
}

impl Dataplane {
    /// Looks whether istio-cni redirects the pod. Changes nothing, and asks nf_tables, which may load a
    /// module, only where it does.
    ///
    /// # Errors
    ///
    /// When it cannot be told.
    pub fn istio_cni(&self, pod: &PodNetns) -> Result<IstioCni> {
        pod.netns.run(|| {
            if !Routing::open()?.has_istio_cni()? {
                return Ok(IstioCni::Absent);
            }
            let legacy = read_legacy()?;
            if legacy.iter().any(|table| is_shared(&table.chains)) {
                return Ok(IstioCni::Shared);
            }
            let ruleset = nftables::read()?;
            let displaced = has_keeper(&ruleset) && removal(&ruleset, &legacy).is_empty();
            Ok(if displaced { IstioCni::Displaced } else { IstioCni::Present })
        })?
    }

    /// Takes istio-cni's rules out of a pod that is prepared: new connections are redirected as the pod
    /// is captured, or go direct. Those that are open go on, and what they need stays: to be called again
    /// until all is [`Displaced::Wholly`].
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn displace_istio_cni(&self, pod: &PodNetns) -> Result<Displaced> {
        let ruleset = pod.netns.run(nftables::read)??;
        let legacy = pod.netns.run(read_legacy)??;
        let removal = removal(&ruleset, &legacy);
        if removal.is_empty() {
            return pod.netns.run(|| clear_up(&ruleset))?;
        }
        let displace = || {
            let mut batch = Batch::default();
            if !has_keeper(&ruleset) {
                batch.add_keeper(&keeper(), KEEPER_CHAIN, MARK_REDIRECTED);
            }
            removal.carry_out(batch)
        };
        if self.captured(pod, &Traffic::default())?.partly {
            // Its open connections were marked before, and new ones are ours whichever rules they meet.
            pod.netns.run(displace)??;
        } else {
            self.switch(pod, || {
                self.mark("mark_all")?;
                displace()
            })?;
            self.settle_wholly(pod)?;
        }
        Ok(Displaced::Now)
    }

    /// Takes away what keeps open connections going that istio-cni had redirected, if it is there.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub(super) fn forget_istio_cni() -> Result<()> {
        let routing = Routing::open()?;
        if !routing.has_istio_cni()? {
            return Ok(());
        }
        let ruleset = nftables::read()?;
        if has_keeper(&ruleset) {
            // An agent may have died when the keeper was there and `iptables-legacy` not yet empty.
            removal(&ruleset, &read_legacy()?).carry_out(Batch::default())?;
            remove_keeper(&routing)?;
        }
        Ok(())
    }
}

fn keeper() -> TableName {
    TableName { family: FAMILY_INET, name: KEEPER.to_owned() }
}

fn has_keeper(ruleset: &Ruleset) -> bool {
    ruleset.tables.iter().any(|table| table.name == keeper())
}

/// When no connection is left that needs them, removes the keeper and the sign.
fn clear_up(ruleset: &Ruleset) -> Result<Displaced> {
    let routing = Routing::open()?;
    if !has_keeper(ruleset) {
        routing.delete_istio_cni()?;
    } else if sockets::accepted_at(&[PORT_OUTBOUND, PORT_INBOUND])? > 0 {
        return Ok(Displaced::Before);
    } else {
        remove_keeper(&routing)?;
    }
    Ok(Displaced::Wholly)
}

/// The sign goes last: what is left half-way is found again by it.
fn remove_keeper(routing: &Routing) -> Result<()> {
    let mut batch = Batch::default();
    batch.delete_table(&keeper());
    batch.commit()?;
    routing.delete_istio_cni()
}

/// The tables of `iptables-legacy` in which it has chains.
fn read_legacy() -> Result<Vec<iptables_legacy::Table>> {
    let mut tables = iptables_legacy::read(&TABLES)?;
    tables.retain(|table| table.chains.iter().any(|c| c.name.as_deref().is_some_and(is_istios)));
    Ok(tables)
}

/// Whether others have anything among these chains of a table.
fn is_shared(chains: &[iptables_legacy::Chain]) -> bool {
    !chains.iter().all(|chain| match &chain.name {
        Some(name) => is_istios(name),
        None => chain.accepts && chain.rules.iter().all(|to| to.as_deref().is_some_and(is_istios)),
    })
}

fn is_istios(chain: &str) -> bool {
    CHAINS.contains(&chain)
}

/// What has to go.
#[derive(Debug, Default, PartialEq, Eq)]
struct Removal<'a> {
    /// Tables in which there is nothing of anybody else.
    tables: Vec<&'a TableName>,
    /// In the others: the rules in its chains, and those that jump there.
    rules: Vec<&'a nftables::Rule>,
    /// Its chains in these.
    chains: Vec<&'a Chain>,
    /// Tables of `iptables-legacy` with its chains, which are emptied.
    legacy: &'a [iptables_legacy::Table],
}

impl Removal<'_> {
    fn is_empty(&self) -> bool {
        self.tables.is_empty()
            && self.rules.is_empty()
            && self.chains.is_empty()
            && self.legacy.is_empty()
    }

    /// Removes it all: what is nf_tables' together with `batch`, and then the rest.
    fn carry_out(&self, mut batch: Batch) -> Result<()> {
        if let Some(table) = self.legacy.iter().find(|table| is_shared(&table.chains)) {
            bail!("others have rules in table {} of iptables-legacy, too", table.name);
        }
        self.rules.iter().for_each(|rule| batch.delete_rule(rule));
        self.chains.iter().for_each(|chain| batch.delete_chain(chain));
        self.tables.iter().for_each(|table| batch.delete_table(table));
        batch.commit()?;
        self.legacy.iter().try_for_each(iptables_legacy::Table::clear)
    }
}

fn removal<'a>(ruleset: &'a Ruleset, legacy: &'a [iptables_legacy::Table]) -> Removal<'a> {
    let mut removal = Removal { legacy, ..Removal::default() };
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
            let whole = removal(&istios, &[]);
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
                let part = removal(&shared, &[]);
                assert!(part.tables.is_empty(), "{shared:?}");
                let handles: Vec<u64> = part.rules.iter().map(|rule| rule.handle).collect();
                assert_eq!(handles, [1, 2], "{shared:?}");
                assert_eq!(part.chains, [&shared.chains[2]]);
            }
        }
    }

    #[test]
    fn legacy_table_is_shared_when_anybody_else_has_anything_in_it() {
        let chain = |name: Option<&str>, rules: &[Option<&str>]| iptables_legacy::Chain {
            name: name.map(str::to_owned),
            accepts: name.is_none(),
            rules: rules.iter().map(|rule| rule.map(str::to_owned)).collect(),
        };
        let istios = [
            chain(None, &[]),
            chain(None, &[Some("ISTIO_OUTPUT")]),
            chain(Some("ISTIO_OUTPUT"), &[None, None]),
        ];
        assert!(!is_shared(&istios));
        let others: [fn(&mut Vec<iptables_legacy::Chain>); 4] = [
            // A rule, a jump, a chain, a policy.
            |chains| chains[0].rules.push(None),
            |chains| chains[0].rules.push(Some("OTHERS".to_owned())),
            |chains| chains[2].name = Some("OTHERS".to_owned()),
            |chains| chains[0].accepts = false,
        ];
        for add in others {
            let mut shared = istios.to_vec();
            add(&mut shared);
            assert!(is_shared(&shared), "{shared:?}");
        }
    }

    #[test]
    fn tables_of_others_are_left_alone() {
        let mut others = nat(FAMILY_IPV4);
        others.chains.pop();
        others.rules.clear();
        assert!(removal(&others, &[]).is_empty());
        // Not one of iptables'.
        assert!(removal(&nat(FAMILY_INET), &[]).is_empty());
        let keeper = Ruleset {
            tables: vec![nftables::Table { name: keeper(), holds: 1 }],
            ..Ruleset::default()
        };
        assert!(removal(&keeper, &[]).is_empty() && has_keeper(&keeper));
    }
}
