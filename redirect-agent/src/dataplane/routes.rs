//! Routes, rules, addresses and interfaces of a pod's network namespace, by netlink. Every function
//! here runs inside it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _};
use redirect_ebpf::abi::{MARK_MASK, MARK_REDIRECTED};
use rtnetlink::{
    Error, Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily, IpProtocol,
        address::{AddressAttribute, AddressFlags, AddressScope},
        link::LinkAttribute,
        route::{RouteAttribute, RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

/// The routing table that delivers everything to `lo`.
pub(super) const TABLE: u32 = 15001;
/// The rule for unmarked TCP of the pod: this is the outbound capture.
const PRIORITY_CAPTURE: u32 = 15001;
/// The rule for redirected connections of a pod that leaves the mesh.
const PRIORITY_KEEP: u32 = 15002;
/// Every interface's index of `lo`. Source: Linux `include/net/flow.h`, `LOOPBACK_IFINDEX`.
pub(super) const LOOPBACK_IFINDEX: u32 = 1;

/// Which connections of the pod take the redirection route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// All that are not marked.
    Capture,
    /// Those that were redirected when the pod left the mesh.
    Keep,
}

impl Rule {
    fn priority(self) -> u32 {
        match self {
            Self::Capture => PRIORITY_CAPTURE,
            Self::Keep => PRIORITY_KEEP,
        }
    }

    fn mark(self) -> u32 {
        match self {
            Self::Capture => 0,
            Self::Keep => MARK_REDIRECTED,
        }
    }
}

/// A connection to the kernel's routing in the namespace that it was opened in.
pub(super) struct Routing {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Routing {
    /// Connects in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("start a runtime for netlink")?;
        let _context = runtime.enter();
        let (connection, handle, _) = rtnetlink::new_connection().context("open netlink")?;
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    /// The interfaces: index → name.
    pub(super) fn interfaces(&self) -> Result<BTreeMap<u32, String>> {
        self.runtime.block_on(async {
            let mut interfaces = BTreeMap::new();
            let mut links = self.handle.link().get().execute();
            while let Some(link) = links.try_next().await.context("list interfaces")? {
                let name = link.attributes.into_iter().find_map(|a| match a {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
                interfaces.insert(link.header.index, name.unwrap_or_default());
            }
            Ok(interfaces)
        })
    }

    /// The addresses of global scope, `lo`'s excepted, in the order of their interfaces.
    pub(super) fn addresses(&self) -> Result<Vec<IpAddr>> {
        self.runtime.block_on(async {
            let mut addresses = Vec::new();
            let mut messages = self.handle.address().get().execute();
            while let Some(message) = messages.try_next().await.context("list addresses")? {
                let tentative = message.attributes.iter().any(|a| {
                    matches!(a, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Dadfailed))
                });
                if message.header.index == LOOPBACK_IFINDEX
                    || message.header.scope != AddressScope::Universe
                    || tentative
                {
                    continue;
                }
                // On a point-to-point interface `Local` is ours and `Address` is the peer's.
                let local = message.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Local(ip) => Some(*ip),
                    _ => None,
                });
                let address = message.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                });
                addresses.extend(local.or(address));
            }
            Ok(addresses)
        })
    }

    /// Adds the redirection route of one family, with the pod's address as the source that a
    /// connection without one takes.
    pub(super) fn add_route(&self, source: IpAddr) -> Result<()> {
        self.runtime.block_on(async {
            let message = match source {
                IpAddr::V4(source) => base::<Ipv4Addr>(RouteMessageBuilder::<Ipv4Addr>::new())
                    .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
                    .pref_source(source)
                    .build(),
                IpAddr::V6(source) => base::<Ipv6Addr>(RouteMessageBuilder::<Ipv6Addr>::new())
                    .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
                    .pref_source(source)
                    .build(),
            };
            self.handle.route().add(message).replace().execute().await.with_context(|| {
                format!("add route table {TABLE}: local default dev lo src {source}")
            })
        })
    }

    /// Removes the redirection routes of both families.
    pub(super) fn delete_routes(&self) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                for route in self.routes(family).await? {
                    done(self.handle.route().del(route).execute().await)
                        .with_context(|| format!("delete route of table {TABLE}"))?;
                }
            }
            Ok(())
        })
    }

    /// Adds a rule for the family of `address`.
    pub(super) fn add_rule(&self, address: IpAddr, rule: Rule) -> Result<()> {
        self.runtime.block_on(async {
            let mut request = self
                .handle
                .rule()
                .add()
                .table_id(TABLE)
                .priority(rule.priority())
                .action(RuleAction::ToTable)
                .input_interface("lo")
                .fw_mark(rule.mark());
            let message = request.message_mut();
            message.header.family = match address {
                IpAddr::V4(_) => AddressFamily::Inet,
                IpAddr::V6(_) => AddressFamily::Inet6,
            };
            message.attributes.push(RuleAttribute::FwMask(MARK_MASK));
            message.attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
            done(request.execute().await).with_context(|| {
                format!("add rule {}: mark {:#x} to table {TABLE}", rule.priority(), rule.mark())
            })
        })
    }

    /// Removes a rule from both families.
    pub(super) fn delete_rule(&self, rule: Rule) -> Result<()> {
        self.runtime.block_on(async {
            for family in [IpVersion::V4, IpVersion::V6] {
                for message in self.rules(family).await? {
                    if is_ours(&message, rule) {
                        done(self.handle.rule().del(message).execute().await)
                            .with_context(|| format!("delete rule {}", rule.priority()))?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Whether the rule is there for the family of `address`.
    pub(super) fn has_rule(&self, address: IpAddr, rule: Rule) -> Result<bool> {
        self.runtime.block_on(async {
            Ok(self.rules(version(address)).await?.iter().any(|message| is_ours(message, rule)))
        })
    }

    /// Whether the redirection route is there for the family of `source`, with that source.
    pub(super) fn has_route(&self, source: IpAddr) -> Result<bool> {
        self.runtime.block_on(async {
            let routes = self.routes(version(source)).await?;
            Ok(routes.iter().any(|route| {
                route.header.kind == RouteType::Local
                    && route
                        .attributes
                        .iter()
                        .any(|a| *a == RouteAttribute::PrefSource(source.into()))
            }))
        })
    }

    async fn rules(&self, family: IpVersion) -> Result<Vec<RuleMessage>> {
        let rules: Result<Vec<_>, Error> = self
            .handle
            .rule()
            .get(family)
            .execute()
            .collect::<Vec<_>>()
            .await
            .into_iter()
            .collect();
        absent_family(rules).context("list rules")
    }

    async fn routes(&self, family: IpVersion) -> Result<Vec<RouteMessage>> {
        let filter = match family {
            IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        let routes: Result<Vec<_>, Error> = self
            .handle
            .route()
            .get(filter)
            .execute()
            .collect::<Vec<_>>()
            .await
            .into_iter()
            .collect();
        let mut routes = absent_family(routes).context("list routes")?;
        routes.retain(|route| route.attributes.contains(&RouteAttribute::Table(TABLE)));
        Ok(routes)
    }
}

fn base<T>(builder: RouteMessageBuilder<T>) -> RouteMessageBuilder<T> {
    builder
        .table_id(TABLE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK_IFINDEX)
}

fn version(address: IpAddr) -> IpVersion {
    match address {
        IpAddr::V4(_) => IpVersion::V4,
        IpAddr::V6(_) => IpVersion::V6,
    }
}

fn is_ours(message: &RuleMessage, rule: Rule) -> bool {
    message.attributes.contains(&RuleAttribute::Table(TABLE))
        && message.attributes.contains(&RuleAttribute::Priority(rule.priority()))
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

/// A kernel without IPv6 has no IPv6 rules.
fn absent_family<T>(result: Result<Vec<T>, Error>) -> Result<Vec<T>, Error> {
    match result {
        Err(Error::NetlinkError(e))
            if matches!(-e.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) =>
        {
            Ok(Vec::new())
        }
        result => result,
    }
}
