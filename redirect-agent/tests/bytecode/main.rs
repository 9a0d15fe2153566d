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

use std::{fs::File, os::fd::AsFd as _, thread};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use nix::{
    sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, unshare},
    unistd::{Pid, geteuid},
};
use redirect_ebpf::{
    abi::{
        Addr, Counter, Flow, HINT_FROM_POD, HINT_FROM_PROXY, HINT_NO_LISTENER, HINT_NONE,
        HINT_QUESTION, Hint, LISTENER_OUTBOUND, MARK_DIRECT, MARK_PROXY, MARK_REDIRECTED,
        PORT_PROXY_DNS, PodId,
    },
    dns::{self, Dns, Message},
    verdict::{self, Fate, Ingress, Lookup, Segment, Steer, with_mesh_mark},
};

use crate::{
    kernel::{Kernel, RanTcx, Tcx},
    packet::{Packet, choose},
    world::{Since, World, own_id},
};

const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// How many surroundings, and how many packets in each.
const WORLDS: usize = 150;
const PACKETS: usize = 200;

#[test]
fn the_bytecode_and_verdict_rs_give_the_same_verdict_for_generated_packets() -> Result<()> {
    let seed = match std::env::var("BYTECODE_SEED") {
        Ok(seed) => seed.parse().with_context(|| format!("parse BYTECODE_SEED {seed}"))?,
        Err(_) => fastrand::u64(..),
    };
    let seen = in_a_namespace(|cpu| {
        let mut rng = Rng::with_seed(seed);
        let mut kernel = Kernel::load(cpu)?;
        let neighbour = world::Listener::open("[::]:0".parse()?, false, MARK_PROXY)?;
        // The listeners of the other pods are in namespaces of their own, this one here.
        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        kernel.attach_lookup(&File::open("/proc/thread-self/ns/net")?)?;
        let mut seen = Seen::default();
        for number in 0..WORLDS {
            let world = World::random(&mut rng)?;
            kernel.maps.enter(&world.pods)?;
            kernel.maps.exclude(own_id(), world.excluded)?;
            if let Some(source) = world.probe_source {
                kernel.maps.set_probe_source(source)?;
            }
            let mut checks = Checks { kernel: &mut kernel, world, neighbour: &neighbour };
            for packet in 0..PACKETS {
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
fn the_debug_log_costs_nothing_while_it_is_off() -> Result<()> {
    ensure_root()?;
    let (quiet, talking) = (kernel::programs(false)?, kernel::programs(true)?);
    for (name, program) in &quiet.programs {
        let quiet_code = sys::translated(program.as_fd())?;
        let talking_code = sys::translated(talking.programs[name].as_fd())?;
        println!("{name}: {} instructions, {} with the log", quiet_code.len(), talking_code.len());
        ensure!(
            !kernel::refers_to(&quiet_code, quiet.log_map),
            "{name} uses the log although it is off"
        );
        ensure!(
            kernel::refers_to(&talking_code, talking.log_map),
            "{name} does not use the log although it is on"
        );
        ensure!(quiet_code.len() < talking_code.len(), "{name} does not shrink");
    }
    Ok(())
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
    hint_from_proxy: usize,
    hint_from_pod: usize,
    hint_no_listener: usize,
    too_short_for_the_kernel: usize,
    pass: usize,
    counted_pass: usize,
    bypassed_inbound: usize,
    kubelet_probe: usize,
    probe_source: usize,
    outbound: usize,
    inbound: usize,
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
            ("hint from proxy", self.hint_from_proxy),
            ("hint from the pod", self.hint_from_pod),
            ("hint no listener", self.hint_no_listener),
            ("pass", self.pass),
            ("counted pass", self.counted_pass),
            ("bypassed inbound", self.bypassed_inbound),
            ("kubelet's probe", self.kubelet_probe),
            ("a probe by its source", self.probe_source),
            ("redirect outbound", self.outbound),
            ("redirect inbound", self.inbound),
            ("a neighbour's listener", self.neighbours_listener),
            ("no listener to redirect to", self.no_listener_to_redirect_to),
            ("refuse", self.refuse),
            ("DNS to the proxy", self.dns_ask),
            ("DNS by another port", self.dns_alias),
            ("DNS to the client", self.dns_answer),
            ("DNS dropped", self.dns_drop),
            ("SERVFAIL", self.dns_servfail),
            ("DNS refused and not answered", self.dns_unanswerable),
            ("DNS that cannot be parsed", self.dns_unreadable),
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
        match rng.u8(..10) {
            0..4 => self.ingress(Tcx::Lo, rng, seen)?,
            4..8 => self.ingress(Tcx::Interface, rng, seen)?,
            _ => self.lookup(rng, seen)?,
        }
        let state = self.world.state.borrow();
        let maps = &self.kernel.maps;
        same("map listeners", &state.listeners.keys().copied().collect(), &maps.listeners()?)?;
        same("map proxy_missing", &state.missing, &maps.missing()?)?;
        same("map dns_flows", &state.flows, &maps.flows()?)
    }

    /// Proxies come and go, and the grace runs out.
    fn change_state(&mut self, rng: &mut Rng) -> Result<()> {
        let key = self.world.random_key(rng);
        let mut state = self.world.state.borrow_mut();
        let maps = &mut self.kernel.maps;
        match rng.u8(..9) {
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

    fn ingress(&mut self, at: Tcx, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
        let packet = Packet::random(rng);
        let mark = mark(rng);
        self.kernel.maps.set_hint(stale_hint(rng))?;
        if let Some(segment) = &packet.segment {
            self.note_kubelets(rng, segment.receiver_flow())?;
        }
        let Some(ran) = self.kernel.run_tcx(at, &packet.bytes, mark)? else {
            seen.too_short_for_the_kernel += 1;
            return Ok(());
        };
        if let (Tcx::Lo, Some(message)) = (at, &packet.message) {
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
            return same("count", &count, &self.kernel.maps.take_count()?);
        }
        let Ingress { fate, mark: new, hint, count } = match at {
            Tcx::Lo => verdict::on_lo(mark, packet.segment.as_ref(), &self.world),
            Tcx::Interface => {
                verdict::on_interface(packet.ip, packet.segment.as_ref(), &self.world)
            }
        };
        let mut compare = || {
            let unwritable = fate == Fate::Reset && !packet.has_checksum;
            let returned = match fate {
                Fate::Next | Fate::Reset if !unwritable => TC_ACT_UNSPEC,
                _ => TC_ACT_SHOT,
            };
            same("return value", &returned, &ran.ret)?;
            same("mark", &new.map_or(mark, |new| with_mesh_mark(mark, new)), &ran.mark)?;
            same("hint", &hint, &self.kernel.maps.hint()?)?;
            same("count", &count.filter(|_| !unwritable), &self.kernel.maps.take_count()?)?;
            match fate {
                Fate::Reset if unwritable => seen.unwritable_reset += 1,
                Fate::Reset => {
                    seen.reset += 1;
                    packet.check_reset(&ran.packet)?;
                }
                _ => same("packet", &packet.bytes, &ran.packet)?,
            }
            match fate {
                Fate::Next => seen.next += 1,
                Fate::Drop => seen.drop += 1,
                Fate::Reset => {}
            }
            match hint.map(|hint| hint.kind) {
                Some(HINT_FROM_PROXY) => seen.hint_from_proxy += 1,
                Some(HINT_FROM_POD) => seen.hint_from_pod += 1,
                Some(HINT_NO_LISTENER) => seen.hint_no_listener += 1,
                _ => {}
            }
            anyhow::Ok(())
        };
        compare().with_context(|| format!("{at:?}, mark {mark:#x}: {packet:?}"))
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
        let (goes_on, new_mark, count) = match dns {
            Dns::Other => (true, mark, None),
            Dns::Ask { from_port, count } => {
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
                (written, with_mesh_mark(mark, MARK_PROXY), count)
            }
            Dns::Answer { from, from_port, to_port } => {
                let new = Segment { src: from, src_port: from_port, dst_port: to_port, ..*old };
                let written = packet.has_checksum || new == *old;
                if written {
                    packet.check_readdressed(&ran.packet, &new)?;
                }
                seen.dns_answer += 1;
                (written, with_mesh_mark(mark, MARK_REDIRECTED), None)
            }
            Dns::Drop(pod_id, counter) => {
                seen.dns_drop += 1;
                (false, mark, Some((pod_id, counter)))
            }
            Dns::Refuse(pod_id, counter) => {
                let written = if message.tcp { packet.has_checksum } else { packet.is_query };
                match (written, message.tcp) {
                    (false, _) => seen.dns_unanswerable += 1,
                    (true, true) => packet.check_reset(&ran.packet)?,
                    (true, false) => {
                        packet.check_refused(&ran.packet)?;
                        seen.dns_servfail += 1;
                    }
                }
                seen.dns_busy += usize::from(counter == Counter::RefusedDnsBusy);
                (written, mark, Some((pod_id, counter)))
            }
        };
        let returned = if goes_on { TC_ACT_UNSPEC } else { TC_ACT_SHOT };
        same("return value", &returned, &ran.ret)?;
        same("mark", &new_mark, &ran.mark)?;
        same("hint", &None, &self.kernel.maps.hint()?)?;
        same("count", &count, &self.kernel.maps.take_count()?)
    }

    fn lookup(&mut self, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
        let v4 = rng.bool();
        let (remote, local) = world::addresses(rng, v4);
        let flow =
            Flow { local, remote, local_port: world::port(rng), remote_port: world::port(rng) };
        let hint = lookup_hint(rng, flow);
        self.kernel.maps.set_hint(hint)?;
        self.note_kubelets(rng, flow)?;
        // A test run of `sk_lookup` has no interface; the kernel's own question on `lo` has, but
        // cannot ask for an IPv4 address in IPv6.
        let on_lo = rng.bool() && v4 == local.is_v4() && v4 == remote.is_v4();
        let tcp = rng.u8(..8) > 0;
        let lookup = Lookup { tcp, flow, on_lo, hint };
        let steer = verdict::steer(&lookup, &self.world);

        let (returned, count, chosen) = self.steered(v4, steer);
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
                let ran = self.kernel.run_lookup(v4, tcp, &flow)?;
                same("return value", &returned, &ran.ret)?;
                same("cookie of the socket", &chosen, &ran.cookie)?;
            }
            same("hint", &Some(hint).filter(|h| h.kind != HINT_NONE), &self.kernel.maps.hint()?)?;
            same("count", &count, &self.kernel.maps.take_count()?)
        };
        compare().with_context(|| format!("{lookup:?} gives {steer:?}"))?;
        match steer {
            Steer::Pass(None) => seen.pass += 1,
            Steer::Pass(Some((_, Counter::BypassedInbound))) => seen.bypassed_inbound += 1,
            Steer::Pass(Some((_, Counter::KubeletProbe))) => seen.kubelet_probe += 1,
            Steer::Pass(Some((_, Counter::ProbeSource))) => seen.probe_source += 1,
            Steer::Pass(Some(_)) => seen.counted_pass += 1,
            Steer::Refuse(_, Counter::DroppedDnsUnreadable) => seen.dns_unreadable += 1,
            Steer::Refuse(..) => seen.refuse += 1,
            Steer::Redirect { .. } if chosen.is_none() => seen.no_listener_to_redirect_to += 1,
            Steer::Redirect { .. } if chosen == Some(self.neighbour.cookie) => {
                seen.neighbours_listener += 1;
            }
            Steer::Redirect { kind: LISTENER_OUTBOUND, .. } => seen.outbound += 1,
            Steer::Redirect { .. } => seen.inbound += 1,
        }
        Ok(())
    }

    /// What the program makes of the decision: its return value, what it counts, and the socket.
    fn steered(&self, v4: bool, steer: Steer) -> (u32, Option<(PodId, Counter)>, Option<u64>) {
        match steer {
            Steer::Pass(count) => (SK_PASS, count, None),
            Steer::Refuse(pod_id, counter) => (SK_DROP, Some((pod_id, counter)), None),
            Steer::Redirect { pod_id, kind } => {
                let cookie = self.world.state.borrow().listeners.get(&(pod_id, kind)).copied();
                match cookie.filter(|cookie| self.takes(*cookie, v4)) {
                    Some(cookie) => {
                        let counter = match kind {
                            LISTENER_OUTBOUND => Counter::RedirectedOutbound,
                            _ => Counter::RedirectedInbound,
                        };
                        (SK_PASS, Some((pod_id, counter)), Some(cookie))
                    }
                    None => (SK_DROP, Some((pod_id, Counter::RefusedProxyAway)), None),
                }
            }
        }
    }

    fn takes(&self, cookie: u64, v4: bool) -> bool {
        self.socket(cookie).is_some_and(|socket| socket.takes(v4))
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
    let mesh = choose(rng, &[0, 0, 0, MARK_PROXY, MARK_REDIRECTED, MARK_DIRECT, 0x538]);
    choose(rng, &[0, 0, 0x1234_5000, 0xffff_f000]) | mesh
}

/// A hint that an earlier packet has left behind.
fn stale_hint(rng: &mut Rng) -> Hint {
    let v4 = rng.bool();
    let (local, remote) = world::addresses(rng, v4);
    let flow = Flow { local, remote, local_port: world::port(rng), remote_port: world::port(rng) };
    Hint { flow, kind: rng.u32(..6) }
}

/// A hint for this very flow, mostly; or for one that differs in one place.
fn lookup_hint(rng: &mut Rng, mut flow: Flow) -> Hint {
    match rng.u8(..12) {
        0 => flow.local = flow.remote,
        1 => flow.remote.octets[15] ^= 1,
        2 => flow.local_port ^= 0x100,
        3 => flow.remote_port ^= 1,
        4 => std::mem::swap(&mut flow.local, &mut flow.remote),
        _ => {}
    }
    Hint {
        flow,
        kind: choose(
            rng,
            &[HINT_NONE, HINT_FROM_PROXY, HINT_QUESTION, HINT_NO_LISTENER, HINT_FROM_POD, 5],
        ),
    }
}
