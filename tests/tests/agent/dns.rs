//! A pod's DNS: real clients ask, and it is looked at who answers, from where.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use nix::sys::socket::{setsockopt, sockopt};
use redirect_agent::output::PodState;
use redirect_ebpf::abi::{
    Addr, DNS_PLACES, DnsFlow, DnsKey, MARK_MASK, MARK_PROXY, PORT_PROXY_DNS, PROTOCOL_UDP,
};
use redirect_tests::both_families;
use redirect_tests::dns::{
    self, BIG, BIG_ANSWERS, Resolver, SLOW, SLOWNESS, TRUNCATED, WHO, framed,
};
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::{succeed, wait_for};
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};

use crate::cluster::{Cluster, Manifest, SOON};
use crate::drift::{detach, index};

both_families! {
    dig_is_answered_by_the_proxy_from_the_resolver_it_has_asked,
    glibc_and_musl_look_names_up,
    one_socket_asks_several_resolvers_at_once_with_one_id,
    connected_sockets_are_answered_by_their_resolvers,
    two_connections_from_one_port_ask_two_resolvers,
    queries_are_pipelined_over_tcp,
    resolvers_in_the_pod_are_left_alone,
    annotation_switches_it_and_connections_keep_their_way,
    nobody_answers_while_the_proxy_is_away,
    proxy_without_dns_is_told_of_and_queries_are_refused_at_once,
    fragments_get_neither_past_the_proxy_nor_to_the_application,
    client_is_gone_when_the_answer_comes,
    excluded_ranges_make_no_difference_and_the_excluded_port_does,
    guard_that_somebody_detaches_is_put_back,
    agent_restarts_and_queries_are_answered_all_the_while,
    datagrams_in_one_do_not_hide_a_query,
    application_that_joins_the_proxys_group_is_not_taken_for_it,
}

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is looked whether something does not happen.
const A_WHILE: Duration = Duration::from_millis(500);
/// A name that the proxy's DNS alone knows.
pub const SERVICE: &str = "web.shop.svc.cluster.local.";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";

/// A pod in the mesh, and on the other node a resolver that its proxy asks.
struct Dns {
    resolver: Resolver,
    cluster: Cluster,
    family: Family,
}

impl Dns {
    fn start(family: Family) -> Result<Self> {
        Self::with_flags(family, &[], true)
    }

    fn with_flags(family: Family, flags: &[&str], has_dns: bool) -> Result<Self> {
        let mut cluster = Cluster::without_agent(flags)?;
        let resolver = Resolver::start(
            &cluster.client.netns,
            &[cluster.client.v4.into(), cluster.client.v6.into()],
        )?;
        fs::write(cluster.node.manifests().join("web.json"), service().to_string())
            .context("write the service")?;
        let upstream = cluster.client.addr(family, dns::PORT).to_string();
        let flags: &[&str] = if has_dns { &["--dns-upstream", &upstream] } else { &["--no-dns"] };
        cluster.node.start_agent()?;
        cluster.node.start_proxy_with(flags)?;
        if has_dns {
            cluster.node.enroll(&cluster.server)?;
        } else {
            cluster.node.write(&Manifest::of(&cluster.server).mode("ambient"))?;
            cluster.node.wait_for_state(&cluster.server, PodState::Degraded)?;
        }
        Ok(Self { resolver, cluster, family })
    }

    /// The pod.
    fn netns(&self) -> &Netns {
        &self.cluster.server.netns
    }

    /// The resolver that there is.
    fn there(&self) -> IpAddr {
        self.cluster.client.ip(self.family)
    }

    /// Resolvers that there are not.
    fn nowhere(&self) -> [IpAddr; 3] {
        let of = |v4: &str, v6: &str| match self.family {
            Family::V4 => v4.parse(),
            Family::V6 => v6.parse(),
        };
        [
            ("203.0.113.1", "2001:db8::1"),
            ("203.0.113.2", "2001:db8::2"),
            ("203.0.113.3", "2001:db8::3"),
        ]
        .map(|(v4, v6)| of(v4, v6).unwrap_or(self.family.localhost()))
    }

    /// The address of the service that the proxy's DNS knows.
    fn service(&self) -> IpAddr {
        service_ip(self.family)
    }

    /// Asks for a name over UDP, from a connected socket.
    fn ask(&self, resolver: IpAddr, name: &str) -> Result<Vec<IpAddr>> {
        Ok(ask(self.netns(), resolver, name, PATIENCE)?.context("no answer came")?.1)
    }

