//! Pods that istio-cni redirects: left alone, or redirected by both and taken over with no connection lost.

use std::fs::{self, File};
use std::net::{Ipv6Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_agent::membership::Reason;
use redirect_agent::output::PodState;
use redirect_agent::zds::{Server, Workload};
use redirect_tests::app::Conversation;
use redirect_tests::both_families;
use redirect_tests::footprint::{Footprint, assert_unchanged, footprint};
use redirect_tests::hbone::Direction;
use redirect_tests::istio_cni::{Backend, feed};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::api_server::Managed;
use crate::cluster::{Cluster, Manifest, Node, SOON, converse, echo, now};
use crate::dns;
use crate::health::assert_has;
use crate::load::Load;

both_families! {
    pod_with_rules_of_iptables_nft_is_taken_over_under_load,
    pod_with_rules_of_native_nftables_is_taken_over_under_load,
    dns_is_answered_all_the_while,
    rules_of_others_beside_istio_cnis_stay,
    rules_of_iptables_legacy_are_named_and_stay,
    rules_that_istio_cni_adds_to_a_pod_in_the_mesh_are_told_of_and_removed,
    cluster_is_told_what_becomes_of_a_pod_and_its_peers_notice_nothing,
    translated_connections_are_refused_when_their_translation_is_lost,
    agent_that_dies_meanwhile_is_succeeded_by_one_that_goes_on,
    takeover_that_stopped_half_way_is_completed,
    cleanup_completes_a_takeover,
    pod_that_istio_cni_redirects_is_left_alone_until_that_lets_go,
    pod_that_left_the_mesh_with_istio_cnis_rules_is_freed_of_them,
}

/// What has pods redirected that istio-cni redirects, too.
pub const BESIDE: &str = "--beside-istio-cni";
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// All of nf_tables in a namespace.
pub fn ruleset(netns: &Netns) -> Result<String> {
    netns.output("nft", &["list", "ruleset"])
}

/// What is in the tables of `iptables-legacy`: rules, chains that somebody has made, policies but
/// `ACCEPT`.
fn legacy_rules(netns: &Netns) -> Result<String> {
    let v4 = netns.output("iptables-legacy-save", &[])?;
    let all = v4 + &netns.output("ip6tables-legacy-save", &[])?;
    let lines = all.lines().filter(|line| {
        line.starts_with('-') || line.starts_with(':') && !line.contains(" ACCEPT ")
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Whether any rule or chain of istio-cni's is left.
pub fn has_istio_cnis(netns: &Netns) -> Result<bool> {
    Ok((ruleset(netns)? + &legacy_rules(netns)?).to_lowercase().contains("istio"))
}

/// istio-cni's agent, as far as ztunnel sees it.
struct IstioCni {
    _runtime: Runtime,
    shutdown: CancellationToken,
}

impl IstioCni {
    /// Tells the proxies of a pod.
    fn serve(socket: &Path, pod: &Pod) -> Result<Self> {
        let runtime = Runtime::new().context("start a runtime")?;
        let server = runtime.block_on(async { Server::bind(socket) }).context("bind ZDS")?;
        let (handle, shutdown) = (server.handle(), CancellationToken::new());
        runtime.spawn(server.run(shutdown.clone().cancelled_owned()));
        let workload = Workload {
            uid: format!("uid-of-{}-{}", pod.namespace, pod.name),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            service_account: pod.name.clone(),
        };
        let netns = Arc::new(File::open(pod.netns.path()).context("open the pod")?.into());
        runtime.block_on(handle.add(workload, netns)).context("add the pod")?;
        Ok(Self { _runtime: runtime, shutdown })
    }
}

impl Drop for IstioCni {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// The pod `server` is in the mesh by istio-cni, whose agent then goes away; the proxy stays.
pub fn migrating(backend: Backend, flags: &[&str], mode: &str) -> Result<(Cluster, Footprint)> {
    let mut cluster = Cluster::without_agent(flags)?;
    let fresh = footprint(&cluster.server.netns)?;
    cluster.node.write(&annotated(&cluster.server, mode))?;
    redirect(&mut cluster, backend)?;
    Ok((cluster, fresh))
}

/// The pod as istio-cni has left it.
fn annotated(pod: &Pod, mode: &str) -> Manifest {
    let annotation = "ambient.istio.io/redirection";
    Manifest::of(pod).mode(mode).with("/metadata/annotations", annotation, json!("enabled"))
}

fn redirect(cluster: &mut Cluster, backend: Backend) -> Result<()> {
    let Cluster { node, server, .. } = cluster;
    let web = node.manifests().join("web.json");
    fs::write(web, dns::service().to_string()).context("write a service")?;
    fs::create_dir_all(node.zds_socket().parent().context("no directory")?)?;
    let istio_cni = IstioCni::serve(&node.zds_socket(), server)?;
    node.start_proxy()?;
    backend.redirect(&server.netns)?;
    drop(istio_cni);
    Ok(())
}

/// Whether the agent has ever written that a pod's peers are not to speak HBONE to it, or anything.
fn published(node: &Node, pod: &Pod) -> Option<String> {
    let name = format!("{}_{}.json", pod.namespace, pod.name);
    fs::read_to_string(node.manifests().join(".status").join(name)).ok()
}

/// Waits until nothing of istio-cni's is left in a pod.
fn wait_until_clean(pod: &Pod) -> Result<()> {
    wait_for("nothing of istio-cni's to be left", SOON, || {
        let rules =
            pod.netns.output("ip", &["rule"])? + &pod.netns.output("ip", &["-6", "rule"])?;
        let routes = pod.netns.output("ip", &["route", "show", "table", "all"])?
            + &pod.netns.output("ip", &["-6", "route", "show", "table", "all"])?;
        let clean = !rules.contains("32764:") && !routes.contains("table 100 ");
        let empty = ruleset(&pod.netns)?.is_empty() && legacy_rules(&pod.netns)?.is_empty();
        Ok((clean && empty).then_some(()))
    })
    .with_context(|| {
        format!("what is left: {:?}, {:?}", ruleset(&pod.netns), legacy_rules(&pod.netns))
    })
}

/// Waits until the agent redirects the pod, and takes it over; what `takeover` says of it.
fn take_over(node: &Node, pod: &Pod) -> Result<String> {
    node.wait_for_pod("to be redirected by both", pod, |p| {
        p.state == PodState::Degraded && p.kernel.as_ref().is_some_and(|k| k.complete)
    })?;
    let (done, said) = node.take_over(&[])?;
    ensure!(done, "{said}");
    node.wait_for_pod("to be redirected by ours alone", pod, |p| p.state == PodState::Enrolled)?;
    ensure!(!has_istio_cnis(&pod.netns)?, "{}", ruleset(&pod.netns)?);
    Ok(said)
}

/// The same for a pod that has no redirected connections any more.
fn take_over_wholly(node: &Node, pod: &Pod) -> Result<()> {
    take_over(node, pod)?;
    take_over_rest(node, pod)
}

/// What is left of a takeover when the last connection has ended.
pub fn take_over_rest(node: &Node, pod: &Pod) -> Result<()> {
    wait_for("nothing of it to be left", SOON, || {
        let (done, said) = node.take_over(&[])?;
        ensure!(done, "{said}");
        Ok(said.contains("nothing of istio-cni's").then_some(()))
    })?;
    wait_until_clean(pod)
}

/// Opens connections in both directions and checks that the proxy has them by istio-cni's rules.
pub fn open_by_istio_cni(cluster: &Cluster, family: Family) -> Result<[Conversation; 2]> {
    let Cluster { node, server, client, .. } = cluster;
    let since = now()?;
    let outbound = converse(server, client, family)?;
    let inbound = converse(client, server, family)?;
    for (conversation, direction) in
        [(&outbound, Direction::Outbound), (&inbound, Direction::InboundPlaintext)]
    {
        let records = node.records_of(conversation, since)?;
        ensure!(records.iter().any(|r| r.direction == direction), "no {direction:?}: {records:?}");
    }
    Ok([outbound, inbound])
}

fn taken_over_under_load(backend: Backend, family: Family) -> Result<()> {
    let (mut cluster, fresh) = migrating(backend, &[BESIDE], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let mut open = open_by_istio_cni(&cluster, family)?;

    let Cluster { node, server, client, .. } = &mut cluster;
    let load = Load::between(client, server, &[family]).keeping_old();
    let (_, calls) = load.during(|| {
        node.start_agent()?;
        let before = ruleset(&server.netns)?.lines().count();
        node.wait_for_state(server, PodState::Degraded)?;
        let (dry, said) = node.take_over(&["--dry-run"])?;
        ensure!(dry && said.contains("would be taken over"), "{said}");
        assert_eq!(ruleset(&server.netns)?.lines().count(), before);
        let said = take_over(node, server)?;
        ensure!(said.contains("taken over"), "{said}");
        node.assert_outbound(server, client, family)?;
        node.assert_inbound(client, server, family)
    })?;
    assert!(calls > 20, "{calls} calls are no load");
    assert_ne!(published(node, server).as_deref(), Some("{}"));

    // They live on, by translation, for as long as they like.
    for conversation in &mut open {
        conversation.exchange(b"still there?")?;
    }
    let (done, said) = node.take_over(&["-o", "json"])?;
    ensure!(done && said.contains("\"open\""), "{said}");
    let kept = ruleset(&server.netns)?;
    assert!(kept.contains("redirect-agent-nat") && kept.lines().count() < 10, "{kept}");
    let [outbound, mut inbound] = open;
    drop(outbound);
    inbound.exchange(b"still there?")?;
    assert!(ruleset(&server.netns)?.contains("redirect-agent-nat"));
    drop(inbound);
    wait_for("the last of it to go", SOON, || {
        let (done, said) = node.take_over(&[])?;
        ensure!(done, "{said}");
        Ok((!said.contains("connections open")).then_some(()))
    })?;
    wait_until_clean(server)?;
    cluster.assert_redirected(family)?;

    // As a pod that has only ever had ours.
    let Cluster { node, server, client, .. } = &cluster;
    let taken_over = footprint(&server.netns)?;
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &fresh)?;
    node.assert_direct(server, client, family)?;
    node.assert_direct(client, server, family)?;
    node.enroll(server)?;
    assert_unchanged(&server.netns, &taken_over)?;
    assert_eq!(ruleset(&server.netns)?, "");
    let (done, said) = node.take_over(&[])?;
    ensure!(done && said == "nothing of istio-cni's is in any pod of this node\n", "{said}");
    Ok(())
}

fn pod_with_rules_of_iptables_nft_is_taken_over_under_load(family: Family) -> Result<()> {
    taken_over_under_load(Backend::IptablesNft, family)
}

fn pod_with_rules_of_native_nftables_is_taken_over_under_load(family: Family) -> Result<()> {
    taken_over_under_load(Backend::NativeNftables, family)
}

fn dns_is_answered_all_the_while(family: Family) -> Result<()> {
    let (mut cluster, _) = migrating(Backend::IptablesNft, &[BESIDE], "ambient")?;
    let Cluster { node, server, .. } = &mut cluster;
    let (netns, service) = (&server.netns, [dns::service_ip(family)]);
    // Nobody is there: the proxy answers, or nobody.
    let resolver = match family {
        Family::V4 => "203.0.113.1".parse()?,
        Family::V6 => "2001:db8::1".parse()?,
    };
    let done = &AtomicBool::new(false);
    let asks = |ask: &dyn Fn() -> Result<()>| {
        let mut asked = 0;
        while !done.load(Ordering::Relaxed) {
            ask().with_context(|| format!("after {asked} queries"))?;
            asked += 1;
        }
        Ok::<usize, anyhow::Error>(asked)
    };
    let asked = thread::scope(|scope| {
        let new_sockets = scope.spawn(|| {
            asks(&|| {
                // One that istio-cni's rules translate may be lost when they go; resolvers ask again.
                let ask = || dns::ask(netns, resolver, dns::SERVICE, PATIENCE);
                let answer = ask()?.map_or_else(ask, |answer| Ok(Some(answer)))?;
                ensure!(answer.context("no answer")?.1 == service, "another answer");
                Ok(())
            })
        });
        let connections = scope.spawn(|| {
            asks(&|| {
                // One that istio-cni's rules translate may end while they go, and is opened again.
                let mut failed = None;
                let answer =
                    wait_for("a connection to the resolver", Duration::from_secs(1), || {
                        let asked = dns::connect(netns, resolver).and_then(|mut stream| {
                            dns::ask_tcp(&mut stream, dns::SERVICE, resolver)
                        });
                        Ok(asked.map_err(|error| failed = Some(error)).ok())
                    });
                ensure!(answer.with_context(|| format!("{failed:?}"))? == service);
                Ok(())
            })
        });
        let one_socket = scope.spawn(|| {
            let socket = netns.run(|| dns::connected(resolver))?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            asks(&|| {
                // As resolvers do, it asks once more.
                let answer = match dns::exchange(&socket, dns::SERVICE, resolver)? {
                    None => dns::exchange(&socket, dns::SERVICE, resolver)?,
                    answer => answer,
                };
                ensure!(answer.context("no answer")?.1 == service, "another answer");
                Ok(())
            })
        });
        let taken_over = (|| {
            node.start_agent()?;
            take_over_wholly(node, server)
        })();
        done.store(true, Ordering::Relaxed);
        let mut asked = Vec::new();
        for asking in [new_sockets, connections, one_socket] {
            asked.push(asking.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        taken_over.map(|()| asked)
    })?;
    assert!(asked.iter().all(|asked| *asked > 100), "{asked:?} queries are no load");
    Ok(())
}

fn rules_of_iptables_legacy_are_named_and_stay(family: Family) -> Result<()> {
    let (mut cluster, _) = migrating(Backend::IptablesLegacy, &[BESIDE], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.start_agent()?;
    cluster.node.wait_for_state(&cluster.server, PodState::Degraded)?;
    let before = legacy_rules(&cluster.server.netns)?;
    let (done, said) = cluster.node.take_over(&[])?;
    ensure!(!done && said.contains("start the pod anew"), "{said}");
    assert_eq!(legacy_rules(&cluster.server.netns)?, before);
    cluster.assert_redirected(family)
}

fn rules_that_istio_cni_adds_to_a_pod_in_the_mesh_are_told_of_and_removed(
    family: Family,
) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let Cluster { node, server, .. } = &cluster;
    let before = footprint(&server.netns)?;
    for backend in [Backend::IptablesNft, Backend::NativeNftables] {
        backend.redirect(&server.netns)?;
        node.wait_for_pod("to have both told of", server, |p| {
            p.state == PodState::Degraded
                && p.message.as_ref().is_some_and(|m| m.contains("redirect-agent takeover"))
        })?;
        cluster.assert_redirected(family)?;
        take_over_wholly(node, server)?;
        assert_unchanged(&server.netns, &before)?;
        cluster.assert_redirected(family)?;
    }
    Ok(())
}

fn rules_of_others_beside_istio_cnis_stay(family: Family) -> Result<()> {
    let (mut cluster, _) = migrating(Backend::IptablesNft, &[BESIDE], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let netns = &cluster.server.netns;
    for program in ["iptables-nft", "ip6tables-nft"] {
        let add = |args: &str| netns.output(program, &args.split(' ').collect::<Vec<_>>());
        add("-t nat -A OUTPUT -p tcp --dport 81 -j REDIRECT --to-ports 8080")?;
        add("-t mangle -N OTHERS")?;
        add("-t mangle -A PREROUTING -j OTHERS")?;
        add("-t filter -A INPUT -p tcp --dport 82 -j DROP")?;
    }
    cluster.node.start_agent()?;
    take_over(&cluster.node, &cluster.server)?;
    cluster.node.take_over(&[])?;
    cluster.assert_redirected(family)?;
    let left = ruleset(netns)?;
    for theirs in ["dport 81", "jump OTHERS", "dport 82"] {
        assert_eq!(left.matches(theirs).count(), 2, "{theirs}: {left}");
    }
    // Nothing of others is in this one.
    assert!(!left.contains("table ip raw"), "{left}");
    Ok(())
}

fn cluster_is_told_what_becomes_of_a_pod_and_its_peers_notice_nothing(
    family: Family,
) -> Result<()> {
    let mut managed = Managed::without_agent()?;
    managed.put(&annotated(&managed.cluster.server, "ambient"));
    redirect(&mut managed.cluster, Backend::NativeNftables)?;
    let _apps = (echo(&managed.cluster.server)?, echo(&managed.cluster.client)?);
    // Free a moment ago, and nothing else here takes ports of this host.
    let address = TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?.local_addr()?;
    managed.cluster.node.serve_health(address);
    managed.cluster.node.start_agent()?;
    let told = managed.wait_for_event(&managed.cluster.server, "EnrollmentFailed")?;
    assert!(told.contains("istio-cni redirects this pod"), "{told}");
    assert_has(address, "redirect_istio_cni_pods 1")?;

    managed.cluster.node.stop_agent()?;
    managed.cluster.node.set_flags(&[BESIDE]);
    managed.cluster.node.kill_proxy()?;
    managed.cluster.node.start_agent()?;
    let Cluster { node, server, .. } = &managed.cluster;
    node.wait_for_pod("to wait for a proxy", server, |p| {
        p.message.as_ref().is_some_and(|m| m.contains("no proxy is connected"))
    })?;
    assert!(ruleset(&server.netns)?.contains("istio-ambient-nat"));
    managed.cluster.node.start_proxy()?;
    managed.wait_for_event(&managed.cluster.server, "Enrolled")?;
    take_over_wholly(&managed.cluster.node, &managed.cluster.server)?;
    assert_has(address, "redirect_istio_cni_pods 0")?;
    managed.cluster.assert_redirected(family)?;
    assert_eq!(managed.redirection(&managed.cluster.server).as_deref(), Some("enabled"));
    assert_eq!(managed.patches(), 0);
    Ok(())
}

fn translated_connections_are_refused_when_their_translation_is_lost(family: Family) -> Result<()> {
    let (mut cluster, _) = migrating(Backend::IptablesNft, &[BESIDE], "ambient")?;
    let (_server, app) = (echo(&cluster.server)?, echo(&cluster.client)?);
    let [mut outbound, mut inbound] = open_by_istio_cni(&cluster, family)?;
    cluster.node.start_agent()?;
    take_over(&cluster.node, &cluster.server)?;
    let netns = &cluster.server.netns;
    outbound.exchange(b"still there?")?;
    inbound.exchange(b"still there?")?;

    // What the table is for, and that nothing of a connection goes on without the proxy.
    let accepted = app.accepted().len();
    netns.output("nft", &["delete", "table", "inet", "redirect-agent-nat"])?;
    ensure!(outbound.exchange(b"in plaintext?").is_err(), "it goes on without translation");
    ensure!(inbound.exchange(b"in plaintext?").is_err(), "it goes on without translation");
    assert_eq!(app.accepted().len(), accepted);
    cluster.assert_redirected(family)
}

fn agent_that_dies_meanwhile_is_succeeded_by_one_that_goes_on(family: Family) -> Result<()> {
    let (mut cluster, fresh) = migrating(Backend::IptablesNft, &[BESIDE], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let mut open = open_by_istio_cni(&cluster, family)?;
    for _ in 0..4 {
        // Wherever it is by then.
        let mut agent = cluster.node.spawn_agent()?;
        for conversation in &mut open {
            conversation.exchange(b"still there?")?;
        }
        cluster.assert_redirected(family)?;
        agent.kill()?;
        cluster.assert_redirected(family)?;
    }
    cluster.node.start_agent()?;
    take_over(&cluster.node, &cluster.server)?;
    cluster.node.stop_agent()?;
    // The flag is for those that are not taken over yet.
    cluster.node.set_flags(&[]);
    cluster.node.start_agent()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    for mut conversation in open {
        conversation.exchange(b"still there?")?;
    }
    cluster.assert_redirected(family)?;
    cluster.node.stop_agent()?;
    let (cleaned, said) = cluster.node.cleanup()?;
    ensure!(cleaned, "{said}");
    assert_eq!(ruleset(&cluster.server.netns)?, "");
    assert_unchanged(&cluster.server.netns, &fresh)
}

/// Where a takeover was killed: the rules are gone, and their sign is there.
fn stop_half_way(netns: &Netns) -> Result<()> {
    let keeper = "flush ruleset
        add table inet redirect-agent-nat
        add chain inet redirect-agent-nat open-connections { type nat hook output priority -100 ; }
        add rule inet redirect-agent-nat open-connections ct mark 0x111\n";
    feed(netns, &["nft", "-f", "-"], keeper)
}

fn takeover_that_stopped_half_way_is_completed(family: Family) -> Result<()> {
    let (mut cluster, _) = migrating(Backend::NativeNftables, &[BESIDE], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.start_agent()?;
    let Cluster { node, server, .. } = &cluster;
    node.wait_for_state(server, PodState::Degraded)?;
    stop_half_way(&server.netns)?;
    cluster.assert_redirected(family)?;
    let (done, said) = node.take_over(&[])?;
    ensure!(done, "{said}");
    node.wait_until_enrolled(server)?;
    wait_until_clean(server)
}

fn cleanup_completes_a_takeover(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let fresh = footprint(&cluster.server.netns)?;
    cluster.node.enroll(&cluster.server)?;
    cluster.node.kill_agent()?;
    stop_half_way(&cluster.server.netns)?;
    let (cleaned, said) = cluster.node.cleanup()?;
    ensure!(cleaned, "{said}");
    assert_unchanged(&cluster.server.netns, &fresh)?;
    assert_eq!(ruleset(&cluster.server.netns)?, "");
    cluster.assert_direct(family)
}

fn pod_that_istio_cni_redirects_is_left_alone_until_that_lets_go(family: Family) -> Result<()> {
    let (mut cluster, fresh) = migrating(Backend::IptablesNft, &[], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let mut open = open_by_istio_cni(&cluster, family)?;
    let netns = &cluster.server.netns;
    let before = (footprint(netns)?, ruleset(netns)?);
    cluster.node.start_agent()?;
    let Cluster { node, server, .. } = &cluster;
    let told = node.wait_for_state(server, PodState::Failed)?;
    let message = told.message.context("no reason is told")?;
    assert!(message.contains("istio-cni redirects this pod"), "{message}");
    assert!(message.contains(BESIDE), "{message}");
    let (done, said) = node.take_over(&[])?;
    assert!(!done && said.contains(BESIDE), "{said}");
    assert_eq!(published(node, server), None);
    assert_unchanged(netns, &before.0)?;
    // But for the counters.
    assert_eq!(ruleset(netns)?.lines().count(), before.1.lines().count());
    assert!(!node.links(server)?.exists());
    // The proxy goes on serving it.
    for conversation in &mut open {
        conversation.exchange(b"still there?")?;
    }
    cluster.assert_redirected(family)?;
    drop(open);

    // Its label goes: it is for istio-cni to let go of it.
    let Cluster { node, server, .. } = &cluster;
    node.write(&annotated(server, "none"))?;
    node.wait_for_pod("to be taken out", server, |p| {
        p.reason == Reason::PodLabelNone && p.state == PodState::Failed
    })?;
    cluster.assert_redirected(family)?;
    let Cluster { node, server, .. } = &cluster;
    node.write(&annotated(server, "ambient"))?;
    node.wait_for_state(server, PodState::Failed)?;

    Backend::IptablesNft.let_go(netns)?;
    node.wait_until_enrolled(server)?;
    cluster.assert_redirected(family)?;
    let Cluster { node, server, .. } = &cluster;
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(netns, &fresh)
}

fn pod_that_left_the_mesh_with_istio_cnis_rules_is_freed_of_them(family: Family) -> Result<()> {
    let (mut cluster, fresh) = migrating(Backend::NativeNftables, &[], "none")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.start_agent()?;
    let Cluster { node, server, .. } = &cluster;
    let told = node.wait_for_state(server, PodState::Failed)?;
    let message = told.message.context("no reason is told")?;
    assert!(message.contains("redirect-agent takeover"), "{message}");
    cluster.assert_redirected(family)?;
    let (done, said) = node.take_over(&[])?;
    ensure!(done && said.contains("taken over"), "{said}");
    node.wait_for_state(server, PodState::Bypassing)?;
    wait_for("nothing of it to be left", SOON, || {
        let (done, said) = node.take_over(&[])?;
        ensure!(done, "{said}");
        Ok(said.contains("nothing of istio-cni's").then_some(()))
    })?;
    wait_until_clean(server)?;
    assert_unchanged(&server.netns, &fresh)?;
    cluster.assert_direct(family)
}
