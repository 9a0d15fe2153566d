//! The programs that run in the kernel against `verdict.rs` as their model: the same packets, in
//! the same surroundings, must have the same fate.
//!
//! Needs root: BPF programs, and a network namespace that nobody sees. `BYTECODE_SEED` repeats a
//! run that has failed.
#![allow(missing_docs, reason = "a test: its items are documented where the reader needs it")]

mod kernel;
mod packet;
mod sys;
mod world;

use std::{
    fs::{self, File},
    net::TcpStream,
    num::NonZeroU32,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use nix::{
    sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, unshare},
    unistd::{Pid, geteuid, gettid},
};
use redirect_ebpf::{
    abi::{
        Addr, Counter, DECISION_BYPASS, DECISION_ENROLLED, Flow, HINT_FROM_POD, HINT_FROM_PROXY,
        HINT_FROM_VIRTUAL, HINT_NONE, HINT_QUESTION, Hint, LISTENER_HBONE, LISTENER_OUTBOUND,
        MARK_DIRECT, MARK_INBOUND, MARK_PROXY, MARK_REDIRECTED, MARK_RESCUED, MARK_VIRTUAL,
        POD_CAPTURE, PORT_PROXY_DNS, PodEntry, PodId,
    },
    dns::{self, Dns, Message},
    verdict::{
        self, Fate, Hidden, Lookup, Segment, Steer, Verdict, Virtual, mesh_mark, with_mesh_mark,
    },
};

use crate::{
    kernel::{Kernel, RanTcx, Tcx},
    packet::{Packet, choose},
    world::{Connection, Since, World, own_id},
};

const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const TC_ACT_REDIRECT: u32 = 7;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// How many surroundings, and how many packets in each.
const WORLDS: usize = 150;
const PACKETS: usize = 250;
/// How long surroundings last at most: a processor that is emulated is slow, and a flow of DNS is known
/// by the 5 s that it was to last.
const WORLD: Duration = Duration::from_millis(1500);

#[test]
fn the_bytecode_and_verdict_rs_give_the_same_verdict_for_generated_packets() -> Result<()> {
    let seed = match std::env::var("BYTECODE_SEED") {
        Ok(seed) => seed.parse().with_context(|| format!("parse BYTECODE_SEED {seed}"))?,
        Err(_) => fastrand::u64(..),
    };
    let seen = in_a_namespace(|cpu| {
        let mut rng = Rng::with_seed(seed);
        let neighbour = world::Listener::open("[::]:0".parse()?, false, MARK_PROXY)?;
        // The listeners of the other pods are in namespaces of their own, this one here.
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        // For connections; their routes lead nowhere else.
        for command in [
            "link set lo up",
            "route add local default dev lo",
            "-6 route add local default dev lo",
        ] {
            ip(command)?;
        }
        let pods = [&[own_id()][..], &world::others()].concat();
        let mut kernel = Kernel::load(cpu, &pods)?;
        kernel.share()?;
        let netns = File::open("/proc/thread-self/ns/net")?;
        let _attached = kernel.attach_lookup(own_id(), &netns)?;
        let mut seen = Seen::default();
        world::wait_for_long_ago();
        for number in 0..WORLDS {
            // Of its own, so that the seed repeats it however many packets the one before has got to.
            let mut rng = rng.fork();
            let world = World::random(&mut rng)?;
            kernel.maps.enter(&world.pods, &world.addresses)?;
            kernel.maps.trust(&world.proxy_cgroups)?;
            kernel.maps.exclude(own_id(), world.excluded)?;
            kernel.maps.set_virtual(own_id(), world.virtual_flags, world.excluded_outbound)?;
            kernel.maps.want_verdicts(rng.bool())?;
            if let Some(source) = world.probe_source {
                kernel.maps.set_probe_source(source)?;
            }
            let mut checks = Checks { kernel: &mut kernel, world, neighbour: &neighbour };
            let begun = Instant::now();
            for packet in 0..PACKETS {
                if begun.elapsed() > WORLD {
                    break;
                }
                checks
                    .one(&mut rng, &mut seen)
                    .with_context(|| format!("packet {packet} in {:?}", checks.world))
                    .with_context(|| format!("world {number}"))?;
            }
            checks.kernel.maps.clear()?;
        }
        Ok(seen)
    })
    .with_context(|| format!("BYTECODE_SEED={seed}"))?;
    // The generator is worth what it reaches.
    println!("BYTECODE_SEED={seed}: {seen:#?}");
    seen.check().with_context(|| format!("BYTECODE_SEED={seed}"))
}

