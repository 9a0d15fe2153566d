//! Packets, pods and surroundings that nobody has thought of.

use core::time::Duration;

use super::*;
use crate::draw::Draw;

fn node(draw: &mut Draw, a: &Addresses) -> Node {
    let flags = POD_ENROLLED
        | draw.of(&[0, POD_CAPTURE])
        | draw.of(&[0, POD_DNS])
        | draw.of(&[0, POD_BYPASS_INBOUND])
        | draw.of(&[0, POD_INBOUND_RULES])
        | draw.of(&[0, POD_OUTBOUND_RULES]);
    let mut some = || draw.yes().then(|| address(draw, a));
    let (peer, kubelet, probe, outbound) = (some(), some(), some(), some());
    Node {
        pod: draw.of(&[Some(flags), Some(flags), CAPTURING, Some(flags & !POD_ENROLLED), None]),
        excluded_port: draw.yes().then(|| port(draw)),
        excluded_peer: peer,
        kubelet,
        probe_source: probe,
        excluded_outbound: outbound,
        receiver: draw.of(&RECEIVERS),
        cookie: draw.yes(),
        proxy: draw.of(&PROXY_STATES),
        strays: draw.yes(),
        forwarded: draw.yes(),
        by_lo: draw.yes(),
        sender: draw.of(&[
            Sender::Application,
            Sender::Nobody,
            Sender::Impostor,
            Sender::Marked,
            Sender::Proxy,
        ]),
        proxy_sent: draw.yes(),
        sender_listens: draw.yes(),
        half_open: draw.yes(),
        was_half_open: draw.yes(),
        marked_listener: draw.yes(),
        settled: draw.of(&[
            None,
            Some(WAY_DIRECT),
            Some(WAY_REDIRECTED),
            Some(WAY_PROXYS),
            Some(WAY_MARKED),
        ]),
        noted_direct: draw.yes(),
        connections: draw.yes(),
        ..Node::new(a, None)
    }
}

fn address(draw: &mut Draw, a: &Addresses) -> Addr {
    let known =
        [a.own, a.own_second, a.neighbour, a.stranger, a.guest, a.loopback, a.loopback_other];
    match draw.byte() % 9 {
        7 => link_local(),
        8 => Addr::from_words([draw.word(), draw.word(), draw.word(), draw.word()]),
        known_one => known[usize::from(known_one)],
    }
}

fn port(draw: &mut Draw) -> u16 {
    let any = draw.word() as u16;
    draw.of(&[SERVER_PORT, CLIENT_PORT, PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE, PORT_DNS, any])
}

fn message(draw: &mut Draw, a: &Addresses) -> Message {
    let [opens, accepts] = draw.of(&[[true, false], [false, true], [false, false]]);
    let segment = Segment {
        src: address(draw, a),
        dst: address(draw, a),
        src_port: port(draw),
        dst_port: port(draw),
        opens,
        accepts,
        resets: draw.yes(),
    };
    Message { segment, tcp: draw.yes(), is_query: draw.yes(), ends: draw.yes() }
}

fn mark(draw: &mut Draw) -> u32 {
    let mesh = draw.of(&[
        0,
        MARK_PROXY,
        MARK_DIRECT,
        MARK_INBOUND,
        MARK_REDIRECTED,
        MARK_RESCUED,
        MARK_REFUSED,
        MARK_VIRTUAL,
    ]);
    let any = draw.word();
    draw.of(&[mesh, mesh | 0xabcd_e000, any])
}

/// What holds of every decision.
fn is_whole(verdict: &Verdict) {
    assert!(verdict.mark.is_none_or(|mark| mark.get() & !MARK_MASK == 0), "{verdict:?}");
    if verdict.count.is_some() {
        assert_eq!(verdict.pod_id, OWN, "{verdict:?}");
    }
    match verdict.fate {
        Fate::Drop | Fate::Abort => assert!(verdict.count.is_some(), "{verdict:?}"),
        Fate::ToLo => {
            let mark = verdict.mark.map(NonZeroU32::get);
            assert!(matches!(mark, Some(MARK_RESCUED | MARK_REFUSED)), "{verdict:?}");
        }
        Fate::Leave => assert_eq!((verdict.mark, verdict.hint), (code(MARK_DIRECT), None)),
        Fate::Next | Fate::Reset => {}
    }
}

/// What the pod, and nobody else, sends out through an interface.
fn check_egress(mark: u32, message: &Message, node: &Node) {
    let verdict = on_egress(mark, Ok(message), node);
    is_whole(&verdict);
    assert!(!matches!(verdict.fate, Fate::Reset | Fate::Leave), "{verdict:?}");
    let by = super::super::sender(mark, Ok(message), node);
    let Message { segment, tcp, is_query, .. } = message;
    let applications = !matches!(by, Sender::Proxy | Sender::Marked) && !node.forwarded;
    if !applications || !segment.opens || segment.dst.is_link_local() {
        return;
    }
    let Some(pod) = node.pod else {
        assert!(verdict.fate == Fate::Drop || !tcp, "{verdict:?}");
        return;
    };
    let flow = segment.sender_flow();
    let excluded = pod & POD_OUTBOUND_RULES != 0 && node.excludes_outbound(OWN, &flow);
    let asks = segment.dst_port == PORT_DNS && *is_query;
    let leaves = verdict.fate == Fate::Next;
    if *tcp && captures(pod) {
        assert!(!leaves || (excluded && !segment.dst.is_loopback()), "{verdict:?}");
    }
    if asks && pod & (POD_ENROLLED | POD_DNS) == POD_ENROLLED | POD_DNS {
        assert!(!leaves || segment.dst.is_loopback(), "{verdict:?}");
    }
    if pod & POD_ENROLLED == 0 {
        assert_eq!(verdict.fate, Fate::Next, "a pod in bypass is left alone");
    }
}

