//! The commands that ask the running agent, or tell it something.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    time::{Duration, SystemTime},
};

use anyhow::{Result, bail, ensure};
use tokio::time::{Instant, sleep};

use super::{print, print_to_reader, reader_leaves};
use crate::{
    cli::{
        AutoArgs, Doing, ExplainArgs, LogLevelArgs, ObserveArgs, OverrideArgs, PauseArgs,
        ResumeArgs, StatusArgs,
    },
    control::{
        Answer, Client, LogRequest, OverrideRequest, PauseRequest, ResumeRequest, StatusRequest,
    },
    explain::{self, Area, Place},
    membership::{Config, PodKey},
    output::{self, Format, PodState, PodStatus, Status, TextFormat},
    overrides::{Mode, Target},
    verdicts::{self, Line},
};

/// How often `--wait` asks the agent.
const LOOK: Duration = Duration::from_millis(200);
/// How often `status --watch` asks the agent.
const WATCH: Duration = Duration::from_secs(1);

pub(super) async fn put_override(args: OverrideArgs, mode: Mode) -> Result<()> {
    let OverrideArgs { target, duration, doing, control } = args;
    let client = Client::new(control.control_socket);
    put(&client, target, Some(mode), duration.duration, doing).await
}

pub(super) async fn auto(args: AutoArgs) -> Result<()> {
    let AutoArgs { target, doing, control } = args;
    put(&Client::new(control.control_socket), target, None, None, doing).await
}

async fn put(
    client: &Client,
    target: Target,
    mode: Option<Mode>,
    duration: Option<Duration>,
    doing: Doing,
) -> Result<()> {
    let for_seconds = duration.map(|d| d.as_secs());
    let request = OverrideRequest { target, mode, for_seconds, reason: doing.reason };
    let answer = client.set_override(&request).await?;
    let Some(patience) = doing.wait else { return tell(&answer) };
    tell(&answer)?;
    ensure!(
        !answer.wanted.is_empty(),
        "no pod of this node matches {0}: there is nothing to wait for; the override stays: `redirect-agent auto {0}` \
         removes it",
        request.target
    );
    if mode == Some(Mode::Enroll) {
        let out: Vec<_> = answer
            .wanted
            .iter()
            .filter(|(_, wanted)| !**wanted)
            .map(|(pod, _)| pod.to_string())
            .collect();
        ensure!(out.is_empty(), "{} cannot enter the mesh: the notes say why", out.join(", "));
    }
    wait_until_so(client, &answer.wanted, patience).await
}

/// The same for a change that concerns the whole node.
async fn tell_of_node(client: &Client, answer: &Answer, wait: Option<Duration>) -> Result<()> {
    tell(answer)?;
    match wait {
        Some(_) if answer.wanted.is_empty() => print(b"there is nothing to wait for\n"),
        Some(patience) => wait_until_so(client, &answer.wanted, patience).await,
        None => Ok(()),
    }
}

pub(super) async fn pause(args: PauseArgs) -> Result<()> {
    let client = Client::new(args.control.control_socket);
    let for_seconds = args.duration.duration.map(|d| d.as_secs());
    let answer = client.pause(&PauseRequest { for_seconds, reason: args.doing.reason }).await?;
    tell_of_node(&client, &answer, args.doing.wait).await
}

pub(super) async fn resume(args: ResumeArgs) -> Result<()> {
    let client = Client::new(args.control.control_socket);
    let answer = client.resume(&ResumeRequest { reason: args.doing.reason }).await?;
    tell_of_node(&client, &answer, args.doing.wait).await
}

pub(super) async fn log_level(args: LogLevelArgs) -> Result<()> {
    let client = Client::new(args.control.control_socket);
    let level = if args.filter.is_none() && !args.reset {
        client.log().await?
    } else {
        let for_seconds = args.duration.map(|d| d.as_secs());
        client.set_log(&LogRequest { filter: args.filter, for_seconds }).await?
    };
    let text = match args.output {
        TextFormat::Json => output::json(&level)?,
        TextFormat::Text => {
            let until =
                level.until.map(|until| format!(", until {}", until.clock(SystemTime::now())));
            format!("{}{}\n", level.filter, until.unwrap_or_default())
        }
    };
    print(text.as_bytes())
}

/// Prints what the agent says.
fn tell(answer: &Answer) -> Result<()> {
    let mut text = format!("{}\n", output::printable(&answer.message));
    for note in &answer.notes {
        text.push_str("note: ");
        text.push_str(&output::printable(note));
        text.push('\n');
    }
    print(text.as_bytes())
}

async fn wait_until_so(
    client: &Client,
    wanted: &BTreeMap<PodKey, bool>,
    patience: Duration,
) -> Result<()> {
    let began = Instant::now();
    let targets = wanted.keys().cloned().map(Target::Pod).collect();
    let request = StatusRequest { targets, selector: None };
    loop {
        let status = client.status_of(&request).await?;
        let is_there = |pod: &&PodStatus| {
            let key = PodKey { namespace: pod.namespace.clone(), name: pod.name.clone() };
            match wanted.get(&key) {
                Some(true) => matches!(pod.state, PodState::Enrolled | PodState::Degraded),
                Some(false) => pod.state == PodState::Bypassing,
                None => true,
            }
        };
        let Some(first) = status.pods.iter().find(|pod| !is_there(pod)) else {
            let took = humantime::format_duration(Duration::from_millis(
                u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            ));
            return print(format!("done after {took}\n").as_bytes());
        };
        if began.elapsed() > patience {
            let why = first.message.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            let left = status.pods.iter().filter(|pod| !is_there(pod)).count();
            bail!(
                "{left} of {} pods are not in the expected state after {}; {}/{} is {}{}",
                wanted.len(),
                humantime::format_duration(patience),
                first.namespace,
                first.name,
                first.state.as_str(),
                output::printable(&why)
            );
        }
        sleep(LOOK).await;
    }
}