#[test]
fn a_pods_program_and_the_shared_one_do_nothing_without_each_other() -> Result<()> {
    in_a_namespace(|cpu| {
        let pod_id = own_id();
        let mut kernel = Kernel::load(cpu, &[pod_id])?;
        // A pod that bypasses: whoever decides lets everything pass.
        kernel.maps.enter(&[(pod_id, entry(DECISION_BYPASS, 0))].into(), &[].into())?;
        for v4 in [true, false] {
            let address = Addr::loopback(v4);
            let (local_port, remote_port) = (80, 40_000);
            let flow = Flow { local: address, remote: address, local_port, remote_port };
            for tcp in [true, false] {
                let stub =
                    |kernel: &Kernel| anyhow::Ok(kernel.run_lookup(pod_id, v4, tcp, &flow)?.ret);
                same("without the shared one", &SK_DROP, &stub(&kernel)?)?;
                kernel.share()?;
                same("with it", &SK_PASS, &stub(&kernel)?)?;
                let shared = kernel.run_shared(pod_id, tcp, &flow)?;
                same("the shared one alone", &SK_DROP, &shared.ret)?;
                same("socket", &None, &shared.cookie)?;
                kernel.unshare()?;
                same("without it again", &SK_DROP, &stub(&kernel)?)?;
            }
        }
        same("count", &None, &kernel.maps.take_count()?)
    })
}

/// The kernel refuses a program after a million; older ones prune less than newer ones.
#[test]
fn every_kernels_verifier_has_little_to_do() -> Result<()> {
    for (name, count) in kernel::verified()? {
        ensure!(count < 250_000, "{name}: the verifier looked at {count} instructions");
    }
    Ok(())
}

/// What no test run shows: there every packet has a socket.
#[test]
fn the_guard_tells_what_the_pod_opens_from_what_it_only_forwards() -> Result<()> {
    // Nobody is there. The first answer would be sent again after a second.
    let call = || -> Result<()> {
        for server in ["192.0.2.1:80", "[2001:db8::1]:80"] {
            let called = TcpStream::connect_timeout(&server.parse()?, Duration::from_millis(100));
            ensure!(called.is_err(), "somebody answers at {server}");
        }
        Ok(())
    };
    in_a_namespace(|cpu| {
        let pod_id = own_id();
        let mut kernel = Kernel::load(cpu, &[pod_id])?;
        let entry = entry(DECISION_ENROLLED, POD_CAPTURE);
        kernel.maps.enter(&[(pod_id, entry)].into(), &[].into())?;
        let counted = |kernel: &Kernel, counter| {
            same("counted", &vec![((pod_id, counter), 2)], &kernel.maps.counts()?)
        };
        let (here, guest_id) = mpsc::channel();
        let (go, started) = mpsc::channel();
        thread::scope(|scope| {
            // The guest does not wait for who has failed.
            let go = go;
            let guest = scope.spawn(move || {
                unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
                here.send(gettid())?;
                started.recv()?;
                for command in [
                    "link set guest up",
                    "address add 10.0.0.9/24 dev guest",
                    "address add fd00::9/64 dev guest nodad",
                    "route add default via 10.0.0.2",
                    "-6 route add default via fd00::2",
                    "neighbour add 10.0.0.2 lladdr 02:00:00:00:00:02 dev guest",
                    "neighbour add fd00::2 lladdr 02:00:00:00:00:02 dev guest",
                ] {
                    ip(command)?;
                }
                here.send(gettid())?;
                started.recv()?;
                call()
            });
            ip("link set lo up")?;
            // Who waits for an answer to the question where a neighbour is has sent nothing yet.
            ip(&format!(
                "link add pod address 02:00:00:00:00:02 type veth \
                 peer name guest address 02:00:00:00:00:09 netns {}",
                guest_id.recv()?
            ))?;
            for command in [
                "link set pod up",
                "address add 10.0.0.2/24 dev pod",
                "address add fd00::2/64 dev pod nodad",
                "route add default via 10.0.0.9",
                "-6 route add default via fd00::9",
                "neighbour add 10.0.0.9 lladdr 02:00:00:00:00:09 dev pod",
                "neighbour add fd00::9 lladdr 02:00:00:00:00:09 dev pod",
            ] {
                ip(command)?;
            }
            kernel.attach_guard("pod")?;
            go.send(())?;
            guest_id.recv()?;
            call()?;
            counted(&kernel, Counter::RescuedOutbound)?;
            for sysctl in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{sysctl}"), "1").context("forward")?;
            }
            kernel.maps.clear_counts()?;
            go.send(())?;
            guest.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            counted(&kernel, Counter::Forwarded)
        })
    })
}

/// Runs `f` in a network namespace of its own, on one CPU, whose number it gets.
fn in_a_namespace<T: Send>(f: impl FnOnce(usize) -> Result<T> + Send) -> Result<T> {
    ensure_root()?;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
            let cpu = sched_getcpu().context("find this CPU")?;
            let mut only = CpuSet::new();
            only.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &only).context("stay on this CPU")?;
            f(cpu)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `ip` in the namespace of the calling thread.
