//! The commands that do without an agent: `cleanup`, `attach` and `detach`.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use redirect_ebpf::abi::{MARK_PROXY, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint, programs};
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::{binary, finish, succeed, wait_for};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::cluster::{Cluster, SOON, converse, echo};

both_families! {
    cleanup_waits_for_the_agents_end_and_then_puts_everything_back,
    namespace_attaches_itself_and_detaches_itself,
    detach_of_what_is_not_attached_leaves_connections_alone,
}

fn cleanup_waits_for_the_agents_end_and_then_puts_everything_back(family: Family) -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&second)?);
    // Not the kernel's defaults: they have to come back.
    server.netns.set_sysctl("net/ipv4/fwmark_reflect", "1")?;
    second.netns.set_sysctl("net/ipv4/conf/all/src_valid_mark", "1")?;
    let before = (footprint(&server.netns)?, footprint(&second.netns)?);
    node.start_agent()?;
    node.start_proxy()?;
    for pod in [&*server, &second] {
        node.enroll(pod)?;
        node.tell("enroll", &[&pod.to_string()])?;
        node.assert_inbound(client, pod, family)?;
    }
    assert_ne!((footprint(&server.netns)?, footprint(&second.netns)?), before);

    let (done, said) = node.cleanup()?;
    assert!(!done && said.contains(&format!("in use by process {}", node.agent_pid()?)), "{said}");
    for pod in [&*server, &second] {
        node.assert_inbound(client, pod, family)?;
        node.assert_outbound(pod, client, family)?;
    }

    node.stop_agent()?;
    let (done, said) = node.cleanup()?;
    assert!(done, "{said}");
    for pod in [&*server, &second] {
        assert!(said.contains(&format!("restored {}", pod.netns_path().display())), "{said}");
        node.assert_direct(client, pod, family)?;
        node.assert_direct(pod, client, family)?;
    }
    assert_unchanged(&server.netns, &before.0)?;
    assert_unchanged(&second.netns, &before.1)?;
    assert!(!node.bpffs().exists(), "{} is left", node.bpffs().display());
    assert!(!node.state_dir().exists(), "{} is left", node.state_dir().display());

    for _ in 0..2 {
        let (done, said) = node.cleanup()?;
        // Agents of other tests may run on this kernel.
        assert!(done && said.contains("of redirect-agent is left"), "{said}");
    }
    // And all over again: nothing stands in the way of another agent.
    node.start_agent()?;
    for pod in [&*server, &second] {
        node.wait_until_enrolled(pod)?;
        node.assert_inbound(client, pod, family)?;
    }
    Ok(())
}

/// Nobody may look into the directory of the pins.
#[test]
fn cleanup_by_somebody_else_does_not_say_that_nothing_is_left() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.start_agent()?;
    cluster.node.stop_agent()?;
    let Cluster { node, topology, .. } = &cluster;
    // The program may lie where nobody can read it.
    let dir = topology.dir().subdir("for-nobody")?;
    let copy = dir.join("redirect-agent");
    fs::copy(binary("redirect-agent")?, &copy).context("copy the program")?;
    let modes = [(topology.dir().path(), 0o755), (&*dir, 0o755), (topology.bpffs(), 0o700)];
    for (path, mode) in modes {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("set a mode")?;
    }
    let mut command = Command::new(copy);
    command.arg("cleanup").arg("--bpffs-dir").arg(node.bpffs());
    for flag in ["--netns-dir", "--state-dir", "--cni-conf-dir", "--cni-bin-dir"] {
        command.arg(flag).arg(dir.join("none"));
    }
    let (done, said) = finish(command.current_dir("/").uid(65534).gid(65534))?;
    ensure!(!done && said.contains("as root"), "{said}");
    ensure!(node.bpffs().exists());
    Ok(())
}