pub(super) async fn status(args: StatusArgs) -> Result<()> {
    let client = Client::new(args.control.control_socket);
    let request = StatusRequest { targets: args.targets, selector: args.selector };
    let status = client.status_of(&request).await?;
    if args.watch {
        return watch(&client, &request, status, args.output, args.not_ready).await;
    }
    print(output::status(&status, args.output, args.not_ready)?.as_bytes())?;
    if request.selector.is_none() {
        let missing = without_pods(&status, &request.targets);
        if !missing.is_empty() {
            bail!("{}", missing.join("; "));
        }
    }
    if args.exit_code {
        is_ready(&status)?;
    }
    Ok(())
}

/// Says of which targets this node has no pod.
fn without_pods(status: &Status, targets: &[Target]) -> Vec<String> {
    if status.waiting.is_some() {
        return Vec::new();
    }
    let has_none = |target: &&Target| !status.pods.iter().any(|pod| is_of(target, pod));
    targets.iter().filter(has_none).map(no_pod).collect()
}

fn is_of(target: &Target, pod: &PodStatus) -> bool {
    match target {
        Target::Namespace(namespace) => *namespace == pod.namespace,
        Target::Pod(key) => key.namespace == pod.namespace && key.name == pod.name,
    }
}

fn no_pod(target: &Target) -> String {
    match target {
        Target::Namespace(namespace) => format!("namespace {namespace} has no pod on this node"),
        Target::Pod(key) => format!("there is no pod {key} on this node"),
    }
}

/// What `--exit-code` asks.
fn is_ready(status: &Status) -> Result<()> {
    if let Some(waiting) = &status.waiting {
        bail!("the agent does not know the pods yet: {}", output::printable(waiting));
    }
    if status.pods.iter().any(|pod| !pod.state.is_ready()) {
        bail!("{}", output::summary(&status.pods));
    }
    Ok(())
}

/// Prints everything, and then a line for each change, until it is interrupted. An agent that goes away
/// is waited for.
async fn watch(
    client: &Client,
    request: &StatusRequest,
    first: Status,
    format: Format,
    not_ready: bool,
) -> Result<()> {
    print(output::status(&first, format, not_ready)?.as_bytes())?;
    let mut before = by_name(first);
    let mut away = false;
    loop {
        sleep(WATCH).await;
        let now = match client.status_of(request).await {
            Ok(status) => by_name(status),
            Err(error) if away => {
                drop(error);
                continue;
            }
            Err(error) => {
                eprintln!("{error:#}; waiting for it");
                away = true;
                continue;
            }
        };
        away = false;
        let hidden =
            |pod: Option<&PodStatus>| not_ready && pod.is_none_or(|pod| pod.state.is_ready());
        let mut lines = String::new();
        for change in output::changes(&before, &now) {
            if hidden(change.before) && hidden(change.after) {
                continue;
            }
            lines.push_str(&change.line(SystemTime::now(), format)?);
        }
        print(lines.as_bytes())?;
        before = now;
    }
}

fn by_name(status: Status) -> BTreeMap<(String, String), PodStatus> {
    status.pods.into_iter().map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod)).collect()
}

pub(super) async fn explain(args: ExplainArgs) -> Result<()> {
    let explanation = match &args.file {
        Some(path) => {
            let excluded_namespaces = args.excluded_namespaces.into_iter().collect();
            let membership = Config { excluded_namespaces, selectors: None };
            explain::file::explain(path, &args.pod, &membership)?
        }
        None => {
            let request = explain::Request { pod: args.pod, to: args.to };
            Client::new(args.control.control_socket).explain(&request).await?
        }
    };
    let text = match args.output {
        TextFormat::Text => explain::text(&explanation),
        TextFormat::Json => output::json(&explanation)?,
    };
    print(text.as_bytes())?;
    let called = explanation.to.as_ref().and_then(|to| to.pod.as_ref());
    for pod in [Some(&explanation.pod), called].into_iter().flatten() {
        if pod.place == Place::Unknown {
            bail!("there is no pod {}", pod.name);
        }
    }
    let verdict = &explanation.verdict;
    if args.exit_code && verdict.area != Area::None {
        bail!("{}: {}", verdict.area.as_str(), verdict.cause.as_str());
    }
    Ok(())
}

pub(super) async fn observe(args: ObserveArgs) -> Result<()> {
    let ObserveArgs { targets, to, port, verdict, refused, duration, limit, output, control } =
        args;
    let client = Client::new(control.control_socket);
    let request = verdicts::Request { targets, to, port, verdicts: verdict, refused };
    let mut left = limit;
    let each = |line: Line| {
        let text = match output {
            TextFormat::Text => format!("{line}\n").into_bytes(),
            TextFormat::Json => verdicts::to_json(std::slice::from_ref(&line))?,
        };
        let is_read = print_to_reader(&text)?;
        if matches!(line, Line::Verdict(_)) {
            left = left.map(|left| left - 1);
        }
        let done = left == Some(0) || !is_read;
        Ok(if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    };
    let over = async {
        match duration.duration {
            Some(duration) => sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    let observing = client.observe(&request).await?;
    if !request.targets.is_empty() {
        let of = StatusRequest { targets: request.targets.clone(), selector: None };
        for missing in without_pods(&client.status_of(&of).await?, &request.targets) {
            eprintln!("note: {missing}, so far");
        }
    }
    eprintln!("observing; Ctrl-C ends it");
    tokio::select! {
        ended = observing.each(each) => ended,
        // That is what was asked for.
        () = over => Ok(()),
        () = reader_leaves() => Ok(()),
    }
}