fn ip(command: &str) -> Result<()> {
    let status = Command::new("ip").args(command.split(' ')).status().context("run ip")?;
    ensure!(status.success(), "ip {command}: {status}");
    Ok(())
}

/// What is decided about a pod.
fn entry(decision: u32, flags: u32) -> PodEntry {
    let none = Addr { octets: [0; 16] };
    PodEntry { decision, reason: 0, flags, uplink: 0, captured_at_ns: 0, v4: none, v6: none }
}

fn ensure_root() -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "refuse to run: BPF programs and network namespaces need root (use `cargo xtask test`)"
    );
    Ok(())
}

/// How often each outcome was met.
#[derive(Debug, Default)]
struct Seen {
    next: usize,
    drop: usize,
    reset: usize,
    unwritable_reset: usize,
    port_taken: usize,
    hint_from_proxy: usize,
    hint_from_pod: usize,
    hint_from_virtual: usize,
    sent_back: usize,
    no_listener: usize,
    forged: usize,
    /// An answer, a call, a later packet.
    leaves: [usize; 3],
    proxys_leaves: [usize; 2],
    deaf_stray: usize,
    proxy_without_mark: usize,
    cannot_leave: usize,
    guard_proxys_mark: usize,
    rescued_outbound: usize,
    rescued_inbound: usize,
    rescued_later: usize,
    rescued_dns: [usize; 2],
    refused_past_proxy: usize,
    unwritable_abort: usize,
    settled_direct: usize,
    unknown_pod: usize,
    unreadable: [usize; 2],
    found_proxy: usize,
    too_short_for_the_kernel: usize,
    pass: usize,
    counted_pass: usize,
    bypassed_inbound: usize,
    kubelet_probe: usize,
    probe_source: usize,
    outbound: usize,
    inbound: usize,
    hbone: usize,
    translated: usize,
    refused_forged: usize,
    neighbours_listener: usize,
    no_listener_to_redirect_to: usize,
    refuse: usize,
    dns_ask: usize,
    dns_alias: usize,
    dns_answer: usize,
    dns_drop: usize,
    dns_busy: usize,
    dns_servfail: usize,
    dns_unanswerable: usize,
    dns_unreadable: usize,
    dns_unread_answer: usize,
}

impl Seen {
    fn check(&self) -> Result<()> {
        for (outcome, times) in [
            ("next", self.next),
            ("drop", self.drop),
            ("reset", self.reset),
            ("reset of what cannot be rewritten", self.unwritable_reset),
            ("reset by a port that is taken", self.port_taken),
            ("hint from proxy", self.hint_from_proxy),
            ("hint from the pod", self.hint_from_pod),
            ("hint from a virtual interface", self.hint_from_virtual),
            ("reset sent back", self.sent_back),
            ("nobody listens", self.no_listener),
            ("a forged address", self.forged),
            ("a stray answer leaves", self.leaves[0]),
            ("a stray call leaves", self.leaves[1]),
            ("a stray packet leaves", self.leaves[2]),
            ("the proxy's stray call leaves", self.proxys_leaves[0]),
            ("the proxy's stray packet leaves", self.proxys_leaves[1]),
            ("a stray answer, and nobody listens", self.deaf_stray),
            ("a stray packet, and no interface", self.cannot_leave),
            ("the proxy's call without its mark", self.proxy_without_mark),
            ("the guard: the proxy's mark, but the application's", self.guard_proxys_mark),
            ("the guard: rescued outbound", self.rescued_outbound),
            ("the guard: rescued inbound", self.rescued_inbound),
            ("the guard: a later packet rescued", self.rescued_later),
            ("the guard: rescued DNS over UDP", self.rescued_dns[0]),
            ("the guard: rescued DNS over TCP", self.rescued_dns[1]),
            ("the guard: refused past the proxy", self.refused_past_proxy),
            ("the guard: what cannot be rewritten", self.unwritable_abort),
            ("the guard: direct", self.settled_direct),
            ("the guard: an unknown pod", self.unknown_pod),
            ("the guard: TCP that cannot be parsed", self.unreadable[0]),
            ("TCP of a guest that cannot be parsed", self.unreadable[1]),
            ("find_proxy finds", self.found_proxy),
            ("pass", self.pass),
            ("counted pass", self.counted_pass),
            ("bypassed inbound", self.bypassed_inbound),
            ("kubelet's probe", self.kubelet_probe),
            ("a probe by its source", self.probe_source),
            ("redirect outbound", self.outbound),
            ("redirect inbound", self.inbound),
            ("HBONE", self.hbone),
            ("a translated destination", self.translated),
            ("a forged address at sk_lookup", self.refused_forged),
            ("a neighbour's listener", self.neighbours_listener),
            ("no listener to redirect to", self.no_listener_to_redirect_to),
            ("refuse", self.refuse),
            ("DNS to the proxy", self.dns_ask),
            ("DNS by another port", self.dns_alias),
            ("DNS to the client", self.dns_answer),
            ("DNS dropped", self.dns_drop),
            ("SERVFAIL", self.dns_servfail),
            ("DNS refused and not answered", self.dns_unanswerable),
            ("the guard: DNS that cannot be parsed", self.dns_unreadable),
            ("an answer that cannot be parsed", self.dns_unread_answer),
        ] {
            ensure!(times > 0, "no packet reaches the outcome `{outcome}`");
        }
        Ok(())
    }
}

