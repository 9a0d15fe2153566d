//! What somebody removes behind the agent's back is put back.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::{succeed, wait_for};
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Manifest, Node, SOON, echo};

both_families! {
    what_is_removed_behind_the_agents_back_is_put_back,
    change_is_noticed_when_it_happens,
    rules_of_an_older_agent_are_removed,
    rule_of_the_pod_that_comes_before_ours_is_made_to_follow,
}

const OFTEN: &[&str] = &["--verify-interval", "300ms"];

fn what_is_removed_behind_the_agents_back_is_put_back(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(OFTEN)?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let ip = |what: &str| {
        let flag = if family == Family::V4 { "-4" } else { "-6" };
        let args: Vec<&str> = [flag].into_iter().chain(what.split(' ')).collect();
        server.netns.output("ip", &args).map(drop)
    };
    let pins = node.links(server)?;
    let eth0 = index(server, "eth0")?;
    let removals: [(&str, &dyn Fn() -> Result<()>); 15] = [
        ("the capture rule", &|| ip("rule del table 15001")),
        ("the drain rule", &|| ip("rule del fwmark 0x111/0xfff")),
        ("the guard's rule", &|| ip("rule del fwmark 0xd3/0xfff table 15002")),
        ("the route", &|| ip("route flush table 15001")),
        ("rules and route", &|| {
            ip("rule del table 15001")?;
            ip("rule del table 15002")?;
            ip("route flush table 15001")
        }),
        ("the program on lo", &|| detach(&pins.join("in_1"))),
        ("the program on eth0", &|| detach(&pins.join(format!("in_{eth0}")))),
        ("the guard on eth0", &|| detach(&pins.join(format!("out_{eth0}")))),
        ("sk_lookup", &|| detach(&pins.join("lookup"))),
        ("the pin of sk_lookup", &|| {
            std::fs::remove_file(pins.join("lookup")).context("remove a pin")
        }),
        ("all pins", &|| std::fs::remove_dir_all(&pins).context("remove the pins")),
        ("one sysctl", &|| server.netns.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")),
        ("another sysctl", &|| server.netns.set_sysctl("net/ipv4/conf/all/src_valid_mark", "0")),
        ("a port of the proxy's that is reserved", &|| {
            server.netns.set_sysctl("net/ipv4/ip_local_reserved_ports", "15001")
        }),
        ("the row", &|| delete_row(node, server)),
    ];
    for (what, remove) in removals {
        remove().with_context(|| format!("remove {what}"))?;
        let repaired = wait_for(what, SOON, || {
            let complete = node.pod(server)?.and_then(|p| p.kernel).is_some_and(|k| k.complete);
            Ok((complete && footprint(&server.netns)? == before).then_some(()))
        });
        repaired.with_context(|| format!("now: {:#?}", node.pod(server)))?;
        cluster.assert_redirected(family).with_context(|| format!("after {what} was put back"))?;
    }
    Ok(())
}

/// The timer does not come round in this test.
fn change_is_noticed_when_it_happens(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(&["--verify-interval", "1h"])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    for _ in 0..3 {
        server.netns.output("ip", &[flag, "rule", "del", "table", "15001"])?;
        wait_for("the rule", Duration::from_secs(5), || {
            Ok((footprint(&server.netns)? == before).then_some(()))
        })?;
    }
    server.netns.ip("link add net1 type veth peer name net2\nlink set net1 up")?;
    let pin = node.links(server)?.join(format!("in_{}", index(server, "net1")?));
    wait_for("a program on the new interface", Duration::from_secs(5), || {
        Ok(pin.exists().then_some(()))
    })?;
    cluster.assert_redirected(family)
}

fn rules_of_an_older_agent_are_removed(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    let old = "rule add iif lo fwmark 0x111/0xfff priority 15002 lookup 15001";
    let add: Vec<&str> = [flag].into_iter().chain(old.split(' ')).collect();
    server.netns.output("ip", &add)?;
    node.enroll(server)?;
    let rules = server.netns.output("ip", &[flag, "rule", "show", "priority", "15002"])?;
    assert_eq!(rules.lines().count(), 0, "{rules}");
    cluster.assert_redirected(family)?;
    node.write(&Manifest::of(server).mode("none"))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

fn rule_of_the_pod_that_comes_before_ours_is_made_to_follow(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    let ip = |what: &str| {
        let args: Vec<&str> = [flag].into_iter().chain(what.split(' ')).collect();
        server.netns.output("ip", &args)
    };
    let default = ip("route show default")?;
    let default = default.lines().next().context("no default route")?.trim();
    ip(&format!("route add {default} table 200"))?;
    ip("rule add priority 0 lookup 200")?;
    let before = footprint(&server.netns)?;

    node.enroll(server)?;
    cluster.assert_redirected(family)?;
    let pod = node.pod(server)?.context("no status")?;
    assert!(!pod.counters.contains_key("rescued_outbound"), "{:?}", pod.counters);
    node.write(&Manifest::of(server).mode("none"))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

pub fn index(pod: &Pod, interface: &str) -> Result<String> {
    let line = pod.netns.output("ip", &["-oneline", "link", "show", "dev", interface])?;
    Ok(line.split(':').next().context("no index")?.to_owned())
}

/// As `bpftool` in the hands of somebody who looks for something else.
pub fn detach(pin: &Path) -> Result<()> {
    succeed(Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin)).map(drop)
}

fn delete_row(node: &Node, pod: &Pod) -> Result<()> {
    let octets = u32::try_from(pod.netns.inode()?)?.to_ne_bytes();
    let mut command = Command::new("bpftool");
    command.args(["map", "delete", "pinned"]).arg(node.bpffs().join("pods")).args(["key", "hex"]);
    succeed(command.args(octets.map(|octet| format!("{octet:02x}")))).map(drop)
}
