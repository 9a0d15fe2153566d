//! An application's ways past the proxy that need no privilege: a socket that went past it before, and
//! translation in the pod.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use redirect_ebpf::abi::MARK_DIRECT;
use redirect_tests::app::{App, Behaviour, Call, Conversation, Outcome};
use redirect_tests::both_families;
use redirect_tests::dns;
use redirect_tests::hbone::Direction;
use redirect_tests::netns::Family;
use redirect_tests::sniff::Sniffer;
use redirect_tests::topology::Pod;
use rustix::net::connect_unspec;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::cgroup::shell_in;
use crate::cluster::{Cluster, Manifest, PORT, echo, now};
use crate::dns::{SERVICE, ask_tcp, service, service_ip};
use crate::probes::{Kubelet, wait_until_followed};

both_families! {
    nothing_gets_past_when_the_kernel_cannot_record_paths,
    socket_that_went_past_the_proxy_does_not_take_its_next_connection_there,
    translated_calls_are_refused_under_permissive,
    translated_calls_are_refused_under_strict,
}

const PATIENCE: Duration = Duration::from_secs(5);
/// A refusal that comes at once.
const AT_ONCE: Duration = Duration::from_secs(1);
/// A port that settings exclude, inbound and outbound.
const EXCLUDED: u16 = 8082;
/// The port that netfilter translates to the application's.
const TRANSLATED: u16 = 80;
const STRICT: &str = "apiVersion: security.istio.io/v1\n\
                      kind: PeerAuthentication\n\
                      metadata: {name: default, namespace: shop}\n\
                      spec: {mtls: {mode: STRICT}}\n";

/// What the kernel stores with a socket for us counts as the socket's option memory. An application can use
/// that up, and here there is none.
fn nothing_gets_past_when_the_kernel_cannot_record_paths(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let apps = (echo(server)?, echo(client)?);
    // Of each namespace since Linux 6.8.
    server.netns.set_sysctl("net/core/optmem_max", "0")?;

    cluster.assert_redirected(family)?;
    let reached = apps.1.accepted().len();

    // The capture rules let this mark pass.
    let call = Call::to(client.addr(family, PORT)).mark(MARK_DIRECT).within(AT_ONCE);
    let outcome = call.make(&server.netns)?;
    ensure!(!matches!(outcome, Outcome::Answered(_)), "{outcome}");
    ensure!(apps.1.accepted().len() == reached, "{:?}", apps.1.accepted());
    let counters = node.pod(server)?.context("no status")?.counters;
    ensure!(counters.get("dropped_no_memory").is_some_and(|n| *n > 0), "{counters:?}");
    Ok(())
}

/// Accepts the one connection that `open` makes to a port of the pod.
fn accept<T: Send>(
    pod: &Pod,
    port: u16,
    open: impl FnOnce() -> Result<T> + Send,
) -> Result<(Socket, T)> {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let listener = pod.netns.run(|| TcpListener::bind(any).context("listen"))?;
    let opened = open()?;
    let (stream, _) = listener.accept().context("accept")?;
    Ok((stream.into(), opened))
}

fn connect(from: &Pod, to: SocketAddr) -> Result<Socket> {
    from.netns.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.connect_timeout(&to.into(), PATIENCE).with_context(|| format!("connect to {to}"))?;
        Ok(socket)
    })
}

/// Disconnects a socket, and connects it to somebody else.
fn reconnect(socket: &Socket, to: SocketAddr) -> Result<TcpStream> {
    connect_unspec(socket).context("disconnect")?;
    // It may have been a socket of both families.
    let to = match (socket.domain()?, to) {
        (Domain::IPV6, SocketAddr::V4(v4)) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        _ => to,
    };
    socket.connect_timeout(&to.into(), PATIENCE).with_context(|| format!("connect to {to}"))?;
    Ok(socket.try_clone()?.into())
}

