//! What the page says, in the words of `status`, and how much of it at most.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use askama::Template;

use super::refusals::{Refused, Row};
use crate::{
    health::Condition,
    output::{self, NO_PROXY, NodeOverride, PodState, PodStatus, Status, printable},
    overrides::{Mode, Moment, Pause},
    text::shortened,
    traffic::Traffic,
};

/// The page's stylesheet, as it stands in the page.
pub(super) const CSS: &str = include_str!("../../templates/page.css");

/// After how many seconds a browser asks again.
const RELOAD: u32 = 15;
/// How many characters a text of others may have, and how many rows each part of the page. What is left out
/// is counted, and `status` shows it.
const CHARS: usize = 400;
const ALARMS: usize = 50;
const WRONG: usize = 100;
const OVERRIDES: usize = 100;
const REFUSALS: usize = 50;
const PODS: usize = 1000;

#[derive(Template)]
#[template(path = "page.html")]
struct View {
    css: &'static str,
    reload: u32,
    now: Time,
    node: String,
    version: String,
    source: String,
    verdict: String,
    mood: &'static str,
    summary: String,
    started: Option<Time>,
    proxies: String,
    proxy_since: Option<Time>,
    probes: String,
    alarms: Vec<String>,
    wrong: Vec<Pod>,
    wrong_left_out: usize,
    overrides: Vec<Overriding>,
    overrides_left_out: usize,
    refused_since: Option<Time>,
    refusals: Vec<Row>,
    refusals_left_out: usize,
    pods: Vec<Pod>,
    pods_left_out: usize,
}

/// A point in time, and how long ago it was.
struct Time {
    at: String,
    clock: String,
    age: String,
}

struct Pod {
    name: String,
    state: &'static str,
    mood: &'static str,
    since: Option<Time>,
    reason: &'static str,
    settings: String,
    message: Option<String>,
}

/// A pause or an override, when it ends, and how to end it.
struct Overriding {
    text: String,
    end: String,
    command: String,
}

/// The page as HTML.
///
/// # Errors
///
/// When the template cannot be filled in.
pub(super) fn render(
    status: &Status,
    conditions: &[Condition],
    refused: &Refused,
    now: SystemTime,
) -> Result<String> {
    let mut pods: Vec<&PodStatus> = status.pods.iter().collect();
    pods.sort_by_key(|pod| (&pod.namespace, &pod.name));
    let mut wrong: Vec<&PodStatus> =
        pods.iter().copied().filter(|pod| !pod.state.is_ready() || pod.message.is_some()).collect();
    wrong.sort_by_key(|pod| severity(pod.state));
    let alarms = alarms(status, conditions);
    let overrides = overridings(status, now);
    let (verdict, mood) = verdict(status, conditions);
    let time = |moment| Time::new(moment, now);
    // While no proxy is connected, that is true of all pods, and an alarm.
    let said = status.no_proxy_since.is_some().then_some(NO_PROXY);
    let card = |pod: &&PodStatus| {
        let mut card = Pod::new(pod, now);
        card.message = card.message.filter(|message| Some(message.as_str()) != said);
        card
    };
    let counted =
        |row: &Row| Row { pod: short(&row.pod), counter: short(&row.counter), ..row.clone() };
    let view = View {
        css: CSS,
        reload: RELOAD,
        now: time(Moment::of(now)),
        node: short(&status.node),
        version: short(&status.version),
        source: short(&status.source),
        verdict,
        mood,
        summary: output::summary(&status.pods),
        started: status.started.map(time),
        proxies: output::proxies(status),
        proxy_since: status.proxy_since.map(time),
        probes: short(status.probes.to_string().trim_start_matches("probes: ")),
        alarms,
        wrong: wrong.iter().take(WRONG).map(card).collect(),
        wrong_left_out: wrong.len().saturating_sub(WRONG),
        overrides_left_out: overrides.len().saturating_sub(OVERRIDES),
        overrides: overrides.into_iter().take(OVERRIDES).collect(),
        refused_since: refused.since.map(time),
        refusals: refused.rows.iter().take(REFUSALS).map(counted).collect(),
        refusals_left_out: refused.rows.len().saturating_sub(REFUSALS),
        pods: pods.iter().take(PODS).map(|pod| Pod::new(pod, now)).collect(),
        pods_left_out: pods.len().saturating_sub(PODS),
    };
    view.render().context("fill in the page")
}

