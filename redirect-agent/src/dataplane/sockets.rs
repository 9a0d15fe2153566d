//! A pod's sockets. Every function here runs inside the pod's namespace, except
//! [`offsets`].

use std::{
    fs,
    io::{self, BufRead, BufReader, Read as _},
    net::IpAddr,
    sync::OnceLock,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::programs::{Iter, SchedClassifier, TestRun as _, TestRunOptions};
use btfparse::{Offset, Readable, TypeInformation};
use redirect_ebpf::abi::{
    self, KernelOffsets, LISTENERS_V4, NEW_LISTENERS, PORT_PROXY_DNS, QUESTION_AT,
};

/// Where the running kernel describes its types.
pub const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Offsets, in the running kernel, of what the programs read from a socket or a packet.
///
/// # Errors
///
/// When the kernel has no BTF, or its structs have no such fields.
pub fn offsets() -> Result<KernelOffsets> {
    // The preflight check and the programs ask for them, and the kernel's BTF is large.
    static OFFSETS: OnceLock<KernelOffsets> = OnceLock::new();
    match OFFSETS.get() {
        Some(known) => Ok(*known),
        None => read_offsets().map(|offsets| *OFFSETS.get_or_init(|| offsets)),
    }
}

fn read_offsets() -> Result<KernelOffsets> {
    let bytes = fs::read(VMLINUX_BTF).with_context(|| {
        format!("read {VMLINUX_BTF}: the kernel must have CONFIG_DEBUG_INFO_BTF")
    })?;
    let btf = TypeInformation::new(&BtfBytes(bytes))
        .map_err(|e| anyhow!("parse {VMLINUX_BTF}: {e:?}"))?;
    let offset_in = |structure: &str, field: &str| -> Result<u32> {
        let id =
            btf.id_of(structure).with_context(|| format!("find {structure} in {VMLINUX_BTF}"))?;
        match btf.offset_of(id, field) {
            Ok((_, Offset::ByteOffset(offset))) => Ok(offset),
            _ => bail!("cannot find {structure}.{field} in {VMLINUX_BTF}{}", option_of(field)),
        }
    };
    let offset = |field| offset_in("sock_common", field);
    Ok(KernelOffsets {
        family: offset("skc_family")?,
        state: offset("skc_state")?,
        local_port: offset("skc_num")?,
        remote_port: offset("skc_dport")?,
        local_v4: offset("skc_rcv_saddr")?,
        remote_v4: offset("skc_daddr")?,
        local_v6: offset("skc_v6_rcv_saddr")?,
        remote_v6: offset("skc_v6_daddr")?,
        net: offset("skc_net")?,
        net_inode: offset_in("net", "ns.inum")?,
        packet_device: offset_in("sk_buff", "dev")?,
        device_net: offset_in("net_device", "nd_net.net")?,
        socket_cgroup: offset_in("sock", "sk_cgrp_data.cgroup")?,
        cgroup_node: offset_in("cgroup", "kn")?,
        node_id: offset_in("kernfs_node", "id")?,
        snd_una: offset_in("tcp_sock", "snd_una")?,
        bytes_acked: offset_in("tcp_sock", "bytes_acked")?,
        snt_isn: offset_in("tcp_request_sock", "snt_isn")?,
        ir_mark: offset_in("inet_request_sock", "ir_mark")?,
    })
}

/// Without which option of the kernel a field is not there.
fn option_of(field: &str) -> &'static str {
    match field {
        "sk_cgrp_data.cgroup" => ": the kernel must have CONFIG_CGROUP_BPF",
        "skc_v6_rcv_saddr" | "skc_v6_daddr" => ": the kernel must have CONFIG_IPV6",
        "skc_net" | "nd_net.net" => ": the kernel must have CONFIG_NET_NS",
        _ => "",
    }
}

struct BtfBytes(Vec<u8>);

