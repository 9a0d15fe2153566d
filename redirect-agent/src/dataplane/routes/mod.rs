//! Routes, rules, addresses and interfaces of a pod's network namespace, by netlink. Every function
//! here runs inside it.

#[cfg(test)]
mod fuzz;
mod route;
mod rule;
mod seen;
mod text;

use std::{collections::BTreeMap, net::IpAddr, pin::pin};

use anyhow::{Context as _, Result, ensure};
use futures_util::{Stream, StreamExt as _};
use nix::net::if_::if_nameindex;
use redirect_ebpf::abi::{LOOPBACK_IFINDEX, MARK_MASK};
use rtnetlink::{
    Error, Handle, IpVersion,
    packet_route::{
        AddressFamily,
        route::{RouteAttribute, RouteMessage, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
    },
};

use self::{
    route::{Outbound, Route},
    rule::{PRIORITY_LANDING, Rule, is_istio_cnis, is_stale, keep_rules, leads_to_ours, priority},
    seen::{Family, Link, foreign_rules, interface},
};
pub(super) use self::{
    seen::{Address, Seen},
    text::Lines,
};
use crate::traffic::Traffic;

/// The routing table that delivers connections to be redirected to `lo`.
const TABLE: u32 = 15001;
/// The routing table for redirected connections: it delivers everything to `lo`.
const TABLE_KEEP: u32 = 15002;
/// How many foreign rules of a pod are moved behind ours. Nobody needs more.
const FOREIGN_RULES: usize = 64;
/// How many objects of each kind are read from a pod: a pod with `NET_ADMIN` may create any number, and the
/// agent's memory is shared by all pods. The settings need at most half of that.
const POD_ENTRIES: usize = 8192;
/// istio-cni's table for the application's replies. The mark that leads to it happens to be ours, too.
/// Source: Istio `cni/pkg/config`, `RouteTableInbound`, `InpodTProxyMark`.
const TABLE_ISTIO_CNI: u32 = 100;
/// The kernel's own table of local addresses. Source: Linux `include/uapi/linux/rtnetlink.h`.
const TABLE_LOCAL: u32 = 255;

/// A netlink connection to the routing of the namespace in which it was opened.
pub(super) struct Routing {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Routing {
    /// Connects in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let (runtime, handle) = connect()?;
        Ok(Self { runtime, handle })
    }

    /// Reads everything that the other functions need to know.
    pub(super) fn look(&self) -> Result<Seen> {
        self.runtime.block_on(async {
            let links = self.handle.link().get().execute();
            let links = collect("network interfaces", links, |link| Some(interface(link))).await?;
            let addresses = self.handle.address().get().execute();
            let mut interfaces: BTreeMap<u32, Link> = links.into_iter().collect();
            // An interface whose name is not UTF-8 is left out.
            for interface in &if_nameindex().context("list the interfaces")? {
                interfaces.entry(interface.index()).or_insert_with(|| Link {
                    name: interface.name().to_string_lossy().into_owned(),
                    up: true,
                });
            }
            Ok(Seen {
                interfaces,
                addresses: collect("addresses", addresses, Some).await?,
                v4: self.family(IpVersion::V4).await?,
                v6: self.family(IpVersion::V6).await?,
            })
        })
    }

    async fn family(&self, family: IpVersion) -> Result<Family> {
        let rules = self.rules(family.clone()).await?;
        Ok(Family { rules, routes: self.routes(family).await? })
    }

    /// Adds, in the family of `source`, the rules and routes that keep redirected connections redirected, and
    /// those for virtual interfaces and for what the guard moves to `lo`. `source` becomes the source address
    /// of connections that have none.
    pub(super) fn add_keep(&self, seen: &Seen, source: IpAddr, traffic: &Traffic) -> Result<()> {
        let family = seen.family(source);
        self.runtime.block_on(async {
            let present = family.our_routes();
            for route in seen.deliveries(source).keep_routes().difference(&present) {
                self.add_route(*route).await?;
            }
            // Left by another layout, for example: nobody else's rules lead to our tables.
            for stale in family.rules.iter().filter(|rule| is_stale(rule)) {
                done(self.handle.rule().del(stale.clone()).execute().await)
                    .context("delete a stale rule")?;
            }
            let present = family.our_rules();
            for rule in keep_rules(traffic).filter(|rule| !present.contains(rule)) {
                self.add_rule(source, rule).await?;
            }
            Ok(())
        })
    }

    /// Adds the rule alone, in the family of `family`.
    pub(super) fn add_keep_rule(&self, family: IpAddr) -> Result<()> {
        self.runtime.block_on(async {
            let present = self.family(version(family)).await?.our_rules();
            if present.contains(&Rule::Keep) {
                return Ok(());
            }
            self.add_rule(family, Rule::Keep).await
        })
    }

    /// Changes the outbound capture of one family to what the settings say. What is captured before and after
    /// is captured at every moment in between: new rules are added before old ones are removed.
    pub(super) fn set_outbound(
        &self,
        seen: &Seen,
        source: IpAddr,
        traffic: &Traffic,
    ) -> Result<()> {
        let family = seen.family(source);
        self.runtime.block_on(async {
            let wanted = Outbound::new(&seen.deliveries(source), traffic);
            let routes = family.our_routes();
            for route in wanted.routes.difference(&routes) {
                self.add_route(*route).await?;
            }
            let (stale, present) = family.capture_rules();
            if present != wanted.rules {
                // All of them, because their order matters.
                for rule in &wanted.rules {
                    self.add_rule(source, *rule).await?;
                }
                self.delete_rules_of(stale).await?;
            }
            // Read again: some of them have been replaced.
            for message in self.routes(version(source)).await? {
                let route = Route::read(&message);
                if route.is_none_or(|r| r.table == TABLE && !wanted.routes.contains(&r)) {
                    self.delete_route(message).await?;
                }
            }
            Ok(())
        })
    }

    /// Ends the outbound capture in both families.
    pub(super) fn delete_capture(&self) -> Result<()> {
        self.delete_rules(Rule::captures)
    }

    /// Removes all rules and routes in both families.
    pub(super) fn delete_all(&self) -> Result<()> {
        self.delete_capture()?;
        self.delete_rules(|_| true)?;
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                for route in self.routes(family).await? {
                    self.delete_route(route).await?;
                }
            }
            Ok(())
        })
    }

    /// Moves foreign rules behind ours: adds them again in their order, and then deletes the original ones.
    pub(super) fn precede_foreign_rules(&self) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                let foreign = foreign_rules(&self.rules(family).await?);
                ensure!(
                    foreign.len() <= FOREIGN_RULES,
                    "the pod has {} routing rules of priority 0 before ours; remove them",
                    foreign.len()
                );
                for rule in &foreign {
                    let mut request = self.handle.rule().add().replace();
                    *request.message_mut() = rule.clone();
                    request.execute().await.context("add a rule of the pod behind ours")?;
                }
                for rule in foreign {
                    done(self.handle.rule().del(rule).execute().await)
                        .context("delete a rule of the pod before ours")?;
                }
            }
            Ok(())
        })
    }

    /// Removes istio-cni's route and then its rule, in both families.
    pub(super) fn delete_istio_cni(&self) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                for route in self.routes_of(family, TABLE_ISTIO_CNI).await? {
                    let default = route.header.destination_prefix_length == 0;
                    let to_lo = route.attributes.contains(&RouteAttribute::Oif(LOOPBACK_IFINDEX));
                    if route.header.kind == RouteType::Local && default && to_lo {
                        done(self.handle.route().del(route).execute().await)
                            .context("delete istio-cni's route")?;
                    }
                }
            }
            for family in [IpVersion::V4, IpVersion::V6] {
                for rule in self.rules(family).await?.into_iter().filter(is_istio_cnis) {
                    done(self.handle.rule().del(rule).execute().await)
                        .context("delete istio-cni's rule")?;
                }
            }
            Ok(())
        })
    }

    fn delete_rules(&self, which: impl Fn(Rule) -> bool) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                let mut ours = self.family(family).await?.our_rule_messages();
                ours.retain(|(rule, _)| which(*rule));
                self.delete_rules_of(ours).await?;
            }
            Ok(())
        })
    }

    /// Capture rules are deleted before exclusions, so that nothing excluded is captured for a moment. Of
    /// identical rules, the kernel deletes the first.
    async fn delete_rules_of(&self, mut rules: Vec<(Rule, RuleMessage)>) -> Result<()> {
        rules.sort_by_key(|(rule, _)| std::cmp::Reverse(*rule));
        for (rule, message) in rules {
            done(self.handle.rule().del(message).execute().await)
                .with_context(|| format!("delete rule {rule:?}"))?;
        }
        Ok(())
    }

    async fn add_rule(&self, family: IpAddr, rule: Rule) -> Result<()> {
        let mut request = self
            .handle
            .rule()
            .add()
            // Even if an identical one exists: that one is about to be deleted.
            .replace()
            .priority(rule.priority())
            .input_interface(rule.input())
            .fw_mark(rule.mark());
        request = match rule {
            Rule::Exclude(_) => request.table_id(0).action(RuleAction::Goto),
            Rule::Capture(_) => request.table_id(TABLE).action(RuleAction::ToTable),
            // Everything, whatever ranges the other table excludes.
            Rule::Rescue | Rule::Keep | Rule::Virtual(_) => {
                request.table_id(TABLE_KEEP).action(RuleAction::ToTable)
            }
            Rule::Hold(_) => request.table_id(0).action(RuleAction::Blackhole),
            Rule::Landing => request.table_id(0).action(RuleAction::Nop),
        };
        let message = request.message_mut();
        message.header.family = match family {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes.push(RuleAttribute::FwMask(MARK_MASK));
        message.attributes.extend(rule.protocol().map(RuleAttribute::IpProtocol));
        if let Rule::Exclude(_) = rule {
            message.attributes.push(RuleAttribute::Goto(PRIORITY_LANDING));
        }
        if let Some(ports) = rule.ports() {
            let range = RulePortRange { start: ports.first, end: ports.last };
            message.attributes.push(RuleAttribute::DestinationPortRange(range));
        }
        request.execute().await.with_context(|| format!("add rule {rule:?}"))
    }

    async fn add_route(&self, route: Route) -> Result<()> {
        let request = self.handle.route().add(route.message()).replace();
        request.execute().await.with_context(|| format!("add route {route}"))
    }

    async fn delete_route(&self, message: RouteMessage) -> Result<()> {
        done(self.handle.route().del(message).execute().await)
            .with_context(|| format!("delete a route of table {TABLE} or {TABLE_KEEP}"))
    }

    async fn rules(&self, family: IpVersion) -> Result<Vec<RuleMessage>> {
        let rules = self.handle.rule().get(family).execute();
        let matters = |rule: &RuleMessage| {
            priority(rule) <= PRIORITY_LANDING || leads_to_ours(rule) || is_istio_cnis(rule)
        };
        let what = "routing rules of priority 0 or 1, or to our tables";
        collect(what, rules, |rule| Some(rule).filter(matters)).await
    }

    async fn routes(&self, family: IpVersion) -> Result<Vec<RouteMessage>> {
        let mut routes = self.routes_of(family.clone(), TABLE).await?;
        routes.extend(self.routes_of(family, TABLE_KEEP).await?);
        Ok(routes)
    }

    async fn routes_of(&self, family: IpVersion, table: u32) -> Result<Vec<RouteMessage>> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = match family {
            IpVersion::V4 => AddressFamily::Inet,
            IpVersion::V6 => AddressFamily::Inet6,
        };
        filter.attributes.push(RouteAttribute::Table(table));
        let routes = self.handle.route().get(filter).execute();
        let within = |route: &RouteMessage| {
            route.attributes.iter().any(|a| matches!(a, RouteAttribute::Table(t) if *t == table))
        };
        // A kernel without that filter returns the routes of other tables, too.
        let what = format!("routes in table {table}");
        collect(&what, routes, |route| Some(route).filter(within)).await
    }
}

