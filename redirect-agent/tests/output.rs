//! What the commands print and what they understand, against files that people can read.
#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod support;

use std::{collections::BTreeMap, fs, path::Path, process, time::Duration};

use clap::{CommandFactory as _, Parser as _, error::ErrorKind};
use redirect_agent::{
    cli::{Cli, Command, CompletionsArgs, SourceSpec},
    membership::Reason,
    output::{
        self, Format, KernelStatus, NodeOverride, OverrideStatus, PodState, PodStatus, Status,
    },
    overrides::{Mode, Moment, Override, Pause, Target},
    probes::InForce,
    source::Problem,
    traffic::{Selection, Selections, Traffic},
};
use serde_json::json;

use crate::support::golden;

fn moment(text: &str) -> Moment {
    text.to_owned().try_into().unwrap()
}

fn pod(namespace: &str, name: &str, state: PodState, reason: Reason) -> PodStatus {
    PodStatus {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: format!("uid-of-{name}"),
        ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        state,
        since: Some(moment("2026-08-01T11:00:00Z")),
        reason,
        message: None,
        overridden: None,
        traffic: None,
        netns: Some(4_026_532_001),
        kernel: None,
        counters: BTreeMap::new(),
    }
}

fn everything() -> Status {
    let complete = KernelStatus {
        complete: true,
        present: vec!["sk_lookup".to_owned(), "tcx lo".to_owned(), "tcx eth0".to_owned()],
        missing: Vec::new(),
    };
    let counters =
        BTreeMap::from([("redirected_outbound".to_owned(), 7), ("no_listener".to_owned(), 0)]);
    let until = Some(moment("2026-08-01T12:10:00Z"));
    Status {
        node: "n1".to_owned(),
        version: "0.1.0".to_owned(),
        started: Some(moment("2026-08-01T10:59:30Z")),
        source: "dir:/etc/manifests".to_owned(),
        waiting: None,
        proxies: 1,
        proxy_since: Some(moment("2026-08-01T10:59:40Z")),
        no_proxy_since: None,
        mark_alone: None,
        pause: Some(Pause { until, reason: Some("INC-42".to_owned()) }),
        overrides: vec![
            NodeOverride {
                target: Target::Namespace("shop".to_owned()),
                pods: 2,
                found: Override {
                    mode: Mode::Unenroll,
                    until,
                    reason: Some("load test".to_owned()),
                },
            },
            NodeOverride {
                target: "shop/gone".parse().unwrap(),
                pods: 0,
                found: Override { mode: Mode::Enroll, until: None, reason: None },
            },
        ],
        probes: InForce {
            kubelet: None,
            sources: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::1/128".parse().unwrap()],
            problem: Some("no process is called kubelet".to_owned()),
        },
        problems: vec![Problem {
            object: "a.yaml, document 2".to_owned(),
            message: "a line\nthat \u{1b}[2J moves the cursor".to_owned(),
            ..Problem::default()
        }],
        pods: vec![
            PodStatus {
                ips: Vec::new(),
                netns: None,
                message: Some("open /var/run/netns/shop_web: no such file".to_owned()),
                ..pod("shop", "web", PodState::Failed, Reason::NamespaceLabelAmbient)
            },
            PodStatus {
                kernel: Some(complete.clone()),
                counters,
                traffic: Some(Traffic {
                    bypass_inbound: true,
                    selections: Selections {
                        outbound_ports: Selection::new(None, &["3306".parse().unwrap()]),
                        ..Selections::default()
                    },
                    ..Traffic::default()
                }),
                ..pod("shop", "cart", PodState::Enrolled, Reason::PodLabelAmbient)
            },
            PodStatus {
                overridden: Some(OverrideStatus {
                    mode: Mode::Unenroll,
                    target: "bank".parse().unwrap(),
                    until,
                }),
                kernel: Some(KernelStatus {
                    complete: false,
                    missing: vec!["rule ipv6".to_owned()],
                    ..complete
                }),
                ..pod("bank", "vault", PodState::Leaving, Reason::OverrideBypass)
            },
            pod("bank", "plain", PodState::Bypassing, Reason::NotLabeled),
        ],
    }
}

