//! The verdict, without a kernel: what is told from what.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use super::{
    Area, Cause, DecisionPart, Destination, EndpointPart, KernelPart, NodePart, Place, PodPart,
    ServicePart, To, service::choose, verdict::judge,
};
use crate::{
    dataplane::PartKind,
    journal::Entry,
    membership::Reason,
    output::PodState,
    overrides::Moment,
    source::EventKind,
    traffic::{Selection, Selections, Traffic},
    words::{Slip, UnknownWord},
    zds::Answer,
};

fn now() -> SystemTime {
    humantime::parse_rfc3339("2026-08-01T12:00:00Z").unwrap()
}

fn node() -> NodePart {
    NodePart { name: "n1".to_owned(), proxies: Some(1), ..NodePart::default() }
}

/// A pod of the node.
fn pod(name: &str, ip: &str, reason: Reason) -> PodPart {
    let enrolled = reason.enrolls();
    let proxys = ["127.0.0.1:15053", "[::]:15001", "[::]:15006", "[::]:15008"];
    let listens = if enrolled { &proxys[..] } else { &[] };
    PodPart {
        name: name.to_owned(),
        place: Place::Here,
        ips: vec![ip.parse().unwrap()],
        decision: Some(DecisionPart { enrolled, reason, rules: Vec::new() }),
        state: Some(if enrolled { PodState::Enrolled } else { PodState::Bypassing }),
        kernel: enrolled.then(|| KernelPart {
            captured: true,
            proxy_dns: true,
            ..KernelPart::default()
        }),
        proxy: enrolled.then_some(Answer::Added),
        redirection: enrolled.then(|| "enabled".to_owned()),
        listens: Some(["0.0.0.0:80"].iter().chain(listens).map(|at| at.parse().unwrap()).collect()),
        ..PodPart::default()
    }
}

fn a() -> PodPart {
    pod("shop/a", "10.0.0.1", Reason::PodLabelAmbient)
}

fn b() -> PodPart {
    pod("shop/b", "10.0.0.2", Reason::PodLabelAmbient)
}

fn outside(pod: PodPart) -> PodPart {
    PodPart {
        kernel: None,
        proxy: None,
        redirection: None,
        ..PodPart {
            decision: Some(DecisionPart {
                enrolled: false,
                reason: Reason::NotLabeled,
                rules: Vec::new(),
            }),
            state: Some(PodState::Bypassing),
            ..pod
        }
    }
}

/// The causes, the verdict first.
fn causes(node: &NodePart, pod: &PodPart, to: Option<(&str, Option<PodPart>)>) -> Vec<Cause> {
    let to = to.map(|(asked, pod)| Destination {
        asked: asked.parse::<To>().unwrap(),
        service: None,
        service_unknown: None,
        pod,
    });
    let (_, findings) = judge(node, pod, to.as_ref(), None, now());
    findings.iter().map(|finding| finding.cause).collect()
}

fn alone(pod: &PodPart) -> Vec<Cause> {
    causes(&node(), pod, None)
}

fn to_b(from: &PodPart, called: PodPart) -> Vec<Cause> {
    causes(&node(), from, Some(("shop/b:80", Some(called))))
}

/// How the call goes: protocol, by the caller's proxy, the port of the proxy that it arrives at.
fn way(from: &PodPart, asked: &str, called: PodPart) -> (String, bool, Option<u16>) {
    let to = Destination {
        asked: asked.parse().unwrap(),
        service: None,
        service_unknown: None,
        pod: Some(called),
    };
    let path = judge(&node(), from, Some(&to), None, now()).0.unwrap();
    (path.protocol, path.by_callers_proxy, path.to_proxy_port)
}

#[test]
fn a_call_to_a_link_local_address_is_direct() {
    let direct = ("plaintext".to_owned(), false, Some(15006));
    assert_eq!(way(&a(), "[fe80::1]:80", b()), direct);
}