/// Connects to netlink in the namespace of the calling thread.
pub(super) fn connect() -> Result<(tokio::runtime::Runtime, Handle)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("start a runtime for netlink")?;
    let context = runtime.enter();
    // The kernel filters out the routes of other tables.
    let (connection, handle, _) =
        rtnetlink::new_connection_with_strict_check().context("open netlink")?;
    runtime.spawn(connection);
    drop(context);
    Ok((runtime, handle))
}

/// Collects the parts of a kernel's dump that `keep` selects.
async fn collect<T, U>(
    what: &str,
    messages: impl Stream<Item = Result<T, Error>>,
    keep: impl Fn(T) -> Option<U>,
) -> Result<Vec<U>> {
    let mut messages = pin!(messages);
    let mut kept = Vec::new();
    while let Some(message) = messages.next().await {
        let message = match message {
            Err(e) if is_absent(&e) => break,
            message => message.with_context(|| format!("list {what}"))?,
        };
        let Some(message) = keep(message) else { continue };
        ensure!(
            kept.len() < POD_ENTRIES,
            "the pod has more than {POD_ENTRIES} {what}; remove some"
        );
        kept.push(message);
    }
    Ok(kept)
}

fn version(address: IpAddr) -> IpVersion {
    match address {
        IpAddr::V4(_) => IpVersion::V4,
        IpAddr::V6(_) => IpVersion::V6,
    }
}

/// Already there, and already gone, are success.
fn done(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::NetlinkError(e))
            if matches!(-e.raw_code(), libc::EEXIST | libc::ENOENT | libc::ESRCH) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// A kernel without IPv6 has no IPv6 rules, and a table without routes does not exist.
fn is_absent(error: &Error) -> bool {
    let Error::NetlinkError(e) = error else { return false };
    matches!(-e.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENOENT)
}
