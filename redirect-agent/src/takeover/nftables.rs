//! nf_tables over netlink: only what is needed to read and remove foreign tables, so the node needs no `nft`.
//! Every function here runs inside the network namespace.
//!
//! Source: Linux `include/uapi/linux/netfilter/nf_tables.h` and `nfnetlink.h`.

use std::io;

use anyhow::{Context as _, Result, bail, ensure};
use rtnetlink::{
    packet_core::{NetlinkBuffer, NlaBuffer, NlasIterator},
    sys::{Socket, SocketAddr, constants::NETLINK_NETFILTER},
};

/// Source: `NFNL_SUBSYS_NFTABLES`, in the upper byte of a message's type.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;

/// Attributes of a table, of a chain, of a rule: the table's name, and what it is in.
const TABLE: u16 = 1;
const TABLE_USE: u16 = 3;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
const CT_REGISTER: u16 = 1;
const CT_KEY: u16 = 2;
const CT_MARK: u32 = 3;
const CMP_REGISTER: u16 = 1;
const CMP_OPERATION: u16 = 2;
const CMP_DATA: u16 = 3;
const CMP_EQUAL: u32 = 0;
const REGISTER_1: u32 = 1;
const ACCEPT: u32 = 1;

/// Source: Linux `include/uapi/linux/netfilter.h`, `NFPROTO_*`, `NF_INET_LOCAL_OUT`.
const ANY_FAMILY: u8 = 0;
pub(super) const FAMILY_INET: u8 = 1;
pub(super) const FAMILY_IPV4: u8 = 2;
pub(super) const FAMILY_IPV6: u8 = 10;
const HOOK_OUTPUT: u32 = 3;
/// Source: Linux `include/uapi/linux/netfilter_ipv4.h`, `NF_IP_PRI_NAT_DST`.
const PRIORITY_NAT: i32 = -100;

const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP: u16 = 0x300;
const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
const FLAG_CREATE: u16 = 0x400;
const FLAG_APPEND: u16 = 0x800;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
const NESTED: u16 = 1 << 15;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// A table's family and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TableName {
    pub(super) family: u8,
    pub(super) name: String,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) name: TableName,
    /// How many chains, sets and objects are in it.
    pub(super) holds: u32,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) table: TableName,
    pub(super) name: String,
    /// Whether it is attached to a hook.
    pub(super) base: bool,
    /// Whether its policy accepts packets that match no rule.
    pub(super) accepts: bool,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) table: TableName,
    pub(super) chain: String,
    pub(super) handle: u64,
    /// The chain that it jumps to.
    pub(super) jumps_to: Option<String>,
}

/// All tables, chains and rules of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ruleset {
    pub(super) tables: Vec<Table>,
    pub(super) chains: Vec<Chain>,
    pub(super) rules: Vec<Rule>,
}

/// Changes that happen together or not at all.
#[derive(Debug, Default)]
pub(super) struct Batch(Vec<Message>);

impl Batch {
    /// Adds a table whose only purpose is to keep connection tracking and NAT active for connections that are
    /// translated already, when all other tables are gone. Its only rule matters just because it reads the
    /// mark of connections, which keeps them tracked. Source: Linux `net/netfilter/nft_ct.c`,
    /// `nft_ct_get_init`, and `net/netfilter/nf_nat_core.c`, `nf_nat_register_fn`: one chain registers all
    /// hooks.
    pub(super) fn add_keeper(&mut self, table: &TableName, chain: &str, mark: u32) {
        let mut message = Message::new(NEW_TABLE, FLAG_CREATE, table.family);
        message.text(TABLE, &table.name);
        self.0.push(message);

        let mut message = Message::new(NEW_CHAIN, FLAG_CREATE, table.family);
        message.text(TABLE, &table.name);
        message.text(CHAIN_NAME, chain);
        message.nest(CHAIN_HOOK, |hook| {
            hook.number(HOOK_NUMBER, HOOK_OUTPUT);
            hook.put(HOOK_PRIORITY, &PRIORITY_NAT.to_be_bytes());
        });
        message.number(CHAIN_POLICY, ACCEPT);
        message.text(CHAIN_TYPE, "nat");
        self.0.push(message);

        let mut message = Message::new(NEW_RULE, FLAG_CREATE | FLAG_APPEND, table.family);
        message.text(TABLE, &table.name);
        message.text(RULE_CHAIN, chain);
        message.nest(RULE_EXPRESSIONS, |list| {
            list.nest(LIST_ELEMENT, |ct| {
                ct.text(EXPRESSION_NAME, "ct");
                ct.nest(EXPRESSION_DATA, |data| {
                    data.number(CT_REGISTER, REGISTER_1);
                    data.number(CT_KEY, CT_MARK);
                });
            });
            list.nest(LIST_ELEMENT, |compare| {
                compare.text(EXPRESSION_NAME, "cmp");
                compare.nest(EXPRESSION_DATA, |data| {
                    data.number(CMP_REGISTER, REGISTER_1);
                    data.number(CMP_OPERATION, CMP_EQUAL);
                    data.nest(CMP_DATA, |value| value.put(DATA_VALUE, &mark.to_ne_bytes()));
                });
            });
        });
        self.0.push(message);
    }

