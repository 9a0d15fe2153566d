//! What the verdicts about a call say, and what the calls say about their pod.

use std::net::{IpAddr, SocketAddr};

use super::{Call, Connection, Direction, Outcome};
use crate::{
    explain::{Bypass, PodPart},
    verdicts::{Verdict, is_refusal},
};

/// Why a call is left alone.
const SETTINGS: &str = "settings exclude it";
const IN_THE_POD: &str = "it stays in the pod";
const LINK_LOCAL: &str = "link-local addresses (fe80::/10) are not redirected";

/// Why a call of the pod is to be left alone, if it is.
pub(super) fn excludes_outbound(pod: &PodPart, to: SocketAddr) -> Option<&'static str> {
    Some(match pod.bypass_to(to.ip(), Some(to.port()))? {
        Bypass::InPod => IN_THE_POD,
        Bypass::LinkLocal => LINK_LOCAL,
        Bypass::Settings => SETTINGS,
    })
}

/// Why a call from there to a port of the pod is to be left alone, if it is.
pub(super) fn excludes_inbound(
    pod: &PodPart,
    from: Option<IpAddr>,
    port: u16,
) -> Option<&'static str> {
    let traffic = pod.traffic.clone().unwrap_or_default();
    (!traffic.redirects_call_from(from, Some(port))).then_some(SETTINGS)
}

/// What is known of a call that was made.
pub(super) struct Facts<'a> {
    pub direction: Direction,
    /// Whether the pod is to be in the mesh.
    pub wanted: bool,
    /// Why the call is to be left alone, if it is.
    pub excluded: Option<&'static str>,
    pub connection: &'a Connection,
    /// The verdicts about it.
    pub verdicts: &'a [Verdict],
    /// Why a verdict about it may be missing, if one may.
    pub unread: Option<&'a str>,
}

/// Judges a call. Of several verdicts, the last one counts: a SYN that was dropped is sent again. Those about the
/// connection that the proxy makes for it, with the caller's address and perhaps its port, do not, and neither do
/// packets that a switch holds back: TCP sends them again.
pub(super) fn call(facts: &Facts<'_>) -> (Outcome, Option<String>) {
    let is_its = |verdict: &&Verdict| {
        !matches!(verdict.verdict.as_str(), "from_proxy" | "held_in_transition")
    };
    let last = facts.verdicts.iter().rfind(is_its).or(facts.verdicts.last());
    let Some(last) = last else { return without_verdict(facts) };
    let excluded = |why: &str| (Outcome::Excluded, Some(why.to_owned()));
    match last.verdict.as_str() {
        "redirected_outbound" | "rescued_outbound" if is_rescued(facts.verdicts) => {
            let why = "redirected by the egress guard only: the pod's marks, rules or routes (or a missing \
                       agent rule) bypass the capture rules";
            (Outcome::Captured, Some(why.to_owned()))
        }
        "redirected_outbound" | "redirected_inbound" | "hbone" | "redirected_dns" => {
            (Outcome::Captured, None)
        }
        "bypassed_inbound" | "rescued_direct" => excluded(SETTINGS),
        "kubelet_probe" => excluded("it counts as a probe: the agent runs in kubelet's cgroup"),
        "probe_source" => excluded("it counts as a probe: --probe-sources has the node's address"),
        "local" => excluded(IN_THE_POD),
        verdict if verdict == "held_in_transition" || is_refusal(verdict) => {
            (Outcome::Refused, None)
        }
        verdict => (Outcome::NotCaptured, Some(format!("it was only {verdict}"))),
    }
}

fn is_rescued(verdicts: &[Verdict]) -> bool {
    verdicts.iter().any(|verdict| verdict.verdict == "rescued_outbound")
}