/// The comparisons in one world.
struct Checks<'a> {
    kernel: &'a mut Kernel,
    world: World,
    neighbour: &'a world::Listener,
}

impl Checks<'_> {
    fn one(&mut self, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
        self.change_state(rng)?;
        match rng.u8(..24) {
            0..6 => self.tcx(Tcx::Lo, rng, seen)?,
            6..10 => self.tcx(Tcx::Interface, rng, seen)?,
            10..13 => self.tcx(Tcx::Virtual, rng, seen)?,
            13..18 => self.tcx(Tcx::Out, rng, seen)?,
            18 => self.find_proxy(rng, seen)?,
            _ => self.lookup(rng, seen)?,
        }
        let state = self.world.state.borrow();
        let maps = &self.kernel.maps;
        same("hint", &state.hint, &maps.hint()?)?;
        same("maps strays and any_strays", &state.strays, &maps.strays()?)?;
        same("map listeners", &state.listeners.keys().copied().collect(), &maps.listeners()?)?;
        same("map proxy_missing", &state.missing, &maps.missing()?)?;
        same("map dns_flows", &state.flows, &maps.flows()?)
    }

    /// Proxies come and go, and the grace runs out.
    fn change_state(&mut self, rng: &mut Rng) -> Result<()> {
        let key = self.world.random_key(rng);
        let mut state = self.world.state.borrow_mut();
        let maps = &mut self.kernel.maps;
        match rng.u8(..10) {
            9 => {
                let pods = [own_id(), world::pod_id(rng)].into_iter().filter(|_| rng.u8(..4) > 0);
                state.strays = (pods.collect(), rng.u8(..8) > 0);
                maps.set_strays(&state.strays.0, state.strays.1)?;
            }
            7.. => {
                let (key, flow) = world::dns_flow(rng);
                maps.set_flow(&key, &flow)?;
                state.flows.insert(key, flow);
            }
            0..3 => {
                let socket = if key.0 == own_id() {
                    self.world.proxy_socket(key.1)
                } else {
                    Some(self.neighbour)
                };
                if let Some(socket) = socket {
                    maps.set_listener(key, Some(socket))?;
                    state.listeners.insert(key, socket.cookie);
                }
            }
            3 => {
                maps.set_listener(key, None)?;
                state.listeners.remove(&key);
            }
            4 | 5 => {
                let since = choose(rng, &[Since::Now, Since::LongAgo]);
                maps.set_missing(key, Some(since))?;
                state.missing.insert(key, since);
            }
            _ => {
                maps.set_missing(key, None)?;
                state.missing.remove(&key);
            }
        }
        Ok(())
    }

    /// Sometimes the flow is kubelet's, or was one of its long ago.
    fn note_kubelets(&mut self, rng: &mut Rng, flow: Flow) -> Result<()> {
        let since = match rng.u8(..8) {
            0..2 => Since::Now,
            2 => Since::LongAgo,
            _ => return Ok(()),
        };
        self.kernel.maps.set_kubelets(&flow, since)?;
        self.world.kubelets = (since == Since::Now).then_some(flow);
        Ok(())
    }

    /// An earlier packet has left a hint behind, for this very flow or for another one.
    fn set_hint(&mut self, hint: Hint) -> Result<()> {
        self.world.state.borrow_mut().hint = (hint.kind != HINT_NONE).then_some(hint);
        self.kernel.maps.set_hint(hint)
    }

    fn find_proxy(&mut self, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
        self.world.open = None;
        self.set_hint(stale_hint(rng))?;
        let found = self.world.find_proxy();
        seen.found_proxy += usize::from(found != 0);
        same("what find_proxy finds", &found, &self.kernel.find_proxy()?)
    }

    fn tcx(&mut self, at: Tcx, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
        let packet = Packet::random(rng);
        let mark = match &packet.message {
            Some(answer) if answer.segment.src_port == PORT_PROXY_DNS && rng.bool() => MARK_PROXY,
            _ => mark(rng),
        };
        self.set_hint(stale_hint(rng))?;
        self.world.open = None;
        if let Some(segment) = &packet.segment {
            // An answer's is that of its sender.
            let flows = [segment.receiver_flow(), segment.sender_flow()];
            let flow = choose(rng, &flows);
            self.note_kubelets(rng, flow)?;
            match rng.u8(..6) {
                0 => self.world.open = Connection::open(segment.receiver_flow(), 0),
                // The one that has sent it.
                1 if at == Tcx::Lo => {
                    let mark = choose(rng, &[MARK_PROXY, 0x0abc_0000 | MARK_PROXY, 0]);
                    self.world.open = Connection::open(segment.sender_flow(), mark);
                }
                _ => {}
            }
        }
        let Some(ran) = self.kernel.run_tcx(at, &packet.bytes, mark, 1)? else {
            // Who knows what hint it would have left.
            self.set_hint(stale_hint(rng))?;
            seen.too_short_for_the_kernel += 1;
            return Ok(());
        };
        if at != Tcx::Out {
            self.world.state.borrow_mut().hint = None;
        }
        if let (Tcx::Lo, Some(message)) = (at, &packet.message)
            && dns::concerns(message)
        {
            let dns = dns::on_lo(mark, message, &self.world);
            if dns != Dns::Other {
                return self.dns(dns, message, &packet, mark, &ran, seen).with_context(|| {
                    format!("{dns:?}, mark {mark:#x}: {message:?} in {packet:?}")
                });
            }
        }
        if let (Tcx::Lo, Some((src, dst))) = (at, &packet.unread)
            && let Some(pod_id) = dns::drops_unread(mark, src, dst, &self.world)
        {
            seen.dns_unread_answer += 1;
            same("return value", &TC_ACT_SHOT, &ran.ret)?;
            let count = Some((pod_id, Counter::DroppedDnsUnreadable));
            same("count", &count, &self.kernel.maps.take_count()?)?;
            return self.kernel.maps.were_about(None);
        }
        let verdict = self.verdict(at, mark, &packet);
        self.note_seen(at, &verdict, mark, &packet, seen);
        let mut compare = || {
            self.compare(at, &verdict, mark, &packet, &ran, seen)?;
            if verdict.settle.is_some() && verdict.count == Some(Counter::RescuedInbound) {
                // This socket is no TCP socket, so it has no connection: nothing is recorded for it.
                self.kernel.run_tcx(at, &packet.bytes, mark, 2)?;
                let count = vec![(own_id(), Counter::RescuedInbound); 2];
                same("counts of two", &count, &self.kernel.maps.take_counts()?)?;
            }
            anyhow::Ok(())
        };
        compare().with_context(|| format!("{verdict:?}, {at:?}, mark {mark:#x}: {packet:?}"))
    }

    /// What the decisions say, and the hint that is left.
    fn verdict(&self, at: Tcx, mark: u32, packet: &Packet) -> Verdict {
        let (segment, world) = (packet.segment.as_ref(), &self.world);
        let verdict = match at {
            Tcx::Lo => verdict::on_lo(mark, segment, world),
            Tcx::Interface => verdict::on_interface(packet.ip, segment, world),
            Tcx::Virtual => self.on_virtual(packet),
            Tcx::Out if !packet.ip => Verdict::NEXT,
            Tcx::Out => {
                verdict::on_egress(mark, packet.message.as_ref().ok_or(packet.hidden), world)
            }
        };
        let mut state = world.state.borrow_mut();
        if let (Some(kind), Some(segment)) = (verdict.hint, segment) {
            let (flow, device) = (segment.receiver_flow(), world::own_device());
            state.hint = Some(Hint { flow, device, kind: kind.get() });
        }
        if verdict.fate == Fate::Leave {
            state.strays.0.insert(verdict.pod_id);
            state.strays.1 = true;
        }
        verdict
    }

    fn compare(
        &mut self,
        at: Tcx,
        verdict: &Verdict,
        mark: u32,
        packet: &Packet,
        ran: &RanTcx,
        seen: &mut Seen,
    ) -> Result<()> {
        let Verdict { fate, mark: new, hint, pod_id, count, .. } = *verdict;
        let written = packet.has_checksum;
        let returned = match fate {
            Fate::Next => TC_ACT_UNSPEC,
            Fate::Reset if at == Tcx::Lo && written => TC_ACT_UNSPEC,
            Fate::Reset if written => TC_ACT_REDIRECT,
            Fate::Abort if written => TC_ACT_UNSPEC,
            Fate::Leave => self.leaves(),
            Fate::ToLo => TC_ACT_REDIRECT,
            Fate::Drop | Fate::Reset | Fate::Abort => TC_ACT_SHOT,
        };
        same("return value", &returned, &ran.ret)?;
        same("mark", &new.map_or(mark, |new| with_mesh_mark(mark, new.get())), &ran.mark)?;
        let mut counted: Vec<_> = count.map(|counter| (pod_id, counter)).into_iter().collect();
        let mut found = self.kernel.maps.take_counts()?;
        for counts in [&mut counted, &mut found] {
            counts.sort_unstable_by_key(|(_, counter)| *counter as u32);
        }
        same("counts", &counted, &found)?;
        let read = match (at, &packet.message) {
            (Tcx::Lo | Tcx::Out, Some(message)) => Some((message.segment, message.tcp)),
            _ => packet.segment.map(|segment| (segment, true)),
        };
        self.kernel.maps.were_about(read.map(|(segment, tcp)| (segment.receiver_flow(), tcp)))?;
        match fate {
            Fate::Reset if !written => seen.unwritable_reset += 1,
            Fate::Reset if at == Tcx::Lo => {
                seen.reset += 1;
                packet.check_reset(&ran.packet)?;
            }
            Fate::Reset => {
                seen.sent_back += 1;
                packet.check_sent_back(&ran.packet)?;
            }
            Fate::Abort if !written => seen.unwritable_abort += 1,
            Fate::Abort => packet.check_aborted(&ran.packet)?,
            Fate::ToLo => packet.check_to_lo(&ran.packet)?,
            Fate::Next | Fate::Drop | Fate::Leave => same("packet", &packet.bytes, &ran.packet)?,
        }
        match (fate, count) {
            (Fate::Leave, _) if returned == TC_ACT_SHOT => seen.cannot_leave += 1,
            (Fate::Leave, Some(_)) => {
                seen.leaves[usize::from(packet.segment.is_some_and(|s| s.opens))] += 1;
            }
            (Fate::Leave, None) => seen.leaves[2] += 1,
            (Fate::ToLo, Some(Counter::RescuedOutbound)) => seen.rescued_outbound += 1,
            (Fate::ToLo, Some(Counter::RescuedInbound)) => seen.rescued_inbound += 1,
            (Fate::ToLo, _) if packet.message.is_some_and(|message| message.segment.opens) => {
                seen.rescued_dns[usize::from(packet.segment.is_some())] += 1;
            }
            (Fate::ToLo, _) => seen.rescued_later += 1,
            (Fate::Abort, _) => seen.refused_past_proxy += 1,
            (Fate::Reset, Some(Counter::RefusedPortTaken)) => seen.port_taken += 1,
            (Fate::Reset, Some(Counter::NoListener)) => seen.no_listener += 1,
            (Fate::Drop, Some(Counter::RefusedForgedAddress)) => seen.forged += 1,
            (Fate::Drop, Some(Counter::RefusedUnknownPod)) => seen.unknown_pod += 1,
            (Fate::Drop, Some(Counter::DroppedUnreadable)) => {
                seen.unreadable[usize::from(at == Tcx::Virtual)] += 1;
            }
            (Fate::Drop, Some(Counter::DroppedDnsUnreadable)) => seen.dns_unreadable += 1,
            (Fate::Drop, _) => seen.drop += 1,
            (Fate::Next, _) if verdict.settle.is_some() => seen.settled_direct += 1,
            (Fate::Next, _) => seen.next += 1,
            (Fate::Reset, _) => {}
        }
        match hint.map(NonZeroU32::get) {
            Some(HINT_FROM_PROXY) => seen.hint_from_proxy += 1,
            Some(HINT_FROM_POD) => seen.hint_from_pod += 1,
            Some(HINT_FROM_VIRTUAL) => seen.hint_from_virtual += 1,
            _ => {}
        }
        Ok(())
    }

    /// What the surroundings have made of a packet.
    fn note_seen(&self, at: Tcx, verdict: &Verdict, mark: u32, packet: &Packet, seen: &mut Seen) {
        let Some(segment) = &packet.segment else { return };
        let deaf = std::mem::take(&mut self.world.state.borrow_mut().deaf);
        seen.deaf_stray += usize::from(deaf);
        let proxys = mesh_mark(mark) == MARK_PROXY;
        let by_proxy = self.world.open.as_ref().is_some_and(|open| {
            self.world.trusts(open.marked) && open.flow == segment.sender_flow()
        });
        match (at, verdict.fate) {
            (Tcx::Lo, Fate::Leave) if by_proxy => {
                seen.proxys_leaves[usize::from(!segment.opens)] += 1;
            }
            (Tcx::Lo, Fate::Next) if by_proxy && !proxys && verdict.mark.is_some() => {
                seen.proxy_without_mark += 1;
            }
            (Tcx::Out, Fate::ToLo) if proxys => seen.guard_proxys_mark += 1,
            _ => {}
        }
    }

    /// What a program returns for a packet that leaves.
    fn leaves(&self) -> u32 {
        match self.world.pods.get(&own_id()) {
            Some(PodEntry { uplink: 1.., .. }) => TC_ACT_REDIRECT,
            _ => TC_ACT_SHOT,
        }
    }

    fn on_virtual(&self, packet: &Packet) -> Verdict {
        let (segment, world) = (packet.segment.as_ref(), &self.world);
        let pod_id = own_id();
        match world.virtual_flags {
            Some(flags) if !verdict::is_inbound(segment, pod_id, world) => {
                let interface = Virtual { pod_id, flags };
                let hides_tcp = packet.hidden == Hidden::Tcp;
                verdict::on_virtual(packet.ip, segment, hides_tcp, &interface, world)
            }
            _ => verdict::on_interface(packet.ip, segment, world),
        }
    }

    fn dns(
        &mut self,
        dns: Dns,
        message: &Message,
        packet: &Packet,
        mark: u32,
        ran: &RanTcx,
        seen: &mut Seen,
    ) -> Result<()> {
        let old = &message.segment;
        let returned = |written| if written { TC_ACT_UNSPEC } else { TC_ACT_SHOT };
        let (returned, new_mark, count) = match dns {
            Dns::Other => (TC_ACT_UNSPEC, mark, None),
            Dns::Ask { pod_id, from_port, count } => {
                let new = Segment {
                    dst: Addr::loopback(old.dst.is_v4()),
                    dst_port: PORT_PROXY_DNS,
                    src_port: from_port,
                    ..*old
                };
                let written = packet.has_checksum || new == *old;
                if written {
                    packet.check_readdressed(&ran.packet, &new)?;
                }
                seen.dns_ask += 1;
                seen.dns_alias += usize::from(from_port != old.src_port);
                let count = count.map(|counter| (pod_id, counter));
                (returned(written), with_mesh_mark(mark, MARK_REDIRECTED), count)
            }
            Dns::Answer { from, from_port, to_port } => {
                let new = Segment { src: from, src_port: from_port, dst_port: to_port, ..*old };
                let written = packet.has_checksum || new == *old;
                if written {
                    packet.check_readdressed(&ran.packet, &new)?;
                }
                seen.dns_answer += 1;
                (returned(written), with_mesh_mark(mark, MARK_REDIRECTED), None)
            }
            Dns::Drop(pod_id, counter) => {
                seen.dns_drop += 1;
                (TC_ACT_SHOT, mark, Some((pod_id, counter)))
            }
            Dns::Refuse(pod_id, counter) => {
                let written = if message.tcp { packet.has_checksum } else { packet.answerable };
                match (written, message.tcp) {
                    (false, _) => seen.dns_unanswerable += 1,
                    (true, true) => packet.check_reset(&ran.packet)?,
                    (true, false) => {
                        packet.check_refused(&ran.packet)?;
                        seen.dns_servfail += 1;
                    }
                }
                seen.dns_busy += usize::from(counter == Counter::RefusedDnsBusy);
                (returned(written), mark, Some((pod_id, counter)))
            }
        };
        same("return value", &returned, &ran.ret)?;
        same("mark", &new_mark, &ran.mark)?;
        same("count", &count, &self.kernel.maps.take_count()?)?;
        self.kernel.maps.were_about(Some((old.receiver_flow(), message.tcp)))
    }

    fn lookup(&mut self, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
        self.world.open = None;
        let v4 = rng.bool();
        let (remote, local) = world::addresses(rng, v4);
        let flow =
            Flow { local, remote, local_port: world::port(rng), remote_port: world::port(rng) };
        self.note_kubelets(rng, flow)?;
        // A test run of `sk_lookup` has no interface; the kernel's own question on `lo` has, but
        // cannot ask for an IPv4 address in IPv6.
        let on_lo = rng.bool() && v4 == local.is_v4() && v4 == remote.is_v4();
        let tcp = rng.u8(..8) > 0;
        // On `lo` it is the program that is attached.
        let pod_id = if on_lo || rng.bool() { own_id() } else { world::pod_id(rng) };
        let hint = lookup_hint(rng, flow);
        self.set_hint(hint)?;
        let lookup = Lookup { pod_id, tcp, flow, on_lo, hint };
        let steer = verdict::steer(&lookup, &self.world);

        let (returned, count, chosen) = self.steered(pod_id, v4, steer);
        let mut compare = || {
            if on_lo {
                let found = match (returned, chosen) {
                    (SK_DROP, _) => None,
                    (_, Some(cookie)) => self.port(cookie),
                    _ if tcp => self.world.listener(&local, flow.local_port).map(port_of),
                    _ => self.world.udp_socket(&local, flow.local_port).map(port_of),
                };
                let asked = self.kernel.ask_on_lo(tcp, &flow)?;
                same("port of the socket", &found, &asked)?;
            } else {
                let ran = self.kernel.run_lookup(pod_id, v4, tcp, &flow)?;
                same("return value", &returned, &ran.ret)?;
                same("cookie of the socket", &chosen, &ran.cookie)?;
            }
            same("count", &count, &self.kernel.maps.take_count()?)?;
            self.kernel.maps.were_about(Some((flow, tcp)))
        };
        compare().with_context(|| format!("{lookup:?} gives {steer:?}"))?;
        match steer {
            Steer::Pass(None) => seen.pass += 1,
            Steer::Pass(Some(Counter::BypassedInbound)) if hint.flow != flow => {
                seen.translated += 1;
            }
            Steer::Pass(Some(Counter::BypassedInbound)) => seen.bypassed_inbound += 1,
            Steer::Pass(Some(Counter::KubeletProbe)) => seen.kubelet_probe += 1,
            Steer::Pass(Some(Counter::ProbeSource)) => seen.probe_source += 1,
            Steer::Pass(Some(_)) => seen.counted_pass += 1,
            Steer::Refuse(Counter::RefusedForgedAddress) => seen.refused_forged += 1,
            Steer::Refuse(_) => seen.refuse += 1,
            Steer::Redirect(_) if chosen.is_none() => seen.no_listener_to_redirect_to += 1,
            Steer::Redirect(_) if chosen == Some(self.neighbour.cookie) => {
                seen.neighbours_listener += 1;
            }
            Steer::Redirect(LISTENER_OUTBOUND) => seen.outbound += 1,
            Steer::Redirect(LISTENER_HBONE) => seen.hbone += 1,
            Steer::Redirect(_) => seen.inbound += 1,
        }
        Ok(())
    }

    /// What the program makes of the decision: its return value, what it counts, and the socket.
    fn steered(
        &self,
        pod_id: PodId,
        v4: bool,
        steer: Steer,
    ) -> (u32, Option<(PodId, Counter)>, Option<u64>) {
        let (chosen, counter) = self.world.steered(pod_id, v4, steer, Some(self.neighbour));
        let returned = if chosen.is_ok() { SK_PASS } else { SK_DROP };
        (returned, counter.map(|counter| (pod_id, counter)), chosen.unwrap_or_default())
    }

    fn port(&self, cookie: u64) -> Option<u16> {
        self.socket(cookie).map(|socket| socket.bound.port())
    }

    fn socket(&self, cookie: u64) -> Option<&world::Listener> {
        self.world.sockets.iter().chain([self.neighbour]).find(|socket| socket.cookie == cookie)
    }
}