    /// Deletes a table with everything in it.
    pub(super) fn delete_table(&mut self, table: &TableName) {
        let mut message = Message::new(DELETE_TABLE, 0, table.family);
        message.text(TABLE, &table.name);
        self.0.push(message);
    }

    /// Deletes a rule.
    pub(super) fn delete_rule(&mut self, rule: &Rule) {
        let mut message = Message::new(DELETE_RULE, 0, rule.table.family);
        message.text(TABLE, &rule.table.name);
        message.text(RULE_CHAIN, &rule.chain);
        message.put(RULE_HANDLE, &rule.handle.to_be_bytes());
        self.0.push(message);
    }

    /// Deletes a chain. Its rules, and jumps to it, must be deleted before.
    pub(super) fn delete_chain(&mut self, chain: &Chain) {
        let mut message = Message::new(DELETE_CHAIN, 0, chain.table.family);
        message.text(TABLE, &chain.table.name);
        message.text(CHAIN_NAME, &chain.name);
        self.0.push(message);
    }

    fn bytes(self) -> Vec<u8> {
        let mut bytes = Message::batch(BATCH_BEGIN).finish();
        for message in self.0 {
            bytes.extend(message.finish());
        }
        bytes.extend(Message::batch(BATCH_END).finish());
        bytes
    }

    /// Carries out the batch. An empty batch sends nothing to the kernel.
    pub(super) fn commit(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let socket = open().context("open netlink to netfilter")?;
        send(&socket, &self.bytes()).context("change nf_tables")?;
        // The kernel has answered before `send` returned.
        socket.set_non_blocking(true).context("read netlink")?;
        loop {
            let received = match receive(&socket) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                received => received.context("read netlink")?,
            };
            for (kind, _, payload) in messages(&received)? {
                if kind == MESSAGE_ERROR {
                    error_of(payload).context("change nf_tables")?;
                }
            }
        }
    }
}

/// Reads everything. If nf_tables is a kernel module, this may load it.
pub(super) fn read() -> Result<Ruleset> {
    let mut ruleset = Ruleset::default();
    for (kind, what) in [(GET_TABLE, "tables"), (GET_CHAIN, "chains"), (GET_RULE, "rules")] {
        dump(kind, |family, attributes| ruleset.add(kind, family, attributes))
            .with_context(|| format!("list the {what} of nf_tables"))?;
    }
    Ok(ruleset)
}

impl Ruleset {
    /// Adds what an answer to a request of this kind says.
    fn add(&mut self, kind: u16, family: u8, attributes: &[u8]) -> Result<()> {
        let table = TableName { family, name: text(attributes, TABLE)? };
        match kind {
            GET_TABLE => {
                self.tables.push(Table { name: table, holds: number(attributes, TABLE_USE)? });
            }
            GET_CHAIN => self.chains.push(Chain {
                table,
                name: text(attributes, CHAIN_NAME)?,
                base: find(attributes, CHAIN_HOOK)?.is_some(),
                accepts: match find(attributes, CHAIN_POLICY)? {
                    Some(_) => number(attributes, CHAIN_POLICY)? == ACCEPT,
                    None => true,
                },
            }),
            _ => {
                let handle = find(attributes, RULE_HANDLE)?.and_then(|value| value.try_into().ok());
                self.rules.push(Rule {
                    table,
                    chain: text(attributes, RULE_CHAIN)?,
                    handle: u64::from_be_bytes(handle.context("read a rule without a handle")?),
                    jumps_to: jump(attributes)?,
                });
            }
        }
        Ok(())
    }
}