#[test]
fn a_call_goes_by_the_proxies_of_those_that_have_one() {
    let hbone = |by: bool, port| ("HBONE".to_owned(), by, Some(port));
    let plain = |by: bool, port| ("plaintext".to_owned(), by, port);
    assert_eq!(way(&a(), "shop/b:80", b()), hbone(true, 15008));
    assert_eq!(way(&outside(a()), "shop/b:80", b()), plain(false, Some(15006)));
    assert_eq!(way(&a(), "shop/b:80", outside(b())), plain(true, None));
    assert_eq!(way(&outside(a()), "shop/b:80", outside(b())), plain(false, None));
    let pending = PodPart { redirection: Some("pending".to_owned()), ..b() };
    assert_eq!(way(&a(), "shop/b:80", pending), plain(true, Some(15006)));
    let excludes =
        |selections| PodPart { traffic: Some(Traffic { selections, ..Traffic::default() }), ..a() };
    let ports = Selections {
        outbound_ports: Selection::new(None, &["80".parse().unwrap()]),
        ..Selections::default()
    };
    assert_eq!(way(&excludes(ports.clone()), "shop/b:80", b()), plain(false, Some(15006)));
    assert_eq!(way(&excludes(ports), "shop/b:81", b()), hbone(true, 15008));
    let ranges = Selections {
        outbound_ranges: Selection::new(Some(&["192.0.2.0/24".parse().unwrap()]), &[]),
        ..Selections::default()
    };
    assert_eq!(way(&excludes(ranges), "shop/b:80", b()), plain(false, Some(15006)));
    let bypass = Traffic { bypass_inbound: true, ..Traffic::default() };
    let past = PodPart { traffic: Some(bypass), ..b() };
    assert_eq!(way(&outside(a()), "shop/b:80", past.clone()), plain(false, None));
    assert_eq!(way(&a(), "shop/b:80", past), hbone(true, 15008));
    let elsewhere = PodPart { place: Place::OtherNode, kernel: None, listens: None, ..b() };
    assert_eq!(way(&a(), "shop/b:80", elsewhere), hbone(true, 15008));
    assert_eq!(way(&a(), "shop/a:80", a()), plain(false, None), "itself");
    for own in ["127.0.0.1:80", "[::1]:80"] {
        let to = Destination {
            asked: own.parse().unwrap(),
            service: None,
            service_unknown: None,
            pod: None,
        };
        let (path, findings) = judge(&node(), &a(), Some(&to), None, now());
        assert!(!path.unwrap().by_callers_proxy, "{own}");
        assert_eq!(findings[0].cause, Cause::OutsideTheMesh, "{findings:#?}");
        assert!(findings[0].message.contains("calls itself"), "{findings:#?}");
    }
}

#[test]
fn nothing_wrong_is_said_of_what_is_as_it_should_be() {
    assert_eq!(alone(&a()), [Cause::NothingFound]);
    assert_eq!(to_b(&a(), b()), [Cause::NothingFound]);
    let not_there = causes(&node(), &a(), Some(("203.0.113.7:443", None)));
    assert_eq!(not_there, [Cause::NothingFound]);
    assert_eq!(
        to_b(&outside(a()), b()),
        [Cause::PlaintextToProxy, Cause::NotLabeled, Cause::NothingFound]
    );
    assert_eq!(to_b(&outside(a()), outside(b()))[0], Cause::OutsideTheMesh);
}

#[test]
fn what_is_certain_comes_before_what_was_and_that_before_what_may_be_meant() {
    let repaired = |minutes: u64| Entry {
        first: Moment::of(now() - Duration::from_secs(60 * minutes)),
        last: Moment::of(now() - Duration::from_secs(60 * minutes)),
        count: 3,
        kind: EventKind::Repaired,
        message: "missing in the pod, and put back: sysctl x".to_owned(),
        repaired: vec![PartKind::Sysctl],
    };
    let past = |minutes| PodPart { history: vec![repaired(minutes)], ..b() };
    assert_eq!(to_b(&outside(a()), past(9))[0], Cause::SysctlChanged);
    assert_eq!(to_b(&outside(a()), past(11))[0], Cause::PlaintextToProxy);
    let deaf =
        KernelPart { proxy_does_not_listen: vec!["15006".to_owned()], ..b().kernel.unwrap() };
    let now = PodPart { kernel: Some(deaf), ..past(9) };
    assert_eq!(to_b(&outside(a()), now)[..2], [Cause::ProxyNotListening, Cause::SysctlChanged]);
}