/// All connections of the node would be redirected, or marked.
#[test]
fn nodes_own_namespace_is_neither_attached_nor_detached() -> Result<()> {
    let Cluster { node, .. } = &Cluster::without_agent(&[])?;
    // An address that it does not have: should it not be refused, it is left alone all the same.
    for (verb, more) in [("attach", &["--address", "203.0.113.1"][..]), ("detach", &[])] {
        let mut command = node.command_without_agent(verb)?;
        command.args(["--netns", "/proc/self/ns/net", "--bpffs-dir"]).arg(node.bpffs()).args(more);
        let (done, said) = finish(&mut command)?;
        ensure!(!done && said.contains("of the node itself"), "{said}");
        ensure!(!node.bpffs().exists(), "{verb} has made {}", node.bpffs().display());
    }
    Ok(())
}

fn detach_of_what_is_not_attached_leaves_connections_alone(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::without_agent(&[])?;
    let _apps = (echo(server)?, echo(client)?);
    let mut open = converse(client, server, family)?;
    let before = footprint(&server.netns)?;
    for _ in 0..2 {
        let mut command = node.command_without_agent("detach")?;
        command.arg("--bpffs-dir").arg(node.bpffs()).arg("--netns").arg(server.netns_path());
        let (done, said) = finish(&mut command)?;
        ensure!(done && said.contains("was not attached"), "{said}");
    }
    assert_unchanged(&server.netns, &before)?;
    let marked = server.netns.output("ss", &["--no-header", "--tcp", "--extended"])?;
    ensure!(!marked.contains("fwmark:"), "{marked}");
    open.exchange(b"still there?")?;
    Ok(())
}

fn listen_v4(port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_mark(MARK_PROXY)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    socket.listen(16)?;
    Ok(socket)
}

/// Whoever attaches by hand may have forgotten the proxy.
#[test]
fn attach_names_the_ports_that_the_proxy_does_not_listen_on() -> Result<()> {
    let Cluster { node, server, .. } = &Cluster::without_agent(&[])?;
    let attach = || {
        let mut command = node.command_without_agent("attach")?;
        command.arg("--bpffs-dir").arg(node.bpffs()).arg("--netns").arg(server.netns_path());
        finish(&mut command)
    };
    let (done, said) = attach()?;
    ensure!(done && said.contains("does not listen on port 15001, 15006, 15008 in"), "{said}");
    // As ztunnel does with IPV6_ENABLED=false.
    let v4_only = server.netns.run(|| {
        let ports = [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE];
        ports.iter().map(|&port| listen_v4(port)).collect::<Result<Vec<_>>>()
    })?;
    let (done, said) = attach()?;
    ensure!(done && said.contains("port 15001 (IPv6), 15006 (IPv6), 15008 (IPv6) in"), "{said}");
    drop(v4_only);
    let _proxy = PlainProxy::start(&server.netns)?;
    let (done, said) = attach()?;
    ensure!(done && !said.contains("15001") && !said.contains("15006"), "{said}");
    Ok(())
}

/// From inside the namespace, as an init container would, and each time twice.
fn namespace_attaches_itself_and_detaches_itself(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::without_agent(&[])?;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let agent = binary("redirect-agent")?;
    let agent = agent.to_str().context("use the agent's path")?;
    let bpffs = node.bpffs().to_str().context("use the bpffs directory")?;
    let own = |verb: &str| {
        let args = [verb, "--netns", "/proc/self/ns/net", "--bpffs-dir", bpffs];
        server.netns.output(agent, &args).map(drop)
    };
    let relayed = |via: Via| -> Result<()> {
        let (from, to) = if via == Via::Inbound { (client, server) } else { (server, client) };
        let conversation = converse(from, to, family)?;
        let peer = conversation.local_addr()?;
        let seen = proxy.relayed_via(via);
        ensure!(seen.iter().any(|r| r.peer == peer), "the proxy saw {seen:?}, not {peer}");
        Ok(())
    };

    own("detach").context("detach what is not attached")?;
    assert_unchanged(&server.netns, &before)?;
    for _ in 0..2 {
        own("attach")?;
        let attached = footprint(&server.netns)?;
        own("attach")?;
        assert_unchanged(&server.netns, &attached)?;
        relayed(Via::Inbound)?;
        relayed(Via::Outbound)?;
        let seen = proxy.relayed().len();

        own("detach")?;
        assert_unchanged(&server.netns, &before)?;
        own("detach")?;
        assert_unchanged(&server.netns, &before)?;
        assert_eq!(programs(&server.netns)?, Vec::<String>::new());
        converse(client, server, family)?;
        converse(server, client, family)?;
        assert_eq!(proxy.relayed().len(), seen, "the proxy is still handed connections");
    }
    assert!(!Path::new(bpffs).exists(), "{bpffs} is left");
    Ok(())
}