fn port_of(socket: &world::Listener) -> u16 {
    socket.bound.port()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, model: &T, kernel: &T) -> Result<()> {
    ensure!(model == kernel, "{what}: {model:x?} by verdict.rs, {kernel:x?} in the kernel");
    Ok(())
}

fn mark(rng: &mut Rng) -> u32 {
    let mesh = choose(
        rng,
        &[
            0,
            0,
            0,
            MARK_PROXY,
            MARK_REDIRECTED,
            MARK_DIRECT,
            MARK_VIRTUAL,
            MARK_RESCUED,
            MARK_INBOUND,
            0x538,
        ],
    );
    choose(rng, &[0, 0, 0x1234_5000, 0xffff_f000]) | mesh
}

/// A hint that an earlier packet has left behind.
fn stale_hint(rng: &mut Rng) -> Hint {
    let v4 = rng.bool();
    let (local, remote) = world::addresses(rng, v4);
    let flow = Flow { local, remote, local_port: world::port(rng), remote_port: world::port(rng) };
    Hint { flow, device: world::own_device(), kind: rng.u32(..8) }
}

/// A hint for this very flow of our pod, mostly; or for one that differs in one place.
fn lookup_hint(rng: &mut Rng, mut flow: Flow) -> Hint {
    let device = if rng.u8(..4) > 0 { world::own_device() } else { rng.u64(..1 << 40) };
    let kinds = [HINT_NONE, HINT_FROM_PROXY, HINT_QUESTION, HINT_FROM_POD, HINT_FROM_VIRTUAL, 7];
    let kind = choose(rng, &kinds);
    match rng.u8(..12) {
        0 => flow.local = flow.remote,
        1 => flow.remote.octets[15] ^= 1,
        2 => flow.remote_port ^= 1,
        3 => std::mem::swap(&mut flow.local, &mut flow.remote),
        // The destination that a packet from outside had before it was translated.
        changed @ 4..6 => match changed {
            4 => flow.local_port ^= 0x100,
            _ => flow.local.octets[15] ^= 1,
        },
        _ => {}
    }
    Hint { flow, device, kind }
}
