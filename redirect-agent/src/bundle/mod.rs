//! Everything about this node that a bug report needs, in one archive. Collecting changes nothing. Each part is
//! bounded in time, and so is the whole: what cannot be collected is named, and the rest is there.

mod agent;
mod archive;
mod bounds;
mod kernel;
mod names;
mod node;
mod redact;

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub use self::archive::Output;
use self::{bounds::Clock, names::Names, redact::Redactor};
use crate::{cni::install, explain::API_VERSION, output, overrides::Moment};

/// The first file of the archive.
const README: &str = include_str!("README.txt");

/// What to collect, and from where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the agent answers.
    pub control_socket: PathBuf,
    /// Where the agent's pins are.
    pub bpffs_dir: PathBuf,
    /// Where the network namespaces of pods are.
    pub netns_dir: PathBuf,
    /// What the agent remembers.
    pub state_dir: PathBuf,
    /// Where the node has its CNI.
    pub cni: install::Dirs,
    /// The node's name, where the agent does not say it.
    pub node: String,
    /// How long collecting may take; what is left then is skipped.
    pub timeout: Duration,
    /// Whether addresses and names are replaced.
    pub redact: bool,
    /// This command.
    pub command_line: Vec<String>,
}

/// What a file has in it.
#[derive(Clone, Debug, PartialEq)]
enum Content {
    Text(String),
    Json(Value),
}

/// A file of the archive.
#[derive(Clone, Debug, PartialEq)]
struct Part {
    name: String,
    content: Content,
}

/// What is not in the archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// Its name.
    pub part: String,
    /// Why not.
    pub why: String,
}

/// What was collected.
#[derive(Debug)]
pub struct Bundle {
    /// The name of the directory in the archive.
    pub dir: String,
    /// Each file: its name and its content.
    pub files: Vec<(String, String)>,
    /// What could not be collected.
    pub missing: Vec<Missing>,
    /// When it was collected.
    time: SystemTime,
}

/// Collects. `tell` is called with a line for each part.
///
/// # Errors
///
/// Never for what cannot be collected; when JSON cannot express what can.
pub async fn collect(options: &Options, tell: impl FnMut(&str)) -> Result<Bundle> {
    let time = SystemTime::now();
    let clock = Clock::start(options.timeout);
    let mut collector = Collector { clock, parts: Vec::new(), missing: Vec::new(), tell };
    let mut agent = agent::Agent::new(options, clock);
    let known = agent.collect(&mut collector).await;
    node::collect(options, &mut collector).await;
    kernel::collect(options, known.as_ref().map(|known| &known.status), &mut collector).await;
    // Last, because there may be many: what is asked only once has the time that it needs.
    agent.explain_wrong(known.as_ref(), &mut collector).await;
    let Collector { mut parts, mut missing, .. } = collector;
    let node = known.as_ref().map_or(&options.node, |known| &known.status.node).clone();
    let version = known.map(|known| known.status.version);
    parts.sort_by(|a, b| a.name.cmp(&b.name));
    let mut shown = node.clone();
    let mut command_line = options.command_line.clone();
    if options.redact {
        let mut names = Names::of(&parts, &options.netns_dir);
        names.add_node(&node);
        names.add_node(&options.node);
        let mut redactor = Redactor::new(names);
        parts.iter_mut().for_each(|part| redactor.part(part));
        for Missing { part, why } in &mut missing {
            *part = redactor.text(part);
            *why = redactor.text(why);
        }
        command_line.iter_mut().for_each(|word| *word = redactor.named(word));
        shown = redactor.named(&node);
    }
    let mut files = Vec::new();
    for Part { name, content } in parts {
        let content = match content {
            Content::Text(text) => text,
            Content::Json(value) => output::json(&value)?,
        };
        files.push((name, content));
    }
    if !missing.is_empty() {
        let line = |missing: &Missing| format!("{}: {}\n", missing.part, missing.why);
        files.insert(0, ("errors.txt".to_owned(), missing.iter().map(line).collect()));
    }
    let listed: Vec<Value> = files.iter().map(|(name, content)| listed(name, content)).collect();
    let manifest = json!({
        "apiVersion": API_VERSION,
        "kind": "Bundle",
        "time": Moment::of(time),
        "node": shown,
        "version": env!("CARGO_PKG_VERSION"),
        "agentVersion": version,
        "kernel": node::release(),
        "commandLine": command_line,
        "redacted": options.redact,
        "files": listed,
        "missing": missing,
    });
    files.insert(0, ("manifest.json".to_owned(), output::json(&manifest)?));
    files.insert(0, ("README.txt".to_owned(), README.to_owned()));
    let dir = format!("redirect-agent-{}-{}", file_name(&shown), stamp(time));
    Ok(Bundle { dir, files, missing, time })
}

fn listed(name: &str, content: &str) -> Value {
    let sum: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "name": name, "size": content.len(), "sha256": sum })
}

/// `20261130T163000Z`
fn stamp(time: SystemTime) -> String {
    Moment::of(time).to_string().replace(['-', ':'], "")
}

/// A node's name is a DNS subdomain, unless somebody has given another one.
fn file_name(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    name.chars().map(|c| if is_plain(c) { c } else { '_' }).collect()
}

/// The names of files that belong to a pod.
fn of_pod(namespace: &str, name: &str, file: &str) -> String {
    format!("pods/{}/{}/{file}", file_name(namespace), file_name(name))
}

/// Takes the parts as they come.
struct Collector<F> {
    clock: Clock,
    parts: Vec<Part>,
    missing: Vec<Missing>,
    tell: F,
}

impl<F: FnMut(&str)> Collector<F> {
    fn text(&mut self, name: &str, text: Result<String>) {
        self.add(name, text.map(Content::Text));
    }

    fn json(&mut self, name: &str, value: Result<impl Serialize>) {
        let value = value.and_then(|value| Ok(Content::Json(serde_json::to_value(value)?)));
        self.add(name, value);
    }

    fn add(&mut self, name: &str, content: Result<Content>) {
        match content {
            Ok(content) => {
                (self.tell)(name);
                self.parts.push(Part { name: name.to_owned(), content });
            }
            Err(error) => self.lacks(name, format!("{error:#}")),
        }
    }

    fn lacks(&mut self, part: &str, why: String) {
        let why = output::printable(&why);
        (self.tell)(&format!("{part}: not collected: {why}"));
        self.missing.push(Missing { part: part.to_owned(), why });
    }
}

/// Stands for the archive's name until that is known.
pub const ANY_NAME: &str = ".redirect-agent-bundle";

/// Where the archive goes unless the operator says otherwise: into the working directory.
pub fn default_path(bundle: &Bundle) -> PathBuf {
    Path::new(&bundle.dir).with_added_extension("tar.gz")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_is_named_after_the_node_and_the_time() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_056_200);
        assert_eq!(stamp(time), "20261130T163000Z");
        assert_eq!(file_name("../n1 x"), ".._n1_x");
        let dir = format!("redirect-agent-n1.example.com-{}", stamp(time));
        let bundle = Bundle { dir, files: Vec::new(), missing: Vec::new(), time };
        let path = default_path(&bundle);
        assert_eq!(path.to_str(), Some("redirect-agent-n1.example.com-20261130T163000Z.tar.gz"));
    }
}