impl Readable for BtfBytes {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> btfparse::Result<()> {
        let range = usize::try_from(offset).ok().and_then(|start| {
            let end = start.checked_add(buffer.len())?;
            self.0.get(start..end)
        });
        let bytes = range.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// Whether a UDP socket is bound to the port of the proxy's DNS, in either family.
pub(super) fn dns_listens() -> Result<bool> {
    for path in ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"] {
        if read(path, |table| has_port(table, PORT_PROXY_DNS))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How many TCP connections of the pod's namespace, in either family, have one of `ports` as their local
/// port. TIME_WAIT does not count.
pub(super) fn accepted_at(ports: &[u16]) -> Result<usize> {
    let mut connections = 0;
    for path in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        connections += read(path, |table| connections_at(table, ports))?;
    }
    Ok(connections)
}

/// Reads a table of sockets line by line, because a pod may have very many. On a kernel without IPv6, half of
/// the tables do not exist; they count as empty.
fn read<T: Default>(
    path: &str,
    read: impl FnOnce(BufReader<fs::File>) -> io::Result<T>,
) -> Result<T> {
    match fs::File::open(path).and_then(|file| read(BufReader::new(file))) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        result => result.with_context(|| format!("read {path}")),
    }
}

/// Source: Linux `net/ipv4/tcp_ipv4.c`, `get_tcp4_sock`; `include/net/tcp_states.h`.
fn connections_at(table: impl BufRead, ports: &[u16]) -> io::Result<usize> {
    const NONE: [&str; 3] = ["06", "07", "0A"];
    let ends: Vec<String> = ports.iter().map(|port| format!(":{port:04X}")).collect();
    let mut connections = 0;
    for line in table.lines().skip(1) {
        let line = line?;
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().is_some_and(|local| ends.iter().any(|end| local.ends_with(end)));
        let open = fields.nth(1).is_some_and(|state| !NONE.contains(&state));
        connections += usize::from(local && open);
    }
    Ok(connections)
}

/// Whether a socket of the table has this local port. Source: Linux `net/ipv4/udp.c`,
/// `udp4_format_sock`.
fn has_port(table: impl BufRead, port: u16) -> io::Result<bool> {
    let end = format!(":{port:04X}");
    for line in table.lines().skip(1) {
        if line?.split_whitespace().nth(1).is_some_and(|local| local.ends_with(&end)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Listeners of the proxy, as `find_proxy` returns them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listeners(u32);

impl Listeners {
    /// Whether one of them is new to the programs.
    pub(super) fn are_new(self) -> bool {
        self.0 >> NEW_LISTENERS != 0
    }

    /// Whether there is a listener of this kind for addresses of this family.
    pub(super) fn has(self, kind: u32, like: IpAddr) -> bool {
        let shift = if like.is_ipv4() { LISTENERS_V4 } else { 0 };
        self.0 & (1 << (kind + shift)) != 0
    }
}

/// Runs the program that enters the proxy's listeners into the map.
pub(super) fn find_proxy(program: &SchedClassifier) -> Result<Listeners> {
    // The shortest that the kernel takes; it comes in on `lo` of the thread's namespace.
    let mut packet = [0; 64];
    let found = abi::find_proxy(|question| {
        packet[QUESTION_AT..QUESTION_AT + 4].copy_from_slice(&question.to_ne_bytes());
        let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
        program.test_run(options).map(|ran| ran.return_value.cast_signed())
    });
    found.map(Listeners).context("look for the proxy's listeners")
}

/// Opens an iterator over all TCP sockets of the thread's namespace.
pub(super) fn open(iter: &mut Iter) -> Result<fs::File> {
    let link = iter.attach().context("attach a socket iterator")?;
    let link = iter.take_link(link).context("take the link of a socket iterator")?;
    link.into_file().context("open a socket iterator")
}

/// Runs it and returns how many bytes it wrote. It walks the whole node's table of connections, which takes
/// about a millisecond.
pub(super) fn run(mut iterator: fs::File) -> Result<usize> {
    let mut out = Vec::new();
    iterator.read_to_end(&mut out).context("run a socket iterator")?;
    Ok(out.len())
}

#[cfg(test)]
mod tests {
    use redirect_ebpf::abi::{PORT_INBOUND, PORT_OUTBOUND};

    use super::*;

    #[test]
    fn connections_are_told_from_listeners_and_from_those_that_have_ended() {
        let socket = |local: &str, state: &str| {
            format!(
                "  1: {local} 0A00000A:9C40 {state} 00000000:00000000 00:00000000 00000000  0\n"
            )
        };
        let v4 = socket("0100007F:3A99", "01");
        let v6 = socket("0000000000000000FFFF00000A40000A:3A99", "05");
        let none = ["06", "07", "0A"].map(|state| socket("0100007F:3A99", state)).concat();
        let other = socket("0100007F:0035", "01");
        let table = |sockets: &[&str]| format!("  sl  local_address\n{}", sockets.concat());
        let count = |sockets: &[&str]| {
            connections_at(table(sockets).as_bytes(), &[PORT_INBOUND, PORT_OUTBOUND]).unwrap()
        };
        assert_eq!(count(&[&none, &v4, &other, &v6]), 2);
        assert_eq!(count(&[&none, &other]), 0);
    }

    #[test]
    fn socket_is_found_by_its_local_port_in_either_table() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let v4 = "  1: 0100007F:3ACD 00000000:0000 07 00000000:00000000 00:00000000 00000000  0\n";
        let v6 =
            "  2: 00000000000000000000000001000000:3ACD 00000000000000000000000000000000:0000 07\n";
        let other =
            "  3: 0100007F:0035 0100007F:3ACD 07 00000000:00000000 00:00000000 00000000  0\n";
        for (socket, found) in [(v4, true), (v6, true), (other, false), ("", false)] {
            let table = format!("{head}{socket}");
            assert_eq!(has_port(table.as_bytes(), PORT_PROXY_DNS).unwrap(), found, "{socket}");
        }
    }
}