    /// Checks that the proxy answers.
    fn assert_captured(&self) -> Result<()> {
        for resolver in [self.nowhere()[0], self.there()] {
            let found = self.ask(resolver, SERVICE)?;
            ensure!(found == [self.service()], "{resolver} says {found:?}");
        }
        Ok(())
    }

    /// Checks that the resolver itself answers.
    fn assert_direct(&self) -> Result<()> {
        ensure!(self.ask(self.there(), SERVICE)?.is_empty(), "the proxy answers");
        ensure!(self.ask(self.there(), WHO)?.contains(&self.there()), "the resolver is silent");
        Ok(())
    }

    fn counter(&self, name: &str) -> Result<u64> {
        let pod = self.cluster.node.pod(&self.cluster.server)?.context("no such pod")?;
        Ok(pod.counters.get(name).copied().unwrap_or(0))
    }

    fn wait_for_counter(&self, name: &str, above: u64) -> Result<()> {
        wait_for(&format!("{name} to be above {above}"), SOON, || {
            Ok((self.counter(name)? > above).then_some(()))
        })
    }

    /// Writes the annotation, and waits until it is in force.
    fn capture(&self, captures: bool) -> Result<()> {
        let pod = &self.cluster.server;
        let value = json!(captures.to_string());
        let manifest = Manifest::of(pod).mode("ambient");
        self.cluster.node.write(&manifest.with("/metadata/annotations", DNS_CAPTURE, value))?;
        let since = Instant::now();
        self.cluster.node.wait_for_pod("to follow the annotation", pod, |p| {
            p.state == PodState::Enrolled
                && p.traffic.as_ref().is_some_and(|t| t.dns_capture) == captures
                && p.kernel.as_ref().is_some_and(|kernel| kernel.complete)
        })?;
        println!("{DNS_CAPTURE}={captures} took {:?}", since.elapsed());
        Ok(())
    }
}

/// The address of the service that the proxy's DNS knows.
pub fn service_ip(family: Family) -> IpAddr {
    match family {
        Family::V4 => [10, 96, 0, 80].into(),
        Family::V6 => [0xfd96, 0, 0, 0, 0, 0, 0, 0x80].into(),
    }
}

/// The service.
pub fn service() -> serde_json::Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "clusterIPs": [service_ip(Family::V4), service_ip(Family::V6)],
            "ports": [{"port": 80}],
        },
    })
}

/// Asks over UDP; gives the code and the addresses, or `None` when nobody answers.
pub fn ask(
    netns: &Netns,
    resolver: IpAddr,
    name: &str,
    patience: Duration,
) -> Result<Option<(String, Vec<IpAddr>)>> {
    netns.run(|| {
        let socket = connected(resolver)?;
        socket.set_read_timeout(Some(patience))?;
        exchange(&socket, name, resolver)
    })
}

/// A socket of the calling thread's namespace.
pub fn connected(resolver: IpAddr) -> Result<UdpSocket> {
    let any = if resolver.is_ipv4() { Family::V4.any() } else { Family::V6.any() };
    let socket = UdpSocket::bind((any, 0)).context("open a socket")?;
    socket.connect((resolver, dns::PORT)).with_context(|| format!("connect to {resolver}"))?;
    Ok(socket)
}

/// Asks from this socket.
pub fn exchange(
    socket: &UdpSocket,
    name: &str,
    like: IpAddr,
) -> Result<Option<(String, Vec<IpAddr>)>> {
    socket.send(&dns::query(7, name, like)?).context("send a query")?;
    let mut answer = [0; 65535];
    let len = loop {
        match socket.recv(&mut answer) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            received => break received.context("receive an answer")?,
        }
    };
    let (id, code, addresses) = dns::read(&answer[..len])?;
    ensure!(id == 7, "the answer's id is {id}");
    Ok(Some((code.to_string(), addresses)))
}

/// Asks over a connection.
/// Asks over TCP.
pub fn ask_tcp(stream: &mut TcpStream, name: &str, like: IpAddr) -> Result<Vec<IpAddr>> {
    use std::io::{Read as _, Write as _};
    stream.write_all(&framed(&dns::query(9, name, like)?)).context("send a query")?;
    let mut len = [0; 2];
    stream.read_exact(&mut len).context("read an answer's length")?;
    let mut answer = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut answer).context("read an answer")?;
    Ok(dns::read(&answer)?.2)
}