#[test]
fn each_kind_of_what_is_missing_has_its_cause() {
    for (kind, cause) in [
        (PartKind::Rule, Cause::RuleDeleted),
        (PartKind::DrainRoute, Cause::RuleDeleted),
        (PartKind::RuleOrder, Cause::RuleDeleted),
        (PartKind::Lookup, Cause::LinkDetached),
        (PartKind::Tcx, Cause::LinkDetached),
        (PartKind::Clsact, Cause::LinkDetached),
        (PartKind::Sysctl, Cause::SysctlChanged),
        (PartKind::Address, Cause::MapChanged),
    ] {
        let kernel = KernelPart {
            captured: true,
            missing: vec!["it".to_owned()],
            missing_kinds: vec![kind],
            proxy_dns: true,
            ..KernelPart::default()
        };
        let of = |state| PodPart { kernel: Some(kernel.clone()), state: Some(state), ..a() };
        assert_eq!(alone(&of(PodState::Degraded))[0], cause);
        // On its way in, it is only not there yet.
        assert_eq!(alone(&of(PodState::Enrolling))[0], Cause::NotThereYet);
    }
}

#[test]
fn a_proxy_that_is_away_explains_all_that_waits_for_it() {
    let since = Some(Moment::of(now()));
    let away = NodePart { proxies: Some(0), no_proxy_since: since, ..node() };
    let waits = PodPart {
        state: Some(PodState::Enrolling),
        message: Some("no proxy is connected".to_owned()),
        kernel: None,
        ..a()
    };
    assert_eq!(causes(&away, &waits, None), [Cause::ProxyNeverConnected, Cause::NothingFound]);
    let gone = NodePart { last_proxy: Some("closed the connection".to_owned()), ..away };
    assert_eq!(causes(&gone, &a(), None)[0], Cause::ProxyAway);
    assert_eq!(causes(&gone, &outside(a()), None)[0], Cause::NotLabeled, "it waits for none");
    let refused = PodPart { proxy: Some(Answer::Refused("no".to_owned())), ..a() };
    assert_eq!(alone(&refused)[0], Cause::ProxyRefusesPod);
}

#[test]
fn who_listens_where_nobody_calls_is_told_from_who_does_not_listen() {
    let listening = |at: &[&str]| PodPart {
        listens: Some(at.iter().map(|at| at.parse().unwrap()).collect()),
        ..b()
    };
    for (at, called, expected) in [
        (&["127.0.0.1:80"][..], "shop/b:80", Some(Cause::ListensOnLoopback)),
        (&["127.0.0.1:80"], "shop/b", Some(Cause::ListensOnLoopback)),
        (&["127.0.0.1:81", "0.0.0.0:80"], "shop/b:80", None),
        (&["127.0.0.1:80", "0.0.0.0:81"], "shop/b:80", Some(Cause::ListensOnLoopback)),
        (&["0.0.0.0:81"], "shop/b:80", Some(Cause::NobodyListens)),
        (&["10.0.0.9:80"], "shop/b:80", Some(Cause::NobodyListens)),
        (&["[::]:15006"], "shop/b:80", Some(Cause::NobodyListens)),
        (&["10.0.0.2:80"], "shop/b:80", None),
        (&["[::]:80"], "shop/b:80", None),
        (&["0.0.0.0:80"], "[fd00::2]:80", Some(Cause::NobodyListens)),
    ] {
        let found = causes(&node(), &a(), Some((called, Some(listening(at)))));
        assert_eq!(found[0], expected.unwrap_or(Cause::NothingFound), "{at:?} {called}");
    }
    // One that is not called may well not listen; one that does is meant to be called.
    assert_eq!(alone(&listening(&[])), [Cause::NothingFound]);
    assert_eq!(alone(&listening(&["[::1]:80"]))[0], Cause::ListensOnLoopback);
    // Then the datapath refuses the call, and the proxy never hears of it.
    assert!(!to_b(&outside(a()), listening(&["0.0.0.0:81"])).contains(&Cause::PlaintextToProxy));
    let leaving = PodPart { state: Some(PodState::Leaving), ..outside(a()) };
    let (_, findings) = judge(&node(), &leaving, None, None, now());
    assert!(findings.iter().any(|found| found.message.contains("is leaving")), "{findings:#?}");
    let dark = PodPart { listens: None, ..b() };
    assert_eq!(to_b(&a(), dark), [Cause::NothingFound]);
}

