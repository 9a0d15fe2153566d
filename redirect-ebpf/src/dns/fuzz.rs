//! A pod and its proxy send what they like, in any order.

use core::time::Duration;

use super::*;
use crate::draw::Draw;

/// Who asks whom: protocol, client, its port, resolver.
type Asking = (bool, Addr, u16, Addr, u16);

fn asking(message: &Message) -> Asking {
    let Segment { src, dst, src_port, dst_port, .. } = message.segment;
    (message.tcp, src, src_port, dst, dst_port)
}

/// What a datagram still waits for.
struct Waiting {
    asking: Asking,
    answers: u32,
    until: u64,
}

#[derive(Default)]
struct Model {
    /// Who the alias of a client has stood for last, by protocol.
    last: BTreeMap<(bool, [u8; 16], u16), Asking>,
    /// Datagrams that wait for answers, by their alias.
    waiting: BTreeMap<u16, Waiting>,
}

impl Model {
    fn asks(&mut self, message: &Message, alias: u16, now: u64) {
        let asking = asking(message);
        let (tcp, client, ..) = asking;
        self.last.insert((tcp, client.octets, alias), asking);
        if tcp {
            return;
        }
        self.waiting.retain(|_, waiting| waiting.until > now && waiting.answers > 0);
        for (other, waiting) in &self.waiting {
            let same = waiting.asking == asking;
            assert_eq!(same, *other == alias, "each has its own alias as long as it waits");
            assert!(same || other % DNS_PLACES != alias % DNS_PLACES, "and its own place");
        }
        let until = now + ANSWER_NS;
        let known = self.waiting.entry(alias).or_insert(Waiting { asking, answers: 0, until });
        known.answers += 1;
        known.until = until;
    }

    fn is_answered(&mut self, message: &Message, alias: u16, found: Dns) {
        let Dns::Answer { from, from_port, to_port } = found else { return };
        let (tcp, client) = (message.tcp, message.segment.src);
        let asked = self.last.get(&(tcp, client.octets, alias));
        assert_eq!(asked, Some(&(tcp, client, to_port, from, from_port)), "nobody else has asked");
        if let Some(waiting) = self.waiting.get_mut(&alias).filter(|_| !tcp) {
            waiting.answers = waiting.answers.saturating_sub(1);
        }
    }
}

fn message(draw: &mut Draw, a: &Addresses) -> Message {
    let client = draw.of(&[a.own, a.own_second, a.any_ip]);
    let resolver = match draw.byte() {
        0 => a.loopback,
        1 => a.own,
        2 => link_local(),
        number => draw.of(&[a.resolvers[0], a.resolvers[1], a.resolver(number.into())]),
    };
    let open = draw.of(&[query, syn]);
    let message =
        draw.of(&[open(client, resolver), data(syn(client, resolver)), end(syn(client, resolver))]);
    // Ports that share places, and aliases of each other.
    let near = draw.of(&[PORT, next_alias(PORT), next_alias(next_alias(PORT))]);
    let any = draw.word() as u16 | 1;
    let port = draw.of(&[near, near.wrapping_add(DNS_PLACES), any]);
    let message = from_port(message, port);
    to_port(message, draw.of(&[PORT_DNS, PORT_DNS, PORT_PROXY_DNS, 80]))
}

fn step(
    draw: &mut Draw,
    a: &Addresses,
    node: &mut Node,
    model: &mut Model,
    sent: &mut Vec<(Message, u16)>,
) {
    match draw.byte() % 8 {
        0 => node.after(draw.of(&[1, END_NS, ANSWER_NS, IDLE_NS, ANSWER_NS - 1])),
        1 => {
            node.pod = draw.of(&[CAPTURED, CAPTURED, UNCAPTURED_DNS, BYPASSING, None]);
            node.without_dns =
                draw.of(&[None, None, Some(Proxy::AwayWithinGrace), Some(Proxy::Away)]);
            node.full = draw.byte() == 0;
        }
        2..=4 => {
            let message = match sent.last() {
                Some((again, _)) if draw.byte().is_multiple_of(4) => *again,
                _ => message(draw, a),
            };
            let found = on_lo(draw.of(&MARKS), &message, node);
            let Segment { dst, dst_port, opens, .. } = message.segment;
            let elsewhere = !dst.is_loopback() && !dst.is_link_local() && !node.own.contains(&dst);
            if node.pod == CAPTURED && opens && elsewhere && dst_port == PORT_DNS {
                assert_ne!(found, Dns::Other, "no query goes on to its resolver: {message:?}");
            }
            if let Dns::Ask { pod_id, from_port, .. } = found {
                assert!(pod_id == OWN && from_port != 0);
                model.asks(&message, from_port, node.now());
                sent.push((message, from_port));
            }
        }
        _ => {
            // One of the last, or anybody.
            let (message, alias) = match sent.iter().nth_back(usize::from(draw.byte() % 4)) {
                Some(known) => *known,
                None => (message(draw, a), draw.word() as u16),
            };
            let found = node.answer(&message, alias);
            model.is_answered(&message, alias, found);
        }
    }
}

#[test]
fn answer_comes_from_whom_its_client_has_asked() {
    crate::draw::each(bolero::check!(), Duration::from_secs(2), |draw| {
        let a = &both_families()[usize::from(draw.byte() % 2)];
        let (mut node, mut model, mut sent) =
            (Node::new(a, CAPTURED), Model::default(), Vec::new());
        while !draw.is_empty() {
            step(draw, a, &mut node, &mut model, &mut sent);
        }
    });
}