#[test]
fn status_is_a_table_a_wide_table_and_json() {
    let all = everything();
    golden("status.txt", &output::status(&all, Format::Table, false).unwrap());
    golden("status-wide.txt", &output::status(&all, Format::Wide, false).unwrap());
    let json = output::status(&all, Format::Json, false).unwrap();
    golden("status.json", &json);
    let back: Status = serde_json::from_str(&json).unwrap();
    assert_eq!(output::status(&back, Format::Json, false).unwrap(), json);
}

#[test]
fn status_of_those_that_are_not_ready_counts_the_others_too() {
    let all = everything();
    let text = output::status(&all, Format::Table, true).unwrap();
    assert!(text.contains("shop        web") && text.contains("bank        vault"), "{text}");
    assert!(!text.contains("cart") && !text.contains("plain"), "{text}");
    let summary = "4 pods: 1 bypassing, 1 enrolled, 1 failed, 1 leaving; 2 not ready";
    assert_eq!(text.lines().last(), Some(summary));
    let json = output::status(&all, Format::Json, true).unwrap();
    let json: Status = serde_json::from_str(&json).unwrap();
    let names: Vec<&str> = json.pods.iter().map(|pod| pod.name.as_str()).collect();
    assert_eq!(names, ["vault", "web"]);
}

#[test]
fn what_a_pod_lacks_is_counted_when_it_is_much() {
    let part = |n: usize| format!("rule {n}");
    let lacks = |present: usize, missing: usize, format| {
        let kernel = KernelStatus {
            complete: missing == 0,
            present: (0..present).map(part).collect(),
            missing: (0..missing).map(part).collect(),
        };
        let cart = pod("shop", "cart", PodState::Degraded, Reason::PodLabelAmbient);
        let pods = vec![PodStatus { kernel: Some(kernel), ..cart }];
        output::status(&Status { pods, ..everything() }, format, false).unwrap()
    };
    assert!(lacks(18, 2, Format::Table).contains("   lacks rule 0, rule 1   "));
    assert!(lacks(6, 14, Format::Table).contains("   lacks 14 of 20   "));
    assert!(lacks(20, 0, Format::Wide).contains("   20/20   "));
    assert!(lacks(6, 14, Format::Wide).contains("   6/20   "));
}

#[test]
fn watching_prints_a_line_for_each_pod_that_is_not_as_it_was() {
    let now = humantime::parse_rfc3339("2026-08-01T12:00:00Z").unwrap();
    let by_name = |pods: Vec<PodStatus>| -> BTreeMap<(String, String), PodStatus> {
        pods.into_iter().map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod)).collect()
    };
    let cart = pod("shop", "cart", PodState::Enrolled, Reason::PodLabelAmbient);
    let counted = PodStatus { counters: BTreeMap::from([("hbone".to_owned(), 1)]), ..cart.clone() };
    let degraded = PodStatus {
        state: PodState::Degraded,
        message: Some("missing in the pod: rule\nipv6".to_owned()),
        kernel: Some(KernelStatus {
            complete: false,
            present: Vec::new(),
            missing: vec!["rule ipv6".to_owned()],
        }),
        ..counted.clone()
    };
    let gone = pod("shop", "old", PodState::Bypassing, Reason::NotLabeled);
    let (before, same) = (by_name(vec![cart, gone.clone()]), by_name(vec![counted, gone]));
    let lines = |before, after, format| -> String {
        output::changes(before, after).map(|change| change.line(now, format).unwrap()).collect()
    };
    assert_eq!(lines(&before, &same, Format::Table), "", "counters alone are no change");
    let after = by_name(vec![
        degraded,
        pod("shop", "web", PodState::Enrolling, Reason::NamespaceLabelAmbient),
    ]);
    assert_eq!(
        lines(&same, &after, Format::Table),
        "2026-08-01T12:00:00Z   shop/cart   degraded (pod-label-ambient), was enrolled, \
         lacks rule ipv6: missing in the pod: rule\u{fffd}ipv6\n\
         2026-08-01T12:00:00Z   shop/old   gone\n\
         2026-08-01T12:00:00Z   shop/web   enrolling (namespace-label-ambient)\n"
    );
    let json: Vec<serde_json::Value> = lines(&same, &after, Format::Json)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&json[0]["before"], &json[0]["pod"]["state"]),
        (&json!("enrolled"), &json!("degraded"))
    );
    assert_eq!((json.len(), &json[1]["pod"]), (3, &serde_json::Value::Null));
}