#[test]
fn maps_are_shown_with_commands_that_print_them() -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let ask = |arguments: &[&str]| {
        let mut command = node.command_without_agent("maps")?;
        command.arg("--bpffs-dir").arg(node.bpffs()).args(arguments);
        finish(&mut command)
    };
    let (done, table) = ask(&[])?;
    ensure!(done, "{table}");
    let commands: Vec<_> =
        table.lines().filter_map(|line| line.find("bpftool").map(|at| &line[at..])).collect();
    ensure!(commands.len() > 20, "{table}");
    for line in commands {
        let mut words = line.split_whitespace();
        let bpftool = words.next().context("an empty command")?;
        succeed(Command::new(bpftool).args(words))?;
    }
    // bpftool knows the names of what the maps have numbers for.
    let _app = echo(client)?;
    converse(server, client, Family::V4)?;
    for (map, names) in [
        ("pods", &["\"Enrolled\"", "\"PodLabelAmbient\""][..]),
        ("counters", &["\"RedirectedOutbound\""]),
        // A sockhash keeps no names; its values are cookies.
        ("listeners", &["Found 3 elements"]),
    ] {
        let mut bpftool = Command::new("bpftool");
        let dump = succeed(bpftool.args(["map", "dump", "pinned"]).arg(node.bpffs().join(map)))?;
        let dump = String::from_utf8(dump.stdout)?;
        ensure!(names.iter().all(|name| dump.contains(name)), "{map}: {dump}");
        ensure!(!dump.contains("No space left"), "{map}: {dump}");
    }
    let (done, json) = ask(&["-o", "json"])?;
    ensure!(done, "{json}");
    let json: Value = serde_json::from_str(&json)?;
    let entries = |name: &str| {
        let map = json["maps"].as_array()?.iter().find(|map| map["name"] == name)?;
        map["entries"].as_u64()
    };
    // The client is on another node.
    assert_eq!(entries("pods"), Some(1), "{json}");
    // One of each family, and that of the link.
    assert_eq!(entries("addresses"), Some(3), "{json}");
    assert_eq!(entries("listeners"), Some(3), "{json}");
    assert_eq!(entries("hints"), None, "{json}");

    let empty = node.bpffs().join("nothing");
    let mut command = node.command_without_agent("maps")?;
    let (done, said) = finish(command.arg("--bpffs-dir").arg(empty))?;
    ensure!(!done && said.contains("has no maps of the agent"), "{said}");
    Ok(())
}

#[test]
fn log_level_is_changed_while_the_agent_runs_and_ends_by_itself() -> Result<()> {
    let cluster = Cluster::start()?;
    let Cluster { node, server, .. } = &cluster;
    let told = |from: usize| Ok::<_, anyhow::Error>(node.agent_log()?[from..].to_owned());
    let before = node.tell("log-level", &[])?;

    assert_eq!(node.tell("log-level", &["error"])?, "error\n");
    let from = node.agent_log()?.len();
    node.enroll(server)?;
    ensure!(!told(from)?.contains("INFO"), "{}", told(from)?);
    let answer = node.tell("log-level", &["info", "--for", "1s"])?;
    ensure!(answer.starts_with("info, until "), "{answer}");
    ensure!(told(from)?.contains("audit: log-level"), "{}", told(from)?);
    wait_for("the end of the level", SOON, || {
        Ok((node.tell("log-level", &[])? == before).then_some(()))
    })?;
    node.tell("log-level", &["error"])?;
    assert_eq!(node.tell("log-level", &["--reset"])?, before);

    let (done, said) = finish(node.command("log-level")?.arg("a=b=c"))?;
    ensure!(!done && said.contains("give a level, such as debug"), "{said}");
    assert_eq!(node.tell("log-level", &[])?, before);
    Ok(())
}