/// What happens on `lo`, and in `sk_lookup` behind it.
fn check_lo(mark: u32, segment: &Segment, node: &Node) {
    let verdict = super::super::on_lo(mark, Some(segment), node);
    is_whole(&verdict);
    assert!(!matches!(verdict.fate, Fate::ToLo | Fate::Abort), "{verdict:?}");
    let own = node.is_own(OWN, &segment.dst);
    if verdict.fate == Fate::Leave {
        assert!(!own && !segment.dst.is_loopback(), "{verdict:?}");
        assert!(!matches!(mesh_mark(mark), MARK_PROXY | MARK_RESCUED), "{verdict:?}");
    }
    let Some(pod) = node.pod else { return };
    let applications = !matches!(mesh_mark(mark), MARK_PROXY) && !node.proxy_sent;
    let foreign = !own && !segment.dst.is_loopback() && !segment.dst.is_link_local();
    if verdict.fate != Fate::Next || !segment.opens || !applications {
        return;
    }
    let hint = Hint {
        kind: verdict.hint.map_or(HINT_NONE, NonZeroU32::get),
        flow: segment.receiver_flow(),
        device: u64::from(OWN),
    };
    let lookup = Lookup { pod_id: OWN, tcp: true, flow: hint.flow, on_lo: true, hint };
    let steered = steer(&lookup, node);
    if foreign && captures(pod) {
        assert_eq!(node.proxy, Proxy::Listens, "{verdict:?}");
        assert_eq!(steered, Steer::Redirect(LISTENER_OUTBOUND));
    } else {
        assert!(matches!(steered, Steer::Pass(_)) || foreign, "{steered:?}");
    }
}

/// What comes in on an interface, and happens in `sk_lookup` behind it.
fn check_interface(segment: &Segment, node: &Node) {
    let verdict = on_interface(true, Some(segment), node);
    is_whole(&verdict);
    assert!(!matches!(verdict.fate, Fate::ToLo | Fate::Leave | Fate::Abort), "{verdict:?}");
    if verdict.fate != Fate::Next || !segment.opens || !node.is_own(OWN, &segment.dst) {
        return;
    }
    let (flow, hint) = (segment.receiver_flow(), bytemuck::Zeroable::zeroed());
    let lookup = Lookup { pod_id: OWN, tcp: true, flow, on_lo: false, hint };
    let steered = steer(&lookup, node);
    let for_proxy = verdict.mark == code(MARK_INBOUND);
    match steered {
        Steer::Redirect(LISTENER_INBOUND | LISTENER_HBONE) => assert!(for_proxy, "{verdict:?}"),
        Steer::Pass(count) => {
            assert!(!for_proxy, "{verdict:?}");
            let captured = node.pod.is_some_and(captures);
            assert_eq!(count.is_some(), captured, "who passes is counted");
        }
        Steer::Refuse(counter) => {
            assert!(node.pod.is_none() && counter == Counter::RefusedUnknownPod, "{steered:?}");
        }
        Steer::Redirect(_) => panic!("{steered:?}"),
    }
}

fn check_virtual(segment: &Segment, flags: u32, node: &Node) {
    let verdict = on_virtual(true, Some(segment), true, &Virtual { pod_id: OWN, flags }, node);
    is_whole(&verdict);
    assert!(!matches!(verdict.fate, Fate::ToLo | Fate::Leave | Fate::Abort), "{verdict:?}");
    let local = segment.dst.is_loopback() || segment.dst.is_link_local();
    let excluded =
        flags & VIRTUAL_RULES != 0 && node.excludes_outbound(OWN, &segment.sender_flow());
    if flags & VIRTUAL_CAPTURE != 0 && segment.opens && !local && !excluded {
        let redirected = verdict.mark == code(MARK_VIRTUAL);
        assert!(redirected || verdict.fate != Fate::Next, "{verdict:?}");
    }
}

#[test]
fn every_packet_has_a_decision_and_none_goes_past_the_proxy_unasked() {
    crate::draw::each(bolero::check!(), Duration::from_secs(1), |draw| {
        let a = &both_families()[usize::from(draw.byte() % 2)];
        let (node, mark, message) = (node(draw, a), mark(draw), message(draw, a));
        let flags = draw.of(&[0, VIRTUAL_CAPTURE, VIRTUAL_CAPTURE | VIRTUAL_RULES]);
        check_egress(mark, &message, &node);
        check_lo(mark, &message.segment, &node);
        check_interface(&message.segment, &node);
        check_virtual(&message.segment, flags, &node);
        for hidden in [Hidden::Nothing, Hidden::Tcp, Hidden::Dns] {
            let verdict = on_egress(mark, Err(hidden), &node);
            is_whole(&verdict);
            let proxys = matches!(node.sender, Sender::Proxy | Sender::Marked);
            if hidden == Hidden::Tcp && !proxys && !node.forwarded {
                let captured = node.pod.is_none_or(captures);
                assert_eq!(verdict.fate == Fate::Drop, captured, "{verdict:?}");
            }
        }
    });
}