#[test]
fn status_of_an_empty_node_has_its_columns_all_the_same() {
    let kubelet = json!({"pid": 812, "cgroup": "/system.slice/kubelet.service"});
    let probes = json!({"kubelet": kubelet, "sources": [], "problem": null});
    let empty = Status {
        pause: None,
        overrides: vec![],
        probes: serde_json::from_value(probes).unwrap(),
        proxies: 0,
        pods: vec![],
        problems: vec![],
        ..everything()
    };
    assert_eq!(
        output::status(&empty, Format::Table, false).unwrap(),
        "node n1, redirect-agent 0.1.0, source dir:/etc/manifests, no proxy connected\n\
         probes: of kubelet, process 812 in cgroup /system.slice/kubelet.service\n\
         NAMESPACE   NAME   STATE   REASON   OVERRIDE   IPS   KERNEL   COUNTERS\n\
         no pods\n"
    );
    let waiting = Some("waiting for kube:https://api/: pods: refused".to_owned());
    let text = output::status(&Status { waiting, ..empty }, Format::Table, false).unwrap();
    let line = "waiting for kube:https://api/: pods: refused; what is in the kernel stays in force";
    assert_eq!(text.lines().nth(2), Some(line));
}

#[test]
fn a_proxy_that_is_away_is_said_once_and_not_for_each_pod() {
    let waits = PodStatus {
        message: Some(output::NO_PROXY.to_owned()),
        ..pod("shop", "cart", PodState::Enrolling, Reason::PodLabelAmbient)
    };
    let away = Status {
        proxies: 0,
        no_proxy_since: Some(moment("2026-08-01T12:00:00Z")),
        pods: vec![waits.clone(), PodStatus { name: "web".to_owned(), ..waits }],
        ..everything()
    };
    let text = output::status(&away, Format::Table, false).unwrap();
    let line = "no proxy since 2026-08-01T12:00:00Z; new connections of pods in the mesh are refused; is \
                ztunnel running on this node?";
    assert!(text.lines().any(|l| l == line), "{text}");
    assert!(!text.contains(output::NO_PROXY), "{text}");
    let nobody_knows = Status { no_proxy_since: None, ..away };
    let text = output::status(&nobody_knows, Format::Table, false).unwrap();
    assert_eq!(text.matches(output::NO_PROXY).count(), 2, "{text}");
}

#[test]
fn the_proxys_mark_alone_is_warned_of() {
    let why = "whatever has its mark passes for the proxy: it is in the root cgroup";
    let status = Status { mark_alone: Some(why.to_owned()), ..everything() };
    let text = output::status(&status, Format::Table, false).unwrap();
    assert_eq!(text.lines().nth(1), Some(why), "{text}");
    let json = output::status(&status, Format::Json, false).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["mark_alone"], why);
}

#[test]
fn the_command_line_is_consistent_and_every_command_has_examples() {
    let mut cli = Cli::command();
    cli.build();
    cli.clone().debug_assert();
    let mut help = String::new();
    for command in cli.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        let text = command.clone().term_width(100).render_long_help().to_string();
        assert!(text.contains("Examples:\n  redirect-agent "), "{text}");
        assert!(!text.contains("See ["), "{text}");
        help += &format!("{text}\n{}\n", "=".repeat(100));
    }
    golden("help.txt", &help);
}