fn without_verdict(facts: &Facts<'_>) -> (Outcome, Option<String>) {
    let unknown = |why: String| (Outcome::Unknown, Some(why));
    let answered = matches!(facts.connection, Connection::Connected | Connection::Refused);
    if let Some(why) = facts.unread {
        return unknown(why.to_owned());
    }
    if facts.direction == Direction::Inbound && !answered {
        return unknown("it did not get to the pod; does a NetworkPolicy forbid it?".to_owned());
    }
    if !facts.wanted {
        return (Outcome::Bypassing, None);
    }
    if let Some(why) = facts.excluded {
        return (Outcome::Excluded, Some(why.to_owned()));
    }
    (Outcome::NotCaptured, Some("no redirect-agent program saw this connection".to_owned()))
}

/// What the calls say about their pod, whether that is as it should be, and that in a sentence.
pub(super) fn all(pod: &PodPart, calls: &[Call]) -> (Outcome, bool, String) {
    let decision = pod.decision.as_ref();
    let wanted = decision.is_some_and(|decision| decision.enrolled);
    let worst_first =
        [Outcome::NotCaptured, Outcome::Refused, Outcome::Captured, Outcome::Excluded];
    let found = worst_first.into_iter().find_map(|outcome| {
        calls.iter().find(|call| call.outcome == outcome).map(|call| (outcome, call))
    });
    match (wanted, found) {
        (false, found) => {
            let why = decision.map_or("nothing is decided for it", |d| d.reason.explain());
            match found {
                None => (Outcome::Bypassing, true, format!("it is not to be in the mesh: {why}")),
                Some((outcome, call)) => {
                    let message = format!(
                        "it is not to be in the mesh ({why}), and {} is {} all the same",
                        call.name(),
                        outcome.as_str()
                    );
                    (outcome, false, message)
                }
            }
        }
        (true, Some((outcome @ (Outcome::NotCaptured | Outcome::Refused), call))) => {
            let verdict = call.verdicts.last().map(|verdict| verdict.verdict.as_str());
            let why = call.why.as_deref().or(verdict).unwrap_or("unknown");
            (outcome, false, format!("{}: {why}", call.name()))
        }
        (true, Some((outcome, _))) => match calls.iter().find(|call| is_open(pod, call)) {
            None => (outcome, true, count(calls, outcome)),
            Some(open) => {
                let why = open.why.as_deref().unwrap_or("unknown");
                let message = format!(
                    "{} {}; {}: {why}",
                    count(calls, outcome),
                    outcome.as_str(),
                    open.name()
                );
                (Outcome::Partial, false, message)
            }
        },
        (true, None) => {
            let why = calls.iter().find_map(|call| call.why.as_deref());
            let why = why.or(pod.message.as_deref()).unwrap_or("there was nothing to connect to");
            (Outcome::Unknown, false, format!("no connection was conclusive: {why}"))
        }
    }
}

/// Whether it cannot be told what becomes of such a connection. Where the application does not listen, there is
/// none.
fn is_open(pod: &PodPart, call: &Call) -> bool {
    let nothing_listens =
        call.direction == Direction::Inbound && call.destination.is_none() && pod.listens.is_some();
    call.outcome == Outcome::Unknown && !nothing_listens
}

/// `2 of 4 connections, 2 unknown`.
fn count(calls: &[Call], main: Outcome) -> String {
    let count = |outcome| calls.iter().filter(|call| call.outcome == outcome).count();
    let mut text = format!("{} of {} connections", count(main), calls.len());
    for other in [Outcome::Excluded, Outcome::Unknown].into_iter().filter(|other| *other != main) {
        match count(other) {
            0 => {}
            n => text += &format!(", {n} {}", other.as_str()),
        }
    }
    match calls.iter().filter(|call| is_rescued(&call.verdicts)).count() {
        0 => text,
        n => format!("{text}, {n} only by the guard"),
    }
}