/// The node in two words, and how bad that is.
fn verdict(status: &Status, conditions: &[Condition]) -> (String, &'static str) {
    let not_ready = status.pods.iter().filter(|pod| !pod.state.is_ready()).count();
    let text = if status.waiting.is_some() {
        "waiting".to_owned()
    } else if status.no_proxy_since.is_some() {
        "no proxy".to_owned()
    } else if not_ready > 0 {
        format!("{not_ready} not ready")
    } else if conditions.iter().any(|condition| condition.missing.is_some()) {
        "agent not ready".to_owned()
    } else if status.pause.is_some() {
        return ("paused".to_owned(), "warn");
    } else {
        return ("all ready".to_owned(), "good");
    };
    (text, "bad")
}

/// What is wrong with the node, and not with one pod.
fn alarms(status: &Status, conditions: &[Condition]) -> Vec<String> {
    let waiting = output::waiting(status);
    let conditions = conditions.iter().filter_map(|condition| {
        // What it waits for is said already.
        let missing = condition.missing.as_ref().filter(|_| status.waiting.is_none())?;
        Some(format!("not ready: {}: {missing}", condition.name))
    });
    let problems = status.problems.iter().map(|problem| format!("problem: {problem}"));
    let mut alarms: Vec<String> = waiting
        .into_iter()
        .chain(output::no_proxy(status))
        .chain(status.mark_alone.clone())
        .chain(conditions)
        .chain(problems)
        .map(|alarm| short(&alarm))
        .collect();
    if let Some(more) = alarms.len().checked_sub(ALARMS).filter(|more| *more > 0) {
        alarms.truncate(ALARMS);
        alarms.push(format!("and {more} more problems: redirect-agent status"));
    }
    alarms
}

fn overridings(status: &Status, now: SystemTime) -> Vec<Overriding> {
    let ends = |until: Option<Moment>| match until {
        Some(until) => format!("ends in {}", span(until.from(now))),
        None => "does not end by itself".to_owned(),
    };
    let pause = |pause: &Pause| Overriding {
        text: short(&output::paused(pause)),
        end: ends(pause.until),
        command: "redirect-agent resume".to_owned(),
    };
    let other = |found: &NodeOverride| Overriding {
        text: short(&found.to_string()),
        end: ends(found.found.until),
        command: format!("redirect-agent auto {}", found.target),
    };
    // Who is out of the mesh first.
    let (out, into): (Vec<_>, Vec<_>) =
        status.overrides.iter().partition(|found| found.found.mode == Mode::Unenroll);
    let overrides = out.into_iter().chain(into).map(other);
    status.pause.iter().map(pause).chain(overrides).collect()
}

/// The lower, the worse.
fn severity(state: PodState) -> u8 {
    match state {
        PodState::Failed => 0,
        PodState::Degraded => 1,
        PodState::Enrolling | PodState::Leaving => 2,
        PodState::Enrolled | PodState::Bypassing => 3,
    }
}

impl Pod {
    fn new(pod: &PodStatus, now: SystemTime) -> Self {
        Self {
            name: short(&format!("{}/{}", pod.namespace, pod.name)),
            state: pod.state.as_str(),
            mood: match pod.state {
                PodState::Failed | PodState::Degraded => "bad",
                PodState::Enrolling | PodState::Leaving => "warn",
                PodState::Enrolled => "good",
                PodState::Bypassing => "calm",
            },
            since: pod.since.map(|since| Time::new(since, now)),
            reason: pod.reason.as_str(),
            settings: short(&pod.traffic.as_ref().map(Traffic::to_string).unwrap_or_default()),
            message: pod.message.as_deref().map(short),
        }
    }
}

impl Time {
    fn new(moment: Moment, now: SystemTime) -> Self {
        Self { at: moment.to_string(), clock: moment.clock(now), age: span(moment.until(now)) }
    }
}