#[test]
fn run_has_the_defaults_that_the_documents_name() {
    let cli = Cli::try_parse_from(["redirect-agent", "run"]).unwrap();
    let Command::Run(run) = cli.command else { panic!("{cli:?}") };
    assert_eq!((run.source, run.kubeconfig), (SourceSpec::Kube, None));
    assert_eq!("dir:/m".parse(), Ok(SourceSpec::Dir("/m".into())));
    assert_eq!(run.pods.netns_dir, Path::new("/var/run/netns"));
    assert_eq!(run.bpffs.bpffs_dir, Path::new("/sys/fs/bpf/redirect/v2"));
    assert_eq!(run.pods.state_dir, Path::new("/var/lib/redirect-agent"));
    assert_eq!(run.control.control_socket, Path::new("/run/redirect-agent/control.sock"));
    assert_eq!(run.zds_socket, Path::new("/var/run/ztunnel/ztunnel.sock"));
    assert_eq!(run.cni_socket, Path::new("/var/run/istio-cni/pluginevent.sock"));
    assert_eq!(run.cni_timeout, Duration::from_secs(25));
    assert_eq!(run.excluded_namespaces, ["kube-system"]);
    assert_eq!(run.proxy_grace, Duration::from_secs(3));
    assert_eq!(run.drain, Duration::from_secs(5));
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused() {
    for wrong in [
        &["run", "--source", "/m"][..],
        &["run", "--source", "kube:/m"],
        &["run", "--enablement-selectors", "- podSelector: {matchLabel: {a: b}}"],
        &["run", "--source", "dir:"],
        &["run", "--source", "dir:/m", "--excluded-namespaces", "a,B"],
        &["enroll"],
        &["enroll", "shop/"],
        &["enroll", "shop", "--for", "soon"],
        &["pause", "--for", "0s"],
        &["attach"],
        &["attach", "--netns", "x", "--address", "10.0.0"],
        &["status", "-o", "xml"],
        &["status", "Shop"],
        &["status", "-l", "app within (a)"],
        &["status", "--watch", "--exit-code"],
        &["verify"],
        &["verify", "shop"],
        &["verify", "shop/cart", "--all"],
        &["verify", "--all", "--to", "10.0.0.7:80"],
        &["verify", "shop/cart", "--to", "10.0.0.7"],
        &["verify", "shop/cart", "--to", "[fd00::7]:0"],
    ] {
        let error = Cli::try_parse_from(["redirect-agent"].iter().chain(wrong)).unwrap_err();
        assert!(error.use_stderr() && error.exit_code() == 2, "{wrong:?}");
    }
    let help = Cli::try_parse_from(["redirect-agent", "--help"]).unwrap_err();
    assert_eq!(help.kind(), ErrorKind::DisplayHelp);
}

#[test]
fn completions_are_there_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let args = CompletionsArgs { shell: shell.parse().unwrap() };
        let script = String::from_utf8(args.generate()).unwrap();
        assert!(script.contains("unenroll"), "{shell}");
    }
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let script = CompletionsArgs { shell: "bash".parse().unwrap() }.generate();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("completions");
    fs::write(&file, script).unwrap();
    let complete = |words: &[&str]| {
        // What bash itself does when somebody presses Tab.
        let run = r#"source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            read -ra how <<< "$(complete -p redirect-agent)"
            "${how[-2]}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            echo "${COMPREPLY[@]}""#;
        let mut bash = process::Command::new("bash");
        bash.args(["-c", run, "bash"]).arg(&file).arg("redirect-agent").args(words);
        String::from_utf8(bash.output().unwrap().stdout).unwrap().trim_end().to_owned()
    };
    for (words, completed) in [
        (&["st"][..], "status"),
        (&["status", "--not"], "--not-ready"),
        (&["status", "-o", ""], "table wide json"),
        (&["log-level", "--re"], "--reset"),
        (&["verify", "--al"], "--all"),
        (&["observe", "--verdict", "hbo"], "hbone"),
    ] {
        assert_eq!(complete(words), completed, "{words:?}");
    }
}

/// Names of interfaces and annotations of pods come there as they are.
#[test]
fn json_has_no_raw_control_characters() {
    let text = "\u{1b}[2J \u{7f} \u{9b}31m \u{a0}é";
    let json = redirect_agent::output::json(&text).unwrap();
    assert_eq!(json, "\"\\u001b[2J \\u007f \\u009b31m \u{a0}é\"\n");
    assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
}