fn socket_that_went_past_the_proxy_does_not_take_its_next_connection_there(
    family: Family,
) -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.use_node_network(cluster.topology.node(0));
    let neighbour = cluster.topology.add_pod(0, "shop", "neighbour")?;
    let service = service().to_string();
    fs::write(cluster.node.manifests().join("web.json"), service).context("write the service")?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, client, topology } = &cluster;
    let _apps = (echo(client)?, echo(&neighbour)?);
    let _excluded =
        App::start(&client.netns, "client", client.addr(family, EXCLUDED), Behaviour::Echo)?;
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;

    let opened = connect(server, client.addr(family, PORT))?;
    let call = |port| connect(client, server.addr(family, port));
    let (accepted, _peer) = accept(server, 9000, || call(9000))?;

    node.enroll(&neighbour)?;
    let excluded = |manifest: Manifest, name: &str| {
        let name = format!("traffic.redirect-agent/{name}");
        manifest.with("/metadata/annotations", &name, json!(EXCLUDED.to_string()))
    };
    let manifest = excluded(Manifest::of(server).mode("ambient"), "excludeInboundPorts");
    node.write(&excluded(manifest, "excludeOutboundPorts"))?;
    node.wait_until_enrolled(server)?;

    let to_excluded = connect(server, client.addr(family, EXCLUDED))?;
    let (of_excluded, _peer) = accept(server, EXCLUDED, || call(EXCLUDED))?;
    let (of_proxy, _peer) = accept(server, 9001, || call(9001))?;
    let (of_kubelet, probe) = accept(server, 9002, || {
        let to = server.ip(family);
        let script = format!("exec timeout 60 bash -c 'exec 3<>/dev/tcp/{to}/9002 && cat <&3'");
        let mut probe = shell_in(kubelet.cgroup()?, Some(topology.node(0)), &script);
        // It ends with its connection.
        Ok(thread::spawn(move || probe.output()))
    })?;

    let mut wrong = Vec::new();
    for (name, socket) in [
        ("opened before the enrollment", opened),
        ("accepted before the enrollment", accepted),
        ("connected to an excluded port", to_excluded),
        ("accepted on an excluded port", of_excluded),
        ("accepted from the proxy", of_proxy),
        ("accepted from kubelet", of_kubelet),
    ] {
        for to in [client, &neighbour] {
            if let Err(error) = assert_proxied_again(&cluster, &socket, to, family) {
                wrong.push(format!("{name}, then to {to}: {error:#}"));
            }
        }
        let resolver = client.addr(family, dns::PORT);
        let asked = reconnect(&socket, resolver).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            ask_tcp(&mut stream, SERVICE, resolver.ip())
        });
        if asked.as_ref().ok() != Some(&vec![service_ip(family)]) {
            wrong.push(format!("{name}, then to a resolver: {asked:?}"));
        }
    }
    probe.join().map_err(|_| anyhow!("the probe panicked"))?.context("probe")?;
    ensure!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

fn assert_proxied_again(
    Cluster { node, server, .. }: &Cluster,
    socket: &Socket,
    to: &Pod,
    family: Family,
) -> Result<()> {
    let addr = to.addr(family, PORT);
    let wire = Sniffer::start(&to.netns, "eth0")?;
    let since = now()?;
    let mut conversation = Conversation::new(reconnect(socket, addr)?, PATIENCE)?;
    conversation.exchange(b"more than a greeting")?;
    let local = redirect_tests::app::canonical(conversation.local_addr()?);
    let direct = wire.finish().iter().any(|seen| seen.is_between(local, addr));
    ensure!(!direct, "{local} reached {to} past the proxy");
    ensure!(conversation.answer().by == to.name, "{:?}", conversation.answer());
    let records = node.records()?;
    let by_proxy = records.iter().any(|r| {
        (r.direction, r.src, r.dst) == (Direction::Outbound, local, addr)
            && r.pod == server.to_string()
            && r.ts >= since
    });
    ensure!(by_proxy, "the proxy has not seen {local}");
    Ok(())
}

/// Rules that lead what comes for [`TRANSLATED`] to the application.
const REDIRECT: &str = "-t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080";
const TPROXY: &str = "-t mangle -A PREROUTING -i eth0 -p tcp --dport 80 -j TPROXY --on-port 8080 \
                      --tproxy-mark 1";