/// The chain that a rule jumps to.
fn jump(attributes: &[u8]) -> Result<Option<String>> {
    let Some(expressions) = find(attributes, RULE_EXPRESSIONS)? else { return Ok(None) };
    for element in NlasIterator::new(expressions) {
        let element = element.context("read a rule")?;
        let expression = element.value();
        if text(expression, EXPRESSION_NAME)? != "immediate" {
            continue;
        }
        let mut value = Some(expression);
        for kind in [EXPRESSION_DATA, IMMEDIATE_DATA, DATA_VERDICT] {
            value = match value {
                Some(value) => find(value, kind)?,
                None => None,
            };
        }
        if let Some(verdict) = value
            && find(verdict, VERDICT_CHAIN)?.is_some()
        {
            return text(verdict, VERDICT_CHAIN).map(Some);
        }
    }
    Ok(None)
}

/// How many objects of a kind are read: a pod with `NET_ADMIN` may create any number, and the kernel lists each
/// part of them from the beginning again.
const OBJECTS: usize = 16_384;

/// Lists all of one kind, in all families; `each` takes the family and the attributes.
fn dump(kind: u16, mut each: impl FnMut(u8, &[u8]) -> Result<()>) -> Result<()> {
    let socket = match open() {
        // A kernel without netfilter, or without its module loaded, has none.
        Err(e) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(()),
        socket => socket.context("open netlink to netfilter")?,
    };
    let mut request = Message::new(kind, 0, ANY_FAMILY);
    request.set_flags(FLAG_REQUEST | FLAG_DUMP);
    send(&socket, &request.finish())?;
    let mut found = 0;
    let mut counted = |family, attributes: &[u8]| {
        found += 1;
        ensure!(found <= OBJECTS, "there are more than {OBJECTS}");
        each(family, attributes)
    };
    while !take(&receive(&socket)?, &mut counted)? {}
    Ok(())
}

/// Takes a packet of a dump. Returns whether it is the last one.
fn take(received: &[u8], mut each: impl FnMut(u8, &[u8]) -> Result<()>) -> Result<bool> {
    for (kind, flags, payload) in messages(received)? {
        if flags & FLAG_DUMP_INTERRUPTED != 0 {
            bail!("somebody is changing them at the same time");
        }
        match kind {
            MESSAGE_DONE => return Ok(true),
            // A kernel without nf_tables has none.
            MESSAGE_ERROR => match error_of(payload) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(true),
                outcome => outcome?,
            },
            _ => match payload.split_at_checked(FAMILY_HEADER) {
                Some(([family, ..], attributes)) => each(*family, attributes)?,
                _ => bail!("too short a message"),
            },
        }
    }
    Ok(false)
}

fn open() -> io::Result<Socket> {
    Socket::new(NETLINK_NETFILTER)
}

fn send(socket: &Socket, bytes: &[u8]) -> io::Result<()> {
    socket.send_to(bytes, &SocketAddr::new(0, 0), 0).map(drop)
}

fn receive(socket: &Socket) -> io::Result<Vec<u8>> {
    socket.recv_from_full().map(|(bytes, _)| bytes)
}

/// The messages of a packet: type, flags, payload.
fn messages(mut bytes: &[u8]) -> Result<Vec<(u16, u16, &[u8])>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkBuffer::new_checked(bytes).context("read netlink")?;
        all.push((message.message_type(), message.flags(), message.payload()));
        let length = usize::try_from(message.length())?.next_multiple_of(4);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(all)
}

/// What a message of the type `NLMSG_ERROR` says; 0 is an acknowledgement.
fn error_of(payload: &[u8]) -> io::Result<()> {
    let code = payload.first_chunk().copied().map_or(-libc::EPROTO, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) }
}