/// Connects to a resolver.
pub fn connect(netns: &Netns, resolver: IpAddr) -> Result<TcpStream> {
    netns.run(|| {
        let to = SocketAddr::new(resolver, dns::PORT);
        let stream = TcpStream::connect_timeout(&to, PATIENCE)
            .with_context(|| format!("connect to {to}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// What `dig` prints about a name, and that it has asked `resolver`: it takes no other's answers.
fn dig(netns: &Netns, resolver: IpAddr, name: &str, options: &[&str]) -> Result<String> {
    let kind = if resolver.is_ipv4() { "A" } else { "AAAA" };
    let at = format!("@{resolver}");
    let mut arguments = vec![at.as_str(), name, kind, "+tries=1", "+timeout=10"];
    arguments.extend(options);
    let output = netns.output("dig", &arguments)?;
    let server = format!(";; SERVER: {resolver}#53");
    ensure!(output.contains(&server), "dig says {output}");
    Ok(output)
}

fn dig_is_answered_by_the_proxy_from_the_resolver_it_has_asked(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let mut queries = 0;
    for resolver in [dns.there(), dns.nowhere()[0], dns.nowhere()[1]] {
        for options in [&["+notcp"][..], &["+tcp"], &["+bufsize=4096", "+cookie"]] {
            let said = dig(dns.netns(), resolver, SERVICE, options)?;
            ensure!(said.contains(&dns.service().to_string()), "{options:?}: {said}");
            // By way of the proxy, whose own queries go where they should.
            let said = dig(dns.netns(), resolver, WHO, options)?;
            ensure!(said.contains(&dns.there().to_string()), "{options:?}: {said}");
            queries += 2;
        }
    }
    ensure!(dns.counter("redirected_dns")? == queries);

    let said = dig(dns.netns(), dns.nowhere()[0], BIG, &["+bufsize=8192", "+ignore"])?;
    ensure!(said.contains(&format!("ANSWER: {BIG_ANSWERS}")), "{said}");
    ensure!(said.contains("(UDP)"), "{said}");
    let said = dig(dns.netns(), dns.nowhere()[0], TRUNCATED, &[])?;
    ensure!(said.contains("(TCP)"), "dig has not asked again over TCP: {said}");
    ensure!(said.contains(&dns.there().to_string()), "{said}");
    let asked = dns.resolver.asked();
    ensure!(
        asked.iter().all(|(client, _)| client.ip() == dns.cluster.server.ip(family)),
        "{asked:?}"
    );
    ensure!(asked.iter().all(|(_, name)| name != SERVICE), "a query went past the proxy");
    Ok(())
}

/// Runs a program in the pod, with these resolvers in its `/etc/resolv.conf`.
fn with_resolv_conf(dns: &Dns, resolvers: &[IpAddr], program: &[&str]) -> Result<String> {
    let conf = dns.cluster.topology.dir().path().join("resolv.conf");
    let lines: Vec<String> = resolvers.iter().map(|ip| format!("nameserver {ip}\n")).collect();
    fs::write(&conf, lines.concat()).context("write resolv.conf")?;
    let script = "mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"";
    let conf = conf.to_str().context("name resolv.conf")?;
    let mut arguments = vec!["--mount", "sh", "-c", script, "sh", conf];
    arguments.extend(program);
    dns.netns().output("unshare", &arguments)
}

/// A program that is linked with musl and prints the addresses of a name.
fn musl_program(dir: &Path) -> Result<PathBuf> {
    const SOURCE: &str = r#"
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int argc, char **argv) {
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found, *a;
    int error = getaddrinfo(argv[1], 0, &hints, &found);
    if (error) { fprintf(stderr, "%s\n", gai_strerror(error)); return 1; }
    for (a = found; a; a = a->ai_next) {
        char text[64];
        void *address = a->ai_family == AF_INET
            ? (void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr
            : (void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
        puts(inet_ntop(a->ai_family, address, text, sizeof text));
    }
    return 0;
}
"#;
    let (source, program) = (dir.join("lookup.c"), dir.join("lookup"));
    fs::write(&source, SOURCE).context("write a program")?;
    succeed(Command::new("musl-gcc").args(["-static", "-o"]).arg(&program).arg(&source))
        .context("compile with musl-gcc (package musl-tools)")?;
    Ok(program)
}

fn glibc_and_musl_look_names_up(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let musl = musl_program(dns.cluster.topology.dir().path())?;
    let musl = musl.to_str().context("name the program")?;
    // musl asks all of them at once, from one socket, with one id; glibc one after the other.
    for resolvers in [&dns.nowhere()[..1], &dns.nowhere()[..], &[dns.there(), dns.nowhere()[0]]] {
        for program in [&["getent", "ahosts"][..], &[musl]] {
            for (name, address) in [(SERVICE, dns.service()), (WHO, dns.there())] {
                let name = name.trim_end_matches('.');
                let said = with_resolv_conf(&dns, resolvers, &[program, &[name]].concat())?;
                ensure!(said.contains(&address.to_string()), "{program:?} {resolvers:?}: {said}");
            }
        }
    }
    Ok(())
}

fn one_socket_asks_several_resolvers_at_once_with_one_id(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let resolvers = [&dns.nowhere()[..], &[dns.there()]].concat();
    dns.netns().run(|| {
        let socket = UdpSocket::bind((family.any(), 0)).context("open a socket")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        for name in [SLOW, SERVICE, SLOW] {
            // All of them wait when the first is answered.
            for resolver in &resolvers {
                let query = dns::query(7, name, *resolver)?;
                socket.send_to(&query, (*resolver, dns::PORT)).context("send a query")?;
            }
            let mut answered = Vec::new();
            for _ in &resolvers {
                let mut answer = [0; 4096];
                let (_, from) = socket.recv_from(&mut answer).context("wait for an answer")?;
                ensure!(from.port() == dns::PORT, "an answer came from {from}");
                answered.push(from.ip());
            }
            answered.sort();
            let mut expected = resolvers.clone();
            expected.sort();
            ensure!(answered == expected, "answers came from {answered:?}");
        }
        Ok(())
    })
}

fn connected_sockets_are_answered_by_their_resolvers(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    dns.netns().run(|| {
        let sockets = dns.nowhere().map(connected);
        for round in 0..3 {
            for (socket, resolver) in sockets.iter().zip(dns.nowhere()) {
                let socket = socket.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                let answer = exchange(socket, SERVICE, resolver)?;
                let (_, found) = answer.with_context(|| format!("round {round}: no answer"))?;
                ensure!(found == [dns.service()], "{found:?}");
            }
        }
        Ok(())
    })
}

fn two_connections_from_one_port_ask_two_resolvers(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    dns.netns().run(|| {
        let mut port = 0;
        let mut streams = Vec::new();
        for resolver in dns.nowhere() {
            let to = SocketAddr::new(resolver, dns::PORT);
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            let own = SocketAddr::new(dns.cluster.server.ip(family), port);
            socket.bind(&own.into()).with_context(|| format!("bind {own}"))?;
            socket.connect_timeout(&to.into(), PATIENCE).with_context(|| format!("to {to}"))?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(PATIENCE))?;
            port = stream.local_addr()?.port();
            streams.push((stream, resolver));
        }
        for _ in 0..3 {
            for (stream, resolver) in &mut streams {
                ensure!(ask_tcp(stream, SERVICE, *resolver)? == [dns.service()]);
            }
        }
        Ok(())
    })
}

fn queries_are_pipelined_over_tcp(family: Family) -> Result<()> {
    use std::io::{Read as _, Write as _};
    const QUERIES: u16 = 200;
    let dns = Dns::start(family)?;
    let mut stream = connect(dns.netns(), dns.nowhere()[0])?;
    let mut all = Vec::new();
    for id in 0..QUERIES {
        all.extend(framed(&dns::query(id, if id % 2 == 0 { BIG } else { SERVICE }, dns.there())?));
    }
    let mut writer = stream.try_clone()?;
    let writing = std::thread::spawn(move || writer.write_all(&all));
    for expected in 0..QUERIES {
        let mut len = [0; 2];
        stream.read_exact(&mut len).context("read an answer's length")?;
        let mut answer = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut answer).context("read an answer")?;
        let (id, _, addresses) = dns::read(&answer)?;
        let wanted = if id % 2 == 0 { BIG_ANSWERS.into() } else { 1 };
        ensure!(id == expected && addresses.len() == wanted, "{id}: {addresses:?}");
    }
    match writing.join() {
        Ok(written) => written.context("write the queries"),
        Err(_) => bail!("the writing thread panicked"),
    }
}

fn resolvers_in_the_pod_are_left_alone(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let own = [family.localhost(), dns.cluster.server.ip(family)];
    let resolver = Resolver::start(dns.netns(), &own)?;
    for ip in own {
        ensure!(dns.ask(ip, WHO)?.contains(&ip), "another than {ip} answers");
        let mut stream = connect(dns.netns(), ip)?;
        ensure!(ask_tcp(&mut stream, WHO, ip)?.contains(&ip), "another than {ip} answers");
    }
    ensure!(resolver.asked().len() == 4);
    ensure!(dns.counter("redirected_dns")? == 0);
    dns.assert_captured()
}

fn annotation_switches_it_and_connections_keep_their_way(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    dns.assert_captured()?;
    let socket = dns.netns().run(|| {
        let socket = connected(dns.there())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    })?;
    let by_socket = || -> Result<Vec<IpAddr>> {
        Ok(exchange(&socket, SERVICE, dns.there())?.context("no answer came")?.1)
    };
    let mut captured = connect(dns.netns(), dns.there())?;
    let mut nowhere = connect(dns.netns(), dns.nowhere()[0])?;
    ensure!(ask_tcp(&mut captured, SERVICE, dns.there())? == [dns.service()]);
    ensure!(by_socket()? == [dns.service()]);

    for _ in 0..2 {
        dns.capture(false)?;
        dns.assert_direct()?;
        ensure!(by_socket()?.is_empty(), "a socket that is open asks the proxy");
        ensure!(ask_tcp(&mut captured, SERVICE, dns.there())? == [dns.service()]);
        ensure!(ask_tcp(&mut nowhere, SERVICE, dns.there())? == [dns.service()]);
        // A connection like any other: the resolver's, by way of the proxy.
        let mut plain = connect(dns.netns(), dns.there())?;
        ensure!(ask_tcp(&mut plain, SERVICE, dns.there())?.is_empty());

        dns.capture(true)?;
        dns.assert_captured()?;
        ensure!(by_socket()? == [dns.service()]);
        ensure!(ask_tcp(&mut captured, SERVICE, dns.there())? == [dns.service()]);
        ensure!(ask_tcp(&mut plain, SERVICE, dns.there())?.is_empty(), "it was rerouted");
        ensure!(ask_tcp(&mut plain, WHO, dns.there())?.contains(&dns.there()));
    }

    // Out of the mesh, and nothing is left.
    let Cluster { node, server, .. } = &dns.cluster;
    drop((captured, nowhere));
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    dns.assert_direct()?;
    let before = footprint(&server.netns)?;
    node.enroll(server)?;
    dns.assert_captured()?;
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

fn nobody_answers_while_the_proxy_is_away(family: Family) -> Result<()> {
    let mut dns = Dns::with_flags(family, &["--proxy-grace", "2s"], true)?;
    dns.assert_captured()?;
    let mut open = connect(dns.netns(), dns.nowhere()[0])?;
    dns.cluster.node.kill_proxy()?;
    ensure!(ask_tcp(&mut open, SERVICE, dns.there()).is_err(), "a dead proxy answers");

    let answer = ask(dns.netns(), dns.there(), WHO, A_WHILE)?;
    ensure!(answer.is_none(), "within the grace: {answer:?}");
    ensure!(dns.counter("dropped_proxy_away")? > 0);
    wait_for("the end of the grace", SOON, || {
        let answer = ask(dns.netns(), dns.there(), WHO, A_WHILE)?;
        Ok(answer.filter(|(code, _)| code == "Server Failure"))
    })?;
    for resolver in [dns.there(), dns.nowhere()[0]] {
        let since = Instant::now();
        let said = dig(dns.netns(), resolver, WHO, &[])?;
        ensure!(said.contains("SERVFAIL"), "{said}");
        ensure!(connect(dns.netns(), resolver).is_err(), "somebody takes the connection");
        ensure!(since.elapsed() < PATIENCE / 2, "it took {:?}", since.elapsed());
    }
    ensure!(dns.counter("refused_proxy_away")? > 0);
    ensure!(dns.resolver.asked().is_empty(), "{:?}", dns.resolver.asked());

    let upstream = dns.cluster.client.addr(family, dns::PORT).to_string();
    dns.cluster.node.start_proxy_with(&["--dns-upstream", &upstream])?;
    dns.assert_captured()
}

fn proxy_without_dns_is_told_of_and_queries_are_refused_at_once(family: Family) -> Result<()> {
    let dns = Dns::with_flags(family, &[], false)?;
    let server = &dns.cluster.server;
    dns.cluster.node.wait_for_pod("to say that there is no DNS", server, |p| {
        p.message.as_ref().is_some_and(|message| message.contains("the proxy has no DNS"))
    })?;
    let since = Instant::now();
    let (code, _) = ask(dns.netns(), dns.there(), WHO, PATIENCE)?.context("no answer came")?;
    ensure!(code == "Server Failure", "{code}");
    ensure!(connect(dns.netns(), dns.there()).is_err(), "somebody takes the connection");
    ensure!(since.elapsed() < PATIENCE / 2, "it took {:?}", since.elapsed());
    ensure!(dns.counter("refused_dns_absent")? >= 2);
    ensure!(dns.resolver.asked().is_empty());

    dns.capture(false)?;
    dns.assert_direct()?;
    let pod = dns.cluster.node.pod(server)?.context("no such pod")?;
    ensure!(pod.message.is_none(), "{:?}", pod.message);
    Ok(())
}

fn fragments_get_neither_past_the_proxy_nor_to_the_application(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    // Whoever listens on all addresses of the pod must not get what is for others.
    let application = dns.netns().run(|| {
        let socket = UdpSocket::bind((family.any(), dns::PORT)).context("open a socket")?;
        socket.set_read_timeout(Some(A_WHILE))?;
        Ok(socket)
    })?;
    dns.netns().ip("link set lo mtu 1400")?;
    dns.netns().run(|| {
        let socket = connected(dns.there())?;
        socket.set_read_timeout(Some(A_WHILE))?;
        let mut query = dns::query(7, WHO, dns.there())?;
        query.resize(3000, 0);
        socket.send(&query).context("send a query")?;
        ensure!(socket.recv(&mut [0; 512]).is_err(), "a fragmented query has an answer");
        Ok(())
    })?;
    ensure!(application.recv(&mut [0; 512]).is_err(), "the application got it");
    dns.wait_for_counter("dropped_dns_unreadable", 0)?;
    ensure!(dns.resolver.asked().is_empty(), "{:?}", dns.resolver.asked());

    // An answer, too: from the proxy's address it must not come.
    let before = dns.counter("dropped_dns_unreadable")?;
    dns.netns().run(|| {
        let socket = UdpSocket::bind((family.any(), 0)).context("open a socket")?;
        socket.set_read_timeout(Some(A_WHILE))?;
        SockRef::from(&socket).set_recv_buffer_size(1 << 20)?;
        socket.send_to(&dns::query(7, BIG, dns.there())?, (dns.there(), dns::PORT))?;
        let received = socket.recv_from(&mut [0; 65535]);
        ensure!(received.is_err(), "{received:?}");
        Ok(())
    })?;
    dns.wait_for_counter("dropped_dns_unreadable", before)?;
    dns.netns().ip("link set lo mtu 65536")?;
    dns.assert_captured()
}

fn client_is_gone_when_the_answer_comes(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let unreachables = || -> Result<u64> {
        let table = match family {
            Family::V4 => "/proc/thread-self/net/snmp",
            Family::V6 => "/proc/thread-self/net/snmp6",
        };
        let table = dns.netns().run(|| fs::read_to_string(table).context("read ICMP counts"))?;
        match family {
            Family::V4 => {
                let mut lines = table.lines().filter(|line| line.starts_with("Icmp:"));
                let (names, values) = lines.next().zip(lines.next()).context("no ICMP counts")?;
                let mut pairs = names.split_whitespace().zip(values.split_whitespace());
                let (_, value) =
                    pairs.find(|(name, _)| *name == "OutDestUnreachs").context("no such count")?;
                value.parse().context("read a count")
            }
            Family::V6 => {
                let line = table.lines().find(|line| line.starts_with("Icmp6OutDestUnreachs"));
                let value = line.and_then(|line| line.split_whitespace().nth(1));
                value.context("no such count")?.parse().context("read a count")
            }
        }
    };
    let before = unreachables()?;
    dns.netns().run(|| {
        connected(dns.there())?.send(&dns::query(7, SLOW, dns.there())?)?;
        Ok(())
    })?;
    wait_for("the query upstream", SOON, || {
        Ok(dns.resolver.asked().iter().any(|(_, name)| name == SLOW).then_some(()))
    })?;
    // It comes after the next slow one.
    ensure!(ask(dns.netns(), dns.there(), SLOW, SLOWNESS * 20)?.is_some());
    let after = unreachables()?;
    ensure!(after == before, "the resolver was sent {} ICMP errors", after - before);
    Ok(())
}

fn excluded_ranges_make_no_difference_and_the_excluded_port_does(family: Family) -> Result<()> {
    let everything = match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    };
    let flags = ["--exclude-outbound-ip-ranges", everything, "--include-outbound-ports", "80"];
    let dns = Dns::with_flags(family, &flags, true)?;
    dns.assert_captured()?;
    let mut stream = connect(dns.netns(), dns.nowhere()[0])?;
    ensure!(ask_tcp(&mut stream, SERVICE, dns.there())? == [dns.service()]);

    let Cluster { node, server, .. } = &dns.cluster;
    let manifest = Manifest::of(server).mode("ambient");
    let name = "traffic.redirect-agent/excludeOutboundPorts";
    node.write(&manifest.with("/metadata/annotations", name, json!("53")))?;
    wait_for("queries to bypass", SOON, || {
        Ok(dns.ask(dns.there(), SERVICE)?.is_empty().then_some(()))
    })?;
    dns.assert_direct()?;
    ensure!(ask_tcp(&mut stream, SERVICE, dns.there())? == [dns.service()], "it was rerouted");
    let mut direct = connect(dns.netns(), dns.there())?;
    ensure!(ask_tcp(&mut direct, SERVICE, dns.there())?.is_empty());
    Ok(())
}

fn guard_that_somebody_detaches_is_put_back(family: Family) -> Result<()> {
    let dns = Dns::with_flags(family, &["--verify-interval", "500ms"], true)?;
    let node = &dns.cluster.node;
    let guard = format!("out_{}", index(&dns.cluster.server, "eth0")?);
    detach(&node.links(&dns.cluster.server)?.join(guard))?;
    wait_for("the guard to be put back", SOON, || {
        let kernel = node.pod(&dns.cluster.server)?.and_then(|pod| pod.kernel);
        Ok(kernel.is_some_and(|kernel| kernel.complete).then_some(()))
    })?;
    dns.assert_captured()
}

fn agent_restarts_and_queries_are_answered_all_the_while(family: Family) -> Result<()> {
    let mut dns = Dns::start(family)?;
    let mut open = connect(dns.netns(), dns.nowhere()[0])?;
    ensure!(ask_tcp(&mut open, SERVICE, dns.there())? == [dns.service()]);
    dns.cluster.node.kill_agent()?;
    dns.assert_captured()?;
    dns.cluster.node.start_agent()?;
    dns.cluster.node.wait_until_enrolled(&dns.cluster.server)?;
    dns.assert_captured()?;
    ensure!(ask_tcp(&mut open, SERVICE, dns.there())? == [dns.service()]);
    Ok(())
}

#[test]
fn reverse_path_validation_makes_no_difference() -> Result<()> {
    let dns = Dns::start(Family::V4)?;
    for value in ["1", "2", "0"] {
        for interface in ["all", "lo", "eth0"] {
            dns.netns().set_sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), value)?;
        }
        dns.assert_captured()?;
        ensure!(dns.ask(dns.there(), WHO)?.contains(&dns.there()));
        let mut stream = connect(dns.netns(), dns.nowhere()[0])?;
        ensure!(ask_tcp(&mut stream, SERVICE, dns.there())? == [dns.service()]);
    }
    Ok(())
}

#[test]
fn pod_that_is_not_in_the_mesh_keeps_its_dns() -> Result<()> {
    for family in [Family::V4, Family::V6] {
        let cluster = Cluster::start()?;
        let resolver = Resolver::start(&cluster.client.netns, &[cluster.client.ip(family)])?;
        let found = ask(&cluster.server.netns, cluster.client.ip(family), WHO, PATIENCE)?;
        let (_, addresses) = found.context("no answer came")?;
        ensure!(addresses == [cluster.client.ip(family)]);
        let asked = resolver.asked();
        ensure!(asked.len() == 1 && asked[0].0.ip() == cluster.server.ip(family), "{asked:?}");
    }
    Ok(())
}

/// The kernel splits what a socket sends with UDP_SEGMENT after our programs have seen it: only the first
/// of the datagrams can be read there, and that is no query.
fn datagrams_in_one_do_not_hide_a_query(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let hide = || {
        dns.netns().run(|| {
            let socket = connected(dns.there())?;
            let query = dns::query(7, WHO, dns.there())?;
            let mut answer = query.clone();
            answer[2] |= 0x80;
            let segment = query.len().try_into().context("a segment's length")?;
            setsockopt(&socket, sockopt::UdpGsoSegment, &segment).context("set UDP_SEGMENT")?;
            socket.send(&[answer, query].concat()).context("send two datagrams")?;
            Ok(socket)
        })
    };
    let has_come = |from: &UdpSocket| -> Result<bool> {
        let port = from.local_addr()?.port();
        Ok(dns.resolver.asked().iter().any(|(client, _)| client.port() == port))
    };
    dns.capture(false)?;
    let hidden = hide()?;
    wait_for("the query", SOON, || Ok(has_come(&hidden)?.then_some(())))?;
    dns.capture(true)?;
    for _ in 0..5 {
        let hidden = hide()?;
        thread::sleep(A_WHILE);
        ensure!(!has_come(&hidden)?, "a query went past the proxy");
    }
    dns.assert_captured()
}

/// Whoever has the proxy's uid may share its port with it, and then gets some of the pod's own
/// connections to resolvers, or has them refused; but it does not get the proxy's mark, which would let it
/// call everybody.
fn application_that_joins_the_proxys_group_is_not_taken_for_it(family: Family) -> Result<()> {
    let dns = Dns::start(family)?;
    let listener = dns.netns().run(|| {
        let at = SocketAddr::new(family.localhost(), PORT_PROXY_DNS);
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
        socket.set_reuse_port(true)?;
        socket.bind(&at.into()).context("share the port")?;
        socket.listen(64)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?;
    let connections: Vec<TcpStream> =
        (0..32).filter_map(|_| connect(dns.netns(), dns.nowhere()[0]).ok()).collect();
    let mut accepted = 0;
    while let Ok((socket, _)) = listener.accept() {
        let mark = socket.mark().context("read its mark")?;
        ensure!(mark & MARK_MASK != MARK_PROXY, "it has the mark {mark:#x}");
        accepted += 1;
    }
    let all_proxys = connections.len() == 32 && accepted == 0;
    ensure!(!all_proxys, "the group was not joined");
    Ok(())
}

/// Any process of the pod may have the port at another address of loopback.
#[test]
fn process_that_has_the_port_elsewhere_on_loopback_does_not_answer_for_the_resolver() -> Result<()>
{
    let dns = Dns::start(Family::V4)?;
    dns.netns().run(|| {
        let client = connected(dns.there())?;
        client.set_read_timeout(Some(PATIENCE))?;
        let query = dns::query(7, SLOW, dns.there())?;
        client.send(&query).context("send a query")?;
        wait_for("the query upstream", SOON, || {
            Ok(dns.resolver.asked().iter().any(|(_, name)| name == SLOW).then_some(()))
        })?;
        let other = UdpSocket::bind(("127.0.0.2", PORT_PROXY_DNS)).context("share the port")?;
        let forged = dns::answer(&query, false, |_| Some(vec![[192, 0, 2, 66].into()]));
        let (forged, _) = forged.context("no answer to forge")?;
        other.send_to(&forged, client.local_addr()?).context("send the forged answer")?;
        let mut answer = [0; 512];
        let len = client.recv(&mut answer).context("receive an answer")?;
        ensure!(answer[..len] != forged, "the resolver's name is on a forged answer");
        Ok(())
    })?;
    dns.assert_captured()
}

/// Over time, a pod uses all of its places.
#[test]
fn flows_that_neighbours_no_longer_need_cost_a_pod_nothing() -> Result<()> {
    let dns = Dns::with_flags(Family::V4, &["--verify-interval", "1s"], true)?;
    let map = MapData::from_pin(dns.cluster.node.bpffs().join("dns_flows"))?;
    let mut flows: HashMap<_, DnsKey, DnsFlow> = HashMap::try_from(Map::HashMap(map))?;
    let nobody = Addr { octets: [0; 16] };
    let ended = DnsFlow {
        needed_until_ns: 1,
        client: nobody,
        resolver: nobody,
        asked: 1,
        answered: 1,
        alias: 0,
        resolver_port: 0,
        client_port: 0,
        ended: 1,
    };
    // No namespace has such a number: those of the kernel are above it.
    let all = (1..=256_u32).flat_map(|pod_id| (0..DNS_PLACES).map(move |place| (pod_id, place)));
    for (pod_id, place) in all {
        let key = DnsKey { pod_id, place, protocol: PROTOCOL_UDP };
        if flows.insert(key, ended, 0).is_err() {
            break;
        }
    }
    wait_for("the flows that are over to be gone", SOON, || {
        Ok((flows.keys().count() < usize::from(DNS_PLACES)).then_some(()))
    })?;
    dns.assert_captured()
}