/// Each, whether somebody listens on [`TRANSLATED`] itself, and which counters say that a call was refused.
/// Where somebody does, he has it, by the proxy, which is told the port that was called.
const TRANSLATIONS: [(&str, bool, &[&str]); 4] = [
    (REDIRECT, false, &["no_listener"]),
    (REDIRECT, true, &["redirected_inbound"]),
    (TPROXY, false, &["no_listener"]),
    (TPROXY, true, &["refused_past_proxy", "redirected_inbound"]),
];

fn translated_calls_are_refused_under_permissive(family: Family) -> Result<()> {
    translated_calls_are_refused(family, false)
}

fn translated_calls_are_refused_under_strict(family: Family) -> Result<()> {
    translated_calls_are_refused(family, true)
}

fn translated_calls_are_refused(family: Family, strict: bool) -> Result<()> {
    let mut wrong = Vec::new();
    for (rule, somebody, counters) in TRANSLATIONS {
        let checked = assert_translated_is_refused(family, strict, rule, somebody, counters);
        if let Err(error) = checked {
            wrong.push(format!("{rule}, somebody listens: {somebody}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn assert_translated_is_refused(
    family: Family,
    strict: bool,
    rule: &str,
    somebody: bool,
    counters: &[&str],
) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let transparent = |name, port| {
        let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
        App::start_with(&server.netns, name, any, Behaviour::Echo, |socket| {
            socket.set_ip_transparent_v6(true)
        })
    };
    let app = transparent("server", PORT)?;
    let other = somebody.then(|| transparent("other", TRANSLATED)).transpose()?;
    let (program, flag) = match family {
        Family::V4 => ("iptables-nft", "-4"),
        Family::V6 => ("ip6tables-nft", "-6"),
    };
    let tell = |program: &str, command: &str| {
        let arguments: Vec<&str> = command.split_whitespace().collect();
        server.netns.output(program, &arguments).map(drop)
    };
    tell("ip", &format!("{flag} rule add fwmark 1 lookup 100"))?;
    tell("ip", &format!("{flag} route add local default dev lo table 100"))?;
    tell(program, rule)?;
    let call = |port| Call::to(server.addr(family, port)).within(PATIENCE).make(&client.netns);
    ensure!(call(TRANSLATED)?.answer().context("without a mesh")?.by == "server");
    let accepted = app.accepted().len();

    if strict {
        fs::write(node.manifests().join("policy.yaml"), STRICT).context("write a policy")?;
    }
    node.enroll(server)?;
    let counted = |counters: &[&str]| -> Result<u64> {
        let status = node.pod(server)?.context("no status")?;
        Ok(counters.iter().filter_map(|counter| status.counters.get(*counter)).sum())
    };
    let may_be_proxied = counters.contains(&"redirected_inbound");
    let mut proxied = 0;
    // Before anything has gone to the application, and after that.
    for round in 1..=2 {
        for _ in 0..2 {
            let before = counted(counters)?;
            match call(TRANSLATED)? {
                Outcome::Refused { after } => ensure!(after < AT_ONCE, "refused after {after:?}"),
                Outcome::Answered(answer) if may_be_proxied && !strict => {
                    ensure!(answer.by == "other", "{answer:?}");
                    proxied += 1;
                }
                Outcome::Closed { bytes: 0 } if may_be_proxied && strict => {}
                // Reverse-path validation goes by TPROXY's mark, and drops it.
                Outcome::TimedOut if rule == TPROXY && somebody && family == Family::V4 => continue,
                outcome => bail!("expected a refusal in round {round}, but: {outcome}"),
            }
            ensure!(counted(counters)? > before, "not counted as {counters:?}");
        }
        match strict {
            true => ensure!(call(PORT)? == Outcome::Closed { bytes: 0 }, "the policy is strict"),
            false => ensure!(call(PORT)?.answer()?.by == "server"),
        }
    }
    let expected = accepted + if strict { 0 } else { 2 };
    ensure!(app.accepted().len() == expected, "{:?}", app.accepted());
    let others = other.map_or(0, |other| other.accepted().len());
    ensure!(others == proxied, "the other has {others} calls, {proxied} by the proxy");
    let away = counted(&["refused_proxy_away", "dropped_proxy_away"])?;
    ensure!(away == 0, "{away} are counted as without a proxy, and that was always there");
    Ok(())
}