/// A duration in its two largest units.
fn span(duration: Duration) -> String {
    let whole = humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string();
    whole.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// Text without control characters, and not too much of it.
fn short(text: &str) -> String {
    printable(&shortened(text, CHARS))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{super::tests::pod, *};
    use crate::{overrides::Override, probes::InForce, source::Problem};

    const HOSTILE: &str =
        "</td><script>alert('x')</script><img src=//evil.example/ onerror=\"x\">&\u{1b}[2J";

    fn moment(text: &str) -> Moment {
        text.to_owned().try_into().unwrap()
    }

    fn status(pods: Vec<PodStatus>) -> Status {
        Status {
            node: "n1".to_owned(),
            version: "0.1.0".to_owned(),
            started: Some(moment("2026-08-01T10:00:00Z")),
            source: "kube:https://10.96.0.1/".to_owned(),
            waiting: None,
            proxies: 1,
            proxy_since: Some(moment("2026-08-01T10:00:01Z")),
            no_proxy_since: None,
            mark_alone: None,
            pause: None,
            overrides: Vec::new(),
            probes: InForce { kubelet: None, sources: Vec::new(), problem: None },
            problems: Vec::new(),
            pods,
        }
    }

    fn page(status: &Status, conditions: &[Condition], refused: &Refused) -> String {
        let now = humantime::parse_rfc3339("2026-08-01T12:00:00Z").unwrap();
        render(status, conditions, refused, now).unwrap()
    }

    fn calm(status: &Status) -> String {
        page(status, &[], &Refused { since: None, rows: Vec::new() })
    }

    /// Checks that the page has these texts, in this order.
    fn assert_in_order(page: &str, texts: &[&str]) {
        let mut rest = page;
        for text in texts {
            let at = rest.find(text).unwrap_or_else(|| panic!("no {text:?} in\n{rest}"));
            rest = &rest[at + text.len()..];
        }
    }

    #[test]
    fn what_is_wrong_comes_first_and_the_worst_of_it_before_all() {
        let message = |text: &str| Some(text.to_owned());
        let pods = vec![
            PodStatus {
                since: Some(moment("2026-08-01T11:52:30Z")),
                message: message("missing in the pod: rule ipv4"),
                ..pod("a-degraded", PodState::Degraded)
            },
            pod("b-enrolled", PodState::Enrolled),
            PodStatus { message: message("open x"), ..pod("c-failed", PodState::Failed) },
            PodStatus { message: message("unknown word"), ..pod("d-plain", PodState::Bypassing) },
        ];
        let page = calm(&status(pods));
        let expected = [
            "<title>2 not ready · n1</title>",
            "4 pods: 1 bypassing, 1 degraded, 1 enrolled, 1 failed; 2 not ready",
            "running since <time datetime=\"2026-08-01T10:00:00Z\">10:00:00 UTC</time> <span class=\"soft\">2h ago</span>",
            "1 proxy connected since <time",
            "What is wrong",
            "shop/c-failed",
            "<code>redirect-agent explain shop/c-failed</code>",
            "shop/a-degraded",
            "11:52:30 UTC</time> <span class=\"soft\">7m 30s ago</span>",
            "missing in the pod: rule ipv4",
            "shop/d-plain",
            "unknown word",
            "<h2>Pods</h2>",
            "shop/a-degraded",
            "shop/b-enrolled",
            "shop/c-failed",
            "shop/d-plain",
        ];
        assert_in_order(&page, &expected);
        for absent in ["uid-of", "10.0.0.2", "Pauses and overrides", "Refused and dropped"] {
            assert!(!page.contains(absent), "{absent} in\n{page}");
        }
    }

    #[test]
    fn quiet_node_says_that_all_is_ready() {
        let page = calm(&status(vec![pod("cart", PodState::Enrolled)]));
        assert_in_order(&page, &["badge good\">all ready", "1 pod: 1 enrolled; all ready"]);
        assert!(!page.contains("What is wrong"), "{page}");
        assert!(calm(&status(Vec::new())).contains("no pods"));
    }

    #[test]
    fn what_concerns_the_whole_node_is_told_once() {
        let waits = |name: &str| PodStatus {
            message: Some(NO_PROXY.to_owned()),
            ..pod(name, PodState::Enrolling)
        };
        let away = Status {
            proxies: 0,
            no_proxy_since: Some(moment("2026-08-01T11:00:00Z")),
            ..status(vec![waits("cart"), waits("web")])
        };
        let plugin = Condition { name: "cni plugin", missing: Some("no entry".to_owned()) };
        let page = page(&away, &[plugin], &Refused { since: None, rows: Vec::new() });
        let expected = [
            "<title>no proxy",
            "no proxy connected",
            "no proxy since 2026-08-01T11:00:00Z; new connections of pods",
            "not ready: cni plugin: no entry",
            "shop/cart",
        ];
        assert_in_order(&page, &expected);
        assert!(!page.contains(NO_PROXY), "{page}");

        let waiting = Some("waiting for kube:https://10.96.0.1/; connection refused".to_owned());
        let page = calm(&Status { waiting, ..status(Vec::new()) });
        assert_in_order(
            &page,
            &["<title>waiting", "connection refused; what is in the kernel stays"],
        );
    }

    #[test]
    fn overrides_and_the_pause_say_when_they_end_and_how() {
        let until = Some(moment("2026-08-01T12:10:05Z"));
        let other = |target: &str, mode, until| NodeOverride {
            target: target.parse().unwrap(),
            pods: 1,
            found: Override { mode, until, reason: None },
        };
        let overrides =
            vec![other("bank", Mode::Enroll, until), other("shop/cart", Mode::Unenroll, None)];
        let pause = Some(Pause { until, reason: Some("INC-42".to_owned()) });
        let page = calm(&Status { pause, overrides, ..status(Vec::new()) });
        let expected = [
            "badge warn\">paused",
            "PAUSED until 2026-08-01T12:10:05Z (INC-42): every pod bypasses",
            "ends in 10m 5s",
            "<code>redirect-agent resume</code>",
            "override: unenroll shop/cart: 1 pod",
            "does not end by itself",
            "<code>redirect-agent auto shop/cart</code>",
            "override: enroll bank until 2026-08-01T12:10:05Z: 1 pod",
            "<code>redirect-agent auto bank</code>",
        ];
        assert_in_order(&page, &expected);
    }

    #[test]
    fn text_of_others_is_never_markup() {
        let traffic =
            Traffic { virtual_interfaces: vec![HOSTILE.to_owned()], ..Traffic::default() };
        let hostile = PodStatus {
            namespace: HOSTILE.to_owned(),
            name: HOSTILE.to_owned(),
            message: Some(HOSTILE.to_owned()),
            traffic: Some(traffic),
            ..pod("x", PodState::Failed)
        };
        let reason = Some(HOSTILE.to_owned());
        let found = Override { mode: Mode::Unenroll, until: None, reason: reason.clone() };
        let status = Status {
            node: HOSTILE.to_owned(),
            version: HOSTILE.to_owned(),
            source: HOSTILE.to_owned(),
            waiting: Some(HOSTILE.to_owned()),
            mark_alone: Some(HOSTILE.to_owned()),
            pause: Some(Pause { until: None, reason }),
            overrides: vec![NodeOverride { target: "shop".parse().unwrap(), pods: 1, found }],
            probes: InForce { kubelet: None, sources: Vec::new(), problem: reason_of(HOSTILE) },
            problems: vec![Problem {
                object: HOSTILE.to_owned(),
                message: HOSTILE.to_owned(),
                conflict: None,
            }],
            ..status(vec![hostile])
        };
        let row =
            Row { pod: HOSTILE.to_owned(), counter: HOSTILE.to_owned(), grown: Some(1), total: 2 };
        let condition = Condition { name: "cni plugin", missing: reason_of(HOSTILE) };
        let page = page(&status, &[condition], &Refused { since: None, rows: vec![row] });
        for markup in ["<script", "<img", "\u{1b}", "onerror=\"x\""] {
            assert!(!page.contains(markup), "{markup:?} in\n{page}");
        }
        assert!(page.matches("&#60;script&#62;").count() >= 12, "{page}");
    }

    fn reason_of(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn five_hundred_pods_are_shown_and_more_than_a_thousand_counted() {
        let many = |n: usize, state| -> Vec<PodStatus> {
            let long = Some("long ".repeat(100_000));
            let with =
                |n| PodStatus { message: long.clone(), ..pod(&format!("pod-{n:05}"), state) };
            (0..n).map(with).collect()
        };
        let row = Row {
            pod: "shop/x".to_owned(),
            counter: "no_listener".to_owned(),
            grown: None,
            total: 1,
        };
        let refused = Refused { since: None, rows: vec![row; 500] };
        let started = Instant::now();
        let all = page(&status(many(500, PodState::Failed)), &[], &refused);
        // Milliseconds; a debug build on a busy machine takes longer.
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert_eq!(all.matches("<tr><td class=\"name\">").count(), 500 + REFUSALS);
        assert!(all.contains("and 400 more: <code>redirect-agent status --not-ready</code>"));
        assert!(all.contains("and 450 more: <code>redirect-agent status</code>"));
        assert!(all.len() < 400_000, "{} bytes", all.len());

        let problem = Problem { object: "a.yaml".to_owned(), ..Problem::default() };
        let most =
            Status { problems: vec![problem; 5000], ..status(many(5000, PodState::Bypassing)) };
        let most = page(&most, &[], &refused);
        assert!(most.contains("and 4000 more: <code>redirect-agent status</code>"));
        assert!(most.contains("and 4950 more problems"));
        assert!(most.len() < 800_000, "{} bytes", most.len());
    }
}