#[test]
fn a_misspelled_word_is_the_cause_only_where_it_decides() {
    let word = |what| UnknownWord {
        what,
        object: "namespace shop".to_owned(),
        key: "istio.io/dataplane-mod".to_owned(),
        value: "ambient".to_owned(),
        meant: Some("istio.io/dataplane-mode".to_owned()),
    };
    let with = |pod, what| PodPart { unknown_words: vec![word(what)], ..pod };
    assert_eq!(alone(&with(outside(a()), Slip::LabelKey))[0], Cause::MisspelledLabelKey);
    assert_eq!(alone(&with(outside(a()), Slip::NotALabel))[0], Cause::MisspelledLabelKey);
    assert_eq!(alone(&with(a(), Slip::AnnotationKey))[0], Cause::UnknownAnnotation);
    let harmless = with(a(), Slip::LabelKey);
    let (_, findings) = judge(&node(), &harmless, None, None, now());
    assert_eq!(findings[0].weight, super::Weight::Hint);
}

/// Operators paste it.
#[test]
fn what_to_run_next_is_one_command_whatever_an_annotation_says() {
    for what in [Slip::NotALabel, Slip::AnnotationKey] {
        let word = UnknownWord {
            what,
            object: "pod shop/a".to_owned(),
            key: "istio.io/dataplane-mod".to_owned(),
            value: "x'; touch y; :".to_owned(),
            meant: Some("istio.io/dataplane-mode".to_owned()),
        };
        let pod = PodPart { unknown_words: vec![word], ..outside(a()) };
        let (_, findings) = judge(&node(), &pod, None, None, now());
        let next = &findings[0].next[0];
        assert!(next.ends_with(r"istio.io/dataplane-mode='x'\''; touch y; :'"), "{next}");
    }
}

#[test]
fn who_is_kept_out_hears_what_lets_it_in() {
    for (reason, cause, next) in [
        (Reason::NotLabeled, Cause::NotLabeled, "kubectl label namespace shop"),
        (Reason::NotSelected, Cause::NotLabeled, "--show-labels"),
        (
            Reason::PodLabelNone,
            Cause::KeptOut,
            "kubectl -n shop label pod a istio.io/dataplane-mode-",
        ),
        (Reason::OverrideBypass, Cause::KeptOut, "redirect-agent auto shop/a"),
        (Reason::Paused, Cause::KeptOut, "redirect-agent resume"),
        (Reason::Sidecar, Cause::KeptOut, "istio-injection-"),
    ] {
        let (_, findings) = judge(&node(), &pod("shop/a", "10.0.0.1", reason), None, None, now());
        assert_eq!((findings[0].cause, findings[0].area), (cause, Area::Configuration));
        assert!(findings[0].next[0].contains(next), "{findings:#?}");
    }
}

