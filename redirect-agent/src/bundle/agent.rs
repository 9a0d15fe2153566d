//! What the running agent says. One that hangs is asked once.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use serde_json::{Map, Value, json};

use super::{
    Collector, Options,
    bounds::{Beginning, Clock, beginning},
    of_pod,
};
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
/// The same for `explain`, which says by itself what takes too long.
const EXPLAINS: Duration = explain::WITHIN.saturating_add(Duration::from_secs(2));
/// How many pods are explained. A node has few that are not as they should be; or all of them are, for one reason.
const EXPLAINED: usize = 100;
/// What of `/proc/PID/status` is of interest.
const STATUS: [&str; 7] = ["State", "VmHWM", "VmRSS", "Threads", "CapEff", "Seccomp", "NSpid"];
/// What of `/proc/PID` is read of one file, in bytes: a command line may have megabytes.
const OF_PROC: usize = 64 * 1024;

/// The running agent, as far as it answers.
pub(super) struct Agent {
    client: Client,
    clock: Clock,
    /// Why it is not asked any more.
    gone: Option<String>,
}

/// What it has said.
pub(super) struct Known {
    pub(super) status: Status,
    notes: Vec<Note>,
}

impl Agent {
    pub(super) fn new(options: &Options, clock: Clock) -> Self {
        Self { client: Client::new(&options.control_socket), clock, gone: None }
    }

    async fn ask<T>(
        &mut self,
        within: Duration,
        answer: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        if let Some(gone) = &self.gone {
            return Err(anyhow!("{gone}"));
        }
        match self.clock.within(within, answer).await? {
            Some(answer) => answer,
            None => {
                self.gone = Some("not asked, because the agent did not answer before".to_owned());
                Err(anyhow!("the agent did not answer within {within:?}"))
            }
        }
    }

    /// Collects what the agent says, except of single pods.
    pub(super) async fn collect<F: FnMut(&str)>(&mut self, to: &mut Collector<F>) -> Option<Known> {
        let client = self.client.clone();
        match self.ask(ANSWER, client.process()).await {
            Ok(Some(pid)) => to.json("agent.json", self.clock.bounded(move || process(pid)).await),
            Ok(None) => {
                to.lacks("agent.json", "the agent's process cannot be seen from here".into())
            }
            Err(error) => {
                to.lacks("agent.json", format!("{error:#}"));
                // The same would be said of each part.
                self.gone = Some("the agent cannot be reached".to_owned());
            }
        }
        let status = self.ask(ANSWER, client.status()).await;
        let known = || status.as_ref().map_err(|error| anyhow!("{error:#}"));
        to.text("status.txt", known().and_then(|known| output::status(known, Format::Wide, false)));
        to.json("status.json", known().map(|known| output::status_document(known.clone())));
        let settings = self.ask(ANSWER, client.settings()).await;
        let settings =
            settings.map(|found| Document::new("Settings", json!({ "settings": found })));
        to.json("settings.json", settings);
        to.json("log-level.json", self.ask(ANSWER, client.log()).await);
        to.text("metrics.txt", self.ask(ANSWER, client.metrics()).await);
        let journal = self.ask(ANSWER, client.journal()).await;
        let notes = journal.as_ref().map(Vec::clone).unwrap_or_default();
        let journal = journal.map(|notes| Document::new("Journal", json!({ "entries": notes })));
        to.json("journal.json", journal);
        match status {
            Ok(status) => Some(Known { status, notes }),
            Err(error) => {
                to.lacks("pods/*/*/explain.json", format!("{error:#}"));
                None
            }
        }
    }

    /// Collects what the agent says of each pod that is not as it should be.
    pub(super) async fn explain_wrong<F: FnMut(&str)>(
        &mut self,
        known: Option<&Known>,
        to: &mut Collector<F>,
    ) {
        let Some(Known { status, notes }) = known else { return };
        let warned: BTreeSet<&PodKey> = notes
            .iter()
            .filter(|note| note.entry.kind.is_warning())
            .map(|note| &note.pod)
            .collect();
        let mut wrong: Vec<PodKey> =
            status.pods.iter().filter(|pod| is_wrong(pod)).map(key).collect();
        wrong.extend(status.pods.iter().map(key).filter(|key| warned.contains(key)));
        let mut seen = BTreeSet::new();
        wrong.retain(|key| seen.insert(key.clone()));
        for key in wrong.iter().take(EXPLAINED) {
            let client = self.client.clone();
            let request = explain::Request { pod: key.clone(), to: None };
            let answer = self.ask(EXPLAINS, client.explain(&request)).await;
            to.json(&of_pod(&key.namespace, &key.name, "explain.json"), answer);
        }
        let left = wrong.len().saturating_sub(EXPLAINED);
        if left > 0 {
            to.lacks(
                "pods/*/*/explain.json",
                format!("{left} more pods are not as they should be"),
            );
        }
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
        beginning(Path::new(&path), OF_PROC).with_context(|| format!("read {path}"))
    };
    let text = |file: &str| {
        read(file).map(|found| String::from_utf8_lossy(&found.content).trim().to_owned())
    };
    let status: Map<String, Value> = text("status")?
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| STATUS.contains(key))
        .map(|(key, value)| (key.to_owned(), json!(value.trim())))
        .collect();
    let mut process = json!({
        "pid": pid,
        "status": status,
        "cgroup": text("cgroup")?,
        "openFiles": fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
    });
    command_line(&read("cmdline")?, &mut process);
    Ok(Document::new("AgentProcess", process))
}

fn command_line(found: &Beginning, to: &mut Value) {
    let text = String::from_utf8_lossy(&found.content);
    to["commandLine"] = text.split_terminator('\0').collect();
    if found.is_cut {
        to["commandLineCut"] =
            format!("it is longer than the {OF_PROC} bytes that are here").into();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command, Stdio},
        thread,
        time::Instant,
    };

    use super::*;

    /// What is said of a process with arguments of this many bytes.
    fn with_arguments(bytes: usize) -> Value {
        // It waits for its standard input.
        let mut waits = Command::new("cat")
            .arg("-")
            .args(std::iter::repeat_n("x".repeat(999), bytes / 1000))
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        let found = loop {
            let found = serde_json::to_value(process(waits.id()).unwrap()).unwrap();
            // For a moment, a program that starts has no command line.
            if found["commandLine"][0] == "cat" || began.elapsed() > Duration::from_secs(10) {
                break found;
            }
            thread::yield_now();
        };
        waits.kill().unwrap();
        waits.wait().unwrap();
        found
    }

    #[test]
    fn command_line_is_cut_and_says_so() {
        let short = with_arguments(1000);
        assert_eq!(short["commandLine"][1], "-", "{short}");
        assert!(short.get("commandLineCut").is_none(), "{short}");
        let long = with_arguments(100_000);
        assert_eq!(long["commandLineCut"], "it is longer than the 65536 bytes that are here");
        let words = long["commandLine"].as_array().unwrap();
        let length: usize = words.iter().map(|word| word.as_str().unwrap().len() + 1).sum();
        assert_eq!(length, OF_PROC + 1, "the last one is cut off");
    }
}
