//! Kernels without tcx: our programs are clsact filters, beside those of others.

use anyhow::{Context as _, Result, ensure};
use aya::programs::TcAttachType;
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, filters, footprint, programs};
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::Attached;
use redirect_tests::topology::{Pod, Topology};

use crate::{PORT, Pair, assert_direct, assert_relayed, echo};

both_families! {
    clsact_filters_of_others_run_after_ours_and_outlive_them,
    clsact_filter_that_comes_before_ours_is_made_to_follow,
    qdisc_that_is_deleted_with_our_filters_is_made_again,
    other_qdisc_in_the_place_of_clsact_is_named,
    clsact_filter_that_has_our_priority_for_one_protocol_is_named,
}

/// A BPF filter that accepts everything, so that none after it runs. It comes before those of its priority.
const ACCEPT: &str = "pref 1 protocol all bpf direct-action bytecode 1,6~0~0~0";
/// One after ours that lets everything pass, and one that drops everything.
const PASS: &str = "pref 2 protocol all bpf direct-action bytecode 1,6~0~0~0";
const DROP: &str = "pref 3 protocol all bpf direct-action bytecode 1,6~0~0~2";
const DIRECTIONS: [&str; 2] = ["ingress", "egress"];

/// Runs `tc` in the pod. Its bytecode is one argument with spaces: `~` stands for them here.
fn tc(pod: &Pod, command: &str) -> Result<String> {
    let args: Vec<String> = command.split(' ').map(|word| word.replace('~', " ")).collect();
    pod.netns.output("tc", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn add(pod: &Pod, filter: &str) -> Result<()> {
    for direction in DIRECTIONS {
        tc(pod, &format!("filter add dev eth0 {direction} {filter}"))?;
    }
    Ok(())
}

/// Calls from the client to the server pass the server's proxy.
fn assert_redirected(pair: &Pair, family: Family) -> Result<()> {
    let Pair { client, server, .. } = pair;
    let proxy = PlainProxy::start(&server.netns)?;
    let _app = echo(server, family)?;
    let to = server.addr(family, PORT);
    let inbound = Call::to(to).open(&client.netns)?;
    assert_eq!(inbound.answer().by, server.name);
    assert_relayed(&proxy, Via::Inbound, &inbound, to)?;
    let _app = echo(client, family)?;
    let to = client.addr(family, PORT);
    let outbound = Call::to(to).open(&server.netns)?;
    assert_eq!(outbound.answer().by, client.name);
    assert_relayed(&proxy, Via::Outbound, &outbound, to)
}

/// The names of the filters of `eth0` that run first, in and out.
fn firsts(pod: &Pod) -> Result<Vec<String>> {
    pod.netns.run(|| {
        let first = |at| Ok(filters("eth0", at)?.into_iter().next().unwrap_or_default());
        [TcAttachType::Ingress, TcAttachType::Egress].into_iter().map(first).collect()
    })
}

fn attach<'a>(topology: &Topology, server: &'a Pod) -> Result<Attached<'a>> {
    Attached::by_clsact(topology, server)
}

fn clsact_filters_of_others_run_after_ours_and_outlive_them(family: Family) -> Result<()> {
    let pair = &Pair::new()?;
    let Pair { client, server, topology } = pair;
    tc(server, "qdisc add dev eth0 clsact")?;
    add(server, ACCEPT)?;
    add(server, PASS)?;
    let before = footprint(&server.netns)?;

    let attached = attach(topology, server)?;
    assert_eq!(firsts(server)?, ["redirect_ext", "redirect_out"]);
    assert_redirected(pair, family)?;

    attached.detach()?;
    assert_unchanged(&server.netns, &before)?;
    let _app = echo(server, family)?;
    assert_direct(client, server.addr(family, PORT), &server.name)
}

fn clsact_filter_that_comes_before_ours_is_made_to_follow(family: Family) -> Result<()> {
    let pair = &Pair::new()?;
    let Pair { client, server, topology } = pair;
    let before = footprint(&server.netns)?;
    let attached = attach(topology, server)?;
    add(server, DROP)?;
    let app = echo(server, family)?;
    let to = server.addr(family, PORT);
    assert!(Call::to(to).open(&client.netns).is_err(), "the filter after ours does not run");
    drop(app);
    add(server, PASS)?;
    assert_redirected(pair, family)?;
    // Twice: each time another handle is free.
    for _ in 0..2 {
        add(server, ACCEPT)?;
        assert_ne!(firsts(server)?, ["redirect_ext", "redirect_out"]);
        attached.again()?;
        assert_eq!(firsts(server)?, ["redirect_ext", "redirect_out"]);
        let ours = programs(&server.netns)?;
        let guards = ours.iter().filter(|name| name.starts_with("redirect_out")).count();
        assert_eq!(guards, 1, "{ours:?}");
        assert_redirected(pair, family)?;
    }
    attached.detach()?;
    // The qdisc was ours, but is in use.
    let left = programs(&server.netns)?;
    assert!(!left.is_empty() && !left.iter().any(|name| name.starts_with("redirect_")), "{left:?}");
    tc(server, "qdisc del dev eth0 clsact")?;
    assert_unchanged(&server.netns, &before)
}

fn qdisc_that_is_deleted_with_our_filters_is_made_again(family: Family) -> Result<()> {
    let pair = &Pair::new()?;
    let Pair { server, topology, .. } = pair;
    let before = footprint(&server.netns)?;
    let attached = attach(topology, server)?;
    let attached_as = footprint(&server.netns)?;
    assert_redirected(pair, family)?;
    for interface in ["eth0", "lo"] {
        tc(server, &format!("qdisc del dev {interface} clsact"))?;
    }
    attached.again()?;
    assert_unchanged(&server.netns, &attached_as)?;
    assert_redirected(pair, family)?;
    attached.detach()?;
    assert_unchanged(&server.netns, &before)
}

fn other_qdisc_in_the_place_of_clsact_is_named(_: Family) -> Result<()> {
    let Pair { server, topology, .. } = &Pair::new()?;
    tc(server, "qdisc add dev eth0 ingress")?;
    let before = footprint(&server.netns)?;
    refused(topology, server, "interface eth0: it has a qdisc of kind ingress")?;
    assert_unchanged(&server.netns, &before)
}

fn clsact_filter_that_has_our_priority_for_one_protocol_is_named(_: Family) -> Result<()> {
    let Pair { server, topology, .. } = &Pair::new()?;
    tc(server, "qdisc add dev eth0 clsact")?;
    tc(
        server,
        "filter add dev eth0 egress pref 1 protocol ip bpf direct-action bytecode 1,6~0~0~0",
    )?;
    let before = footprint(&server.netns)?;
    refused(topology, server, "give it a later priority")?;
    assert_unchanged(&server.netns, &before)
}

/// Whoever is told why has the pod as it was afterwards.
fn refused(topology: &Topology, server: &Pod, why: &str) -> Result<()> {
    let error = attach(topology, server).map(drop).err().context("it was attached")?;
    let said = format!("{error:#}");
    ensure!(said.contains(why), "not {why:?}, but: {said}");
    Ok(())
}
