//! What the running agent says. One that hangs is asked once.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::{Collector, Options, of_pod};
use crate::{
    control::Client,
    explain,
    journal::Note,
    membership::PodKey,
    output::{self, Document, Format, PodStatus, Status},
};

/// How long the agent may take for one answer: less than [`Client`] waits, which would not tell this from other
/// failures.
const ANSWER: Duration = Duration::from_secs(8);
/// How many pods are explained. A node has few that are not as they should be; or all of them are, for one reason.
const EXPLAINED: usize = 100;
/// What of `/proc/PID/status` is of interest.
const STATUS: [&str; 7] = ["State", "VmHWM", "VmRSS", "Threads", "CapEff", "Seccomp", "NSpid"];

struct Agent {
    client: Client,
    /// Why it is not asked any more.
    gone: Option<String>,
}

impl Agent {
    async fn ask<T>(&mut self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        if let Some(gone) = &self.gone {
            return Err(anyhow!("{gone}"));
        }
        match timeout(ANSWER, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                self.gone = Some("not asked, because the agent did not answer before".to_owned());
                Err(anyhow!("the agent did not answer within {ANSWER:?}"))
            }
        }
    }
}

/// Collects what the agent says; returns its status.
pub(super) async fn collect<F: FnMut(&str)>(
    options: &Options,
    to: &mut Collector<F>,
) -> Option<Status> {
    let client = Client::new(&options.control_socket);
    let mut agent = Agent { client: client.clone(), gone: None };
    match agent.ask(client.process()).await {
        Ok(Some(pid)) => to.json("agent.json", process(pid)),
        Ok(None) => to.lacks("agent.json", "the agent's process cannot be seen from here".into()),
        Err(error) => {
            to.lacks("agent.json", format!("{error:#}"));
            // The same would be said of each part.
            agent.gone = Some("the agent cannot be reached".to_owned());
        }
    }
    let status = agent.ask(client.status()).await;
    let known = || status.as_ref().map_err(|error| anyhow!("{error:#}"));
    to.text("status.txt", known().and_then(|known| output::status(known, Format::Wide, false)));
    to.json("status.json", known().map(|known| output::status_document(known.clone())));
    to.json("log-level.json", agent.ask(client.log()).await);
    to.text("metrics.txt", agent.ask(client.metrics()).await);
    let journal = agent.ask(client.journal()).await;
    let notes = journal.as_ref().map(Vec::clone).unwrap_or_default();
    let journal = journal.map(|notes| Document::new("Journal", json!({ "entries": notes })));
    to.json("journal.json", journal);
    match status {
        Ok(status) => {
            explain_wrong(&mut agent, &status, &notes, to).await;
            Some(status)
        }
        Err(error) => {
            to.lacks("pods/*/*/explain.json", format!("{error:#}"));
            None
        }
    }
}

async fn explain_wrong<F: FnMut(&str)>(
    agent: &mut Agent,
    status: &Status,
    notes: &[Note],
    to: &mut Collector<F>,
) {
    let warned: BTreeSet<&PodKey> =
        notes.iter().filter(|note| note.entry.kind.is_warning()).map(|note| &note.pod).collect();
    let mut wrong: Vec<PodKey> = status.pods.iter().filter(|pod| is_wrong(pod)).map(key).collect();
    wrong.extend(status.pods.iter().map(key).filter(|key| warned.contains(key)));
    let mut seen = BTreeSet::new();
    wrong.retain(|key| seen.insert(key.clone()));
    for key in wrong.iter().take(EXPLAINED) {
        let client = agent.client.clone();
        let request = explain::Request { pod: key.clone(), to: None };
        let answer = agent.ask(client.explain(&request)).await;
        to.json(&of_pod(&key.namespace, &key.name, "explain.json"), answer);
    }
    let left = wrong.len().saturating_sub(EXPLAINED);
    if left > 0 {
        to.lacks("pods/*/*/explain.json", format!("{left} more pods are not as they should be"));
    }
}

fn key(pod: &PodStatus) -> PodKey {
    PodKey { namespace: pod.namespace.clone(), name: pod.name.clone() }
}

fn is_wrong(pod: &PodStatus) -> bool {
    let lacks = pod.kernel.as_ref().is_some_and(|kernel| !kernel.missing.is_empty());
    !pod.state.is_ready() || lacks || pod.message.is_some()
}

/// The agent's process, without its environment.
fn process(pid: u32) -> Result<Document<Value>> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    };
    let status = read("status")?;
    let status: Map<String, Value> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| STATUS.contains(key))
        .map(|(key, value)| (key.to_owned(), json!(value.trim())))
        .collect();
    let arguments = read("cmdline")?;
    let arguments: Vec<&str> = arguments.split_terminator('\0').collect();
    let process = json!({
        "pid": pid,
        "commandLine": arguments,
        "status": status,
        "cgroup": read("cgroup")?.trim(),
        "openFiles": fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
    });
    Ok(Document::new("AgentProcess", process))
}