fn find(attributes: &[u8], kind: u16) -> Result<Option<&[u8]>> {
    for attribute in NlasIterator::new(attributes) {
        let attribute: NlaBuffer<&[u8]> = attribute.context("read netlink")?;
        if attribute.kind() == kind {
            let value = attribute.into_inner();
            let length = usize::from(NlaBuffer::new(value).length());
            return Ok(value.get(4..length));
        }
    }
    Ok(None)
}

/// A character for each byte: a name need not be UTF-8, and has to be the same in a request.
fn text(attributes: &[u8], kind: u16) -> Result<String> {
    let value = find(attributes, kind)?.with_context(|| format!("find attribute {kind}"))?;
    Ok(value.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect())
}

fn number(attributes: &[u8], kind: u16) -> Result<u32> {
    let value = find(attributes, kind)?.and_then(|value| value.try_into().ok());
    Ok(u32::from_be_bytes(value.with_context(|| format!("find attribute {kind}"))?))
}

/// A message under construction.
#[derive(Debug)]
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, family: u8) -> Self {
        Self::start(SUBSYSTEM << 8 | kind, FLAG_REQUEST | FLAG_ACK | flags, family, 0)
    }

    fn batch(kind: u16) -> Self {
        Self::start(kind, FLAG_REQUEST, ANY_FAMILY, SUBSYSTEM)
    }

    fn start(kind: u16, flags: u16, family: u8, resource: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // No sequence number, no port: each request has a socket of its own.
        bytes.extend([0; 8]);
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        debug_assert_eq!(bytes.len(), HEADER + FAMILY_HEADER);
        Self(bytes)
    }

    fn set_flags(&mut self, flags: u16) {
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    fn text(&mut self, kind: u16, value: &str) {
        let bytes = value.chars().map(|c| u8::try_from(c).unwrap_or(b'?'));
        self.put(kind, &bytes.chain([0]).collect::<Vec<u8>>());
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.put(kind | NESTED, &[]);
        fill(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

#[cfg(test)]
mod fuzz {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        fuzz::fuzz,
        takeover::rules::{NATIVE_TABLES, TABLES, removal},
    };

    /// An answer of the kernel.
    fn answer(kind: u16, family: u8, fill: impl FnOnce(&mut Message)) -> Vec<u8> {
        let mut message = Message::new(kind, 0, family);
        fill(&mut message);
        message.finish()
    }

    fn table(family: u8, name: &str, holds: u32) -> Vec<u8> {
        answer(NEW_TABLE, family, |table| {
            table.text(TABLE, name);
            table.number(TABLE_USE, holds);
        })
    }

    fn chain(family: u8, name: &str, base: bool) -> Vec<u8> {
        answer(NEW_CHAIN, family, |chain| {
            chain.text(TABLE, "nat");
            chain.text(CHAIN_NAME, name);
            if base {
                chain.nest(CHAIN_HOOK, |hook| hook.number(HOOK_NUMBER, HOOK_OUTPUT));
                chain.number(CHAIN_POLICY, ACCEPT);
            }
        })
    }

    fn rule(family: u8, chain: &str, handle: u64, jumps_to: &str) -> Vec<u8> {
        answer(NEW_RULE, family, |rule| {
            rule.text(TABLE, "nat");
            rule.text(RULE_CHAIN, chain);
            rule.put(RULE_HANDLE, &handle.to_be_bytes());
            rule.nest(RULE_EXPRESSIONS, |list| {
                list.nest(LIST_ELEMENT, |immediate| {
                    immediate.text(EXPRESSION_NAME, "immediate");
                    immediate.nest(EXPRESSION_DATA, |data| {
                        data.nest(IMMEDIATE_DATA, |value| {
                            value.nest(DATA_VERDICT, |v| v.text(VERDICT_CHAIN, jumps_to));
                        });
                    });
                });
            });
        })
    }

    fn dumps() -> Vec<Vec<u8>> {
        let of = |family| {
            [
                table(family, "nat", 3),
                chain(family, "OUTPUT", true),
                chain(family, "ISTIO_OUTPUT", false),
                rule(family, "OUTPUT", 1, "ISTIO_OUTPUT"),
                rule(family, "ISTIO_OUTPUT", 2, "OTHERS"),
            ]
            .concat()
        };
        let mut keeper = Batch::default();
        keeper.add_keeper(&TableName { family: FAMILY_INET, name: "keeper".to_owned() }, "c", 1);
        let native = table(FAMILY_INET, "istio-ambient-nat", 2);
        let done = Message::start(MESSAGE_DONE, 0, 0, 0).finish();
        vec![of(FAMILY_IPV4), of(FAMILY_IPV6), native, keeper.bytes(), done]
    }

    /// Family, table, chain and handle, as they are on the wire.
    type Wire<'a> = (u8, Option<&'a [u8]>, Option<&'a [u8]>, Option<&'a [u8]>);

    fn wire(payload: &[u8], chain: u16, handle: u16) -> Wire<'_> {
        let (family, attributes) = payload.split_at(FAMILY_HEADER);
        let find = |kind| find(attributes, kind).ok().flatten();
        let name = |kind| Some(find(kind)?.split(|byte| *byte == 0).next().unwrap());
        (family[0], name(TABLE), name(chain), find(handle))
    }

    #[test]
    fn name_that_is_not_utf8_is_the_same_in_a_request() {
        let name = b"\xff\xe4\xb8";
        let bytes = answer(NEW_TABLE, FAMILY_IPV4, |table| table.put(TABLE, name));
        let text = text(&bytes[HEADER + FAMILY_HEADER..], TABLE).unwrap();
        let again = answer(DELETE_TABLE, FAMILY_IPV4, |table| table.text(TABLE, &text));
        assert!(again.ends_with(&[name, &b"\0"[..]].concat()), "{again:?}");
    }

    /// A pod that has NET_ADMIN decides what is in a dump.
    #[test]
    fn removal_names_only_what_was_in_the_dump_and_is_istio_cnis() {
        fuzz!(&dumps(), |bytes| {
            let Ok(messages) = messages(bytes) else { return };
            let mut ruleset = Ruleset::default();
            let (mut chains, mut rules) = (BTreeSet::new(), BTreeSet::new());
            for (kind, _, payload) in messages {
                let Some(([family, ..], attributes)) = payload.split_at_checked(FAMILY_HEADER)
                else {
                    continue;
                };
                let (asked, known) = match kind & 0xff {
                    NEW_TABLE => (GET_TABLE, None),
                    NEW_CHAIN => (GET_CHAIN, Some((&mut chains, CHAIN_NAME, u16::MAX))),
                    NEW_RULE => (GET_RULE, Some((&mut rules, RULE_CHAIN, RULE_HANDLE))),
                    _ => continue,
                };
                if ruleset.add(asked, *family, attributes).is_err() {
                    continue;
                }
                if let Some((known, chain, handle)) = known {
                    known.insert(wire(payload, chain, handle));
                }
            }
            let sent = removal(&ruleset).batch(true).bytes();
            for (kind, _, payload) in super::messages(&sent).unwrap() {
                match kind & 0xff {
                    BATCH_BEGIN | BATCH_END => continue,
                    DELETE_RULE => assert!(rules.contains(&wire(payload, RULE_CHAIN, RULE_HANDLE))),
                    DELETE_CHAIN => assert!(chains.contains(&wire(payload, CHAIN_NAME, u16::MAX))),
                    kind => assert_eq!(kind, DELETE_TABLE),
                }
                let name = text(&payload[FAMILY_HEADER..], TABLE).unwrap();
                assert!(TABLES.contains(&&*name) || NATIVE_TABLES.contains(&&*name), "{name}");
            }
        });
    }

    #[test]
    fn packet_of_a_dump_ends_it_or_not_or_is_an_error() {
        fuzz!(&dumps(), |bytes| {
            let mut ruleset = Ruleset::default();
            for kind in [GET_TABLE, GET_CHAIN, GET_RULE] {
                if let Err(error) =
                    take(bytes, |family, attributes| ruleset.add(kind, family, attributes))
                {
                    assert!(!format!("{error:#}").is_empty());
                }
            }
        });
    }
}