#[test]
fn a_pod_that_is_not_known_or_left_out_is_said_to_be_so() {
    let unknown = PodPart { name: "shop/x".to_owned(), ..PodPart::default() };
    assert_eq!(alone(&unknown)[0], Cause::NoSuchPod);
    let other = PodPart { elsewhere: vec!["bank/x".to_owned()], ..unknown };
    assert_eq!(alone(&other)[0], Cause::WrongNamespace);
    let same = "its address 10.0.0.1 is that of pod shop/b, too".to_owned();
    let left_out = PodPart { place: Place::LeftOut, conflicts: vec![same], ..other };
    assert_eq!(alone(&left_out)[0], Cause::TwoPodsOneAddress);
    assert_eq!(to_b(&a(), left_out)[0], Cause::TwoPodsOneAddress);
    let missing: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap()];
    assert_eq!(alone(&PodPart { missing_addresses: missing, ..a() })[0], Cause::AddressMissing);
    let counters = BTreeMap::from([("refused_proxy_away".to_owned(), 3)]);
    assert_eq!(alone(&PodPart { counters, ..a() }), [Cause::NothingFound], "that is past");
}

#[test]
fn what_is_called_is_a_pod_or_an_address() {
    for text in ["shop/b", "shop/b:80", "10.0.0.2", "10.0.0.2:80", "fd00::2", "[fd00::2]:80"] {
        let to: To = text.parse().unwrap();
        assert_eq!(to.to_string(), text);
        let json = serde_json::to_string(&to).unwrap();
        assert_eq!(serde_json::from_str::<To>(&json).unwrap(), to);
    }
    for text in ["", "shop", "shop/", "shop/b:", "shop/b:0", "shop/b:x", "10.0.0.2:x", "[fd00::2]"]
    {
        assert!(text.parse::<To>().is_err(), "{text:?}");
    }
    let mapped: To = "::ffff:10.0.0.2".parse().unwrap();
    assert_eq!(mapped.to_string(), "10.0.0.2");
}

#[test]
fn causes_are_called_the_same_everywhere() {
    for cause in Cause::ALL {
        assert_eq!(serde_json::to_value(cause).unwrap(), cause.as_str());
    }
}

#[test]
fn call_to_a_service_is_judged_by_the_endpoint_that_is_worst_off() {
    let endpoint = |pod: &PodPart, port: u16, ready: bool| EndpointPart {
        pod: Some(pod.name.clone()),
        ip: pod.ips[0],
        port: Some(port),
        ready,
        verdict: None,
        chosen: false,
    };
    let c = pod("shop/c", "10.0.0.3", Reason::PodLabelAmbient);
    let d = pod("shop/d", "10.0.0.4", Reason::PodLabelAmbient);
    let endpoints = vec![endpoint(&b(), 80, true), endpoint(&c, 81, true), endpoint(&d, 81, false)];
    let service = ServicePart { name: "shop/s".to_owned(), endpoints, ..ServicePart::default() };
    let asked: To = "s.shop.svc".parse().unwrap();
    let choose = |pods| {
        let (service, asked) = (service.clone(), asked.clone());
        choose(&node(), &a(), asked, service, pods, now())
    };
    let (to, judgment) = choose(vec![Some(b()), Some(c.clone()), Some(d)]);
    let endpoints = &to.service.as_ref().unwrap().endpoints;
    let verdicts: Vec<_> = endpoints.iter().map(|e| (e.verdict, e.chosen)).collect();
    // Nobody listens on port 81, neither in `c` nor in `d`, which gets no new connections.
    let (fine, deaf) = (Some(Cause::NothingFound), Some(Cause::NobodyListens));
    assert_eq!(verdicts, [(fine, false), (deaf, true), (deaf, false)]);
    assert_eq!(to.pod.as_ref(), Some(&c));
    assert_eq!(judgment, judge(&node(), &a(), Some(&to), Some(&endpoints[1]), now()));
    assert_eq!(judgment.1[0].cause, Cause::NobodyListens);

    let (to, judgment) = choose(vec![None, None]);
    assert!(to.service.unwrap().endpoints.iter().all(|e| e.verdict.is_none() && !e.chosen));
    assert_eq!(to.pod, None);
    assert!(judgment.0.is_some());
}