impl Call {
    fn name(&self) -> String {
        let to = self.destination.map_or_else(String::new, |to| format!(" to {to}"));
        format!("the {} connection{to}", self.direction.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{explain::DecisionPart, membership::Reason};

    fn verdicts(names: &[&str]) -> Vec<Verdict> {
        let verdict = |name: &&str| Verdict {
            time: "2026-08-01T12:00:00.000000Z".to_owned(),
            node: "n1".to_owned(),
            pod: None,
            netns: 7,
            verdict: (*name).to_owned(),
            protocol: None,
            source: None,
            destination: None,
        };
        names.iter().map(verdict).collect()
    }

    fn outcome(facts: Facts<'_>, names: &[&str]) -> Outcome {
        call(&Facts { verdicts: &verdicts(names), ..facts }).0
    }

    const OUTBOUND: Facts<'_> = Facts {
        direction: Direction::Outbound,
        wanted: true,
        excluded: None,
        connection: &Connection::TimedOut,
        verdicts: &[],
        unread: None,
    };
    const INBOUND: Facts<'_> = Facts { direction: Direction::Inbound, ..OUTBOUND };

    #[test]
    fn the_last_verdict_counts() {
        for (names, expected) in [
            (&["redirected_outbound"][..], Outcome::Captured),
            (&["rescued_outbound", "redirected_outbound"], Outcome::Captured),
            (&["rescued_outbound", "refused_proxy_away"], Outcome::Refused),
            (&["dropped_proxy_away", "redirected_outbound"], Outcome::Captured),
            (&["held_in_transition"], Outcome::Refused),
            (&["redirected_outbound", "held_in_transition"], Outcome::Captured),
            (&["refused_unknown_pod"], Outcome::Refused),
            (&["rescued_direct"], Outcome::Excluded),
            (&["local"], Outcome::Excluded),
            (&["forwarded"], Outcome::NotCaptured),
            (&["from_proxy"], Outcome::NotCaptured),
        ] {
            assert_eq!(outcome(OUTBOUND, names), expected, "{names:?}");
        }
        for (name, expected) in [
            ("redirected_inbound", Outcome::Captured),
            ("hbone", Outcome::Captured),
            ("bypassed_inbound", Outcome::Excluded),
            ("probe_source", Outcome::Excluded),
            ("kubelet_probe", Outcome::Excluded),
            ("no_listener", Outcome::Refused),
        ] {
            assert_eq!(outcome(INBOUND, &[name]), expected, "{name}");
            // The proxy calls with the caller's address, and perhaps from its port.
            assert_eq!(outcome(INBOUND, &[name, "from_proxy"]), expected, "{name}");
        }
        let rescued = verdicts(&["rescued_outbound", "redirected_outbound"]);
        let (_, why) = call(&Facts { verdicts: &rescued, ..OUTBOUND });
        assert!(why.is_some_and(|why| why.contains("by the egress guard only")));
    }

    #[test]
    fn a_call_without_a_verdict_was_not_captured_unless_something_else_explains_that() {
        let excluded = Some(SETTINGS);
        let refused = &Connection::Refused;
        for (facts, expected) in [
            (OUTBOUND, Outcome::NotCaptured),
            (Facts { connection: refused, ..OUTBOUND }, Outcome::NotCaptured),
            (Facts { excluded, ..OUTBOUND }, Outcome::Excluded),
            (Facts { wanted: false, ..OUTBOUND }, Outcome::Bypassing),
            (Facts { unread: Some("3 verdicts were dropped"), ..OUTBOUND }, Outcome::Unknown),
            (INBOUND, Outcome::Unknown),
            (Facts { connection: refused, ..INBOUND }, Outcome::NotCaptured),
            (Facts { connection: &Connection::Connected, ..INBOUND }, Outcome::NotCaptured),
        ] {
            let Facts { direction, wanted, connection, .. } = facts;
            assert_eq!(outcome(facts, &[]), expected, "{direction:?} {wanted} {connection:?}");
        }
    }

    #[test]
    fn what_stays_in_the_pod_and_link_local_calls_are_no_failure() {
        let pod = PodPart { ips: vec!["fd00::2".parse().unwrap()], ..pod(true) };
        for (to, expected) in [
            ("192.0.2.1:9", None),
            ("127.0.0.1:9", Some(IN_THE_POD)),
            ("[::1]:9", Some(IN_THE_POD)),
            ("[fd00::2]:9", Some(IN_THE_POD)),
            ("[2001:db8::1]:9", None),
            ("[fe80::1]:9", Some(LINK_LOCAL)),
        ] {
            assert_eq!(excludes_outbound(&pod, to.parse().unwrap()), expected, "{to}");
        }
    }

    fn pod(enrolled: bool) -> PodPart {
        let reason = if enrolled { Reason::PodLabelAmbient } else { Reason::NotLabeled };
        let decision = Some(DecisionPart { enrolled, reason, rules: Vec::new() });
        PodPart { name: "shop/cart".to_owned(), decision, ..PodPart::default() }
    }

    #[track_caller]
    fn judged(enrolled: bool, outcomes: &[Outcome]) -> (Outcome, bool) {
        let call = |outcome: &Outcome| Call {
            direction: Direction::Outbound,
            family: "ipv6".to_owned(),
            source: None,
            destination: "[2001:db8::1]:9".parse().ok(),
            connection: None,
            verdicts: Vec::new(),
            outcome: *outcome,
            why: None,
        };
        let (result, ok, message) =
            all(&pod(enrolled), &outcomes.iter().map(call).collect::<Vec<_>>());
        assert!(!message.is_empty());
        (result, ok)
    }

    #[test]
    fn one_call_that_is_not_captured_is_enough() {
        use Outcome::{Bypassing, Captured, Excluded, NotCaptured, Partial, Refused, Unknown};
        for (outcomes, expected) in [
            (&[Captured, Captured][..], (Captured, true)),
            (&[Captured, Unknown], (Partial, false)),
            (&[Excluded, Captured], (Captured, true)),
            (&[Excluded, Unknown], (Partial, false)),
            (&[Captured, NotCaptured, Refused], (NotCaptured, false)),
            (&[Captured, Refused], (Refused, false)),
            (&[Unknown], (Unknown, false)),
            (&[], (Unknown, false)),
        ] {
            assert_eq!(judged(true, outcomes), expected, "{outcomes:?}");
        }
        for (outcomes, expected) in [
            (&[][..], (Bypassing, true)),
            (&[Bypassing, Unknown], (Bypassing, true)),
            (&[Bypassing, Captured], (Captured, false)),
            (&[Refused], (Refused, false)),
        ] {
            assert_eq!(judged(false, outcomes), expected, "{outcomes:?}");
        }
    }

    #[test]
    fn captured_means_every_connection_that_can_be_made() {
        let call = |direction, destination: Option<&str>, outcome| Call {
            direction,
            family: "ipv4".to_owned(),
            source: None,
            destination: destination.map(|at| at.parse().unwrap()),
            connection: None,
            verdicts: Vec::new(),
            outcome,
            why: Some("the reason".to_owned()),
        };
        let captured = call(Direction::Outbound, Some("192.0.2.1:9"), Outcome::Captured);
        let nothing_to_call = call(Direction::Inbound, None, Outcome::Unknown);
        let did_not_arrive = call(Direction::Inbound, Some("10.0.0.2:80"), Outcome::Unknown);
        let no_such_family = call(Direction::Outbound, None, Outcome::Unknown);
        let silent = PodPart { listens: Some(Vec::new()), ..pod(true) };
        let unknown = PodPart { listens: None, ..pod(true) };
        for (pod, other, expected) in [
            (&silent, &nothing_to_call, (Outcome::Captured, true)),
            (&unknown, &nothing_to_call, (Outcome::Partial, false)),
            (&silent, &did_not_arrive, (Outcome::Partial, false)),
            (&silent, &no_such_family, (Outcome::Partial, false)),
        ] {
            let (result, ok, message) = all(pod, &[captured.clone(), other.clone()]);
            assert_eq!((result, ok), expected, "{message}");
            assert!(ok || message.ends_with("the reason"), "{message}");
        }
    }
}
