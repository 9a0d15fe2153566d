//! The demo: what the whole of it does, shown on two nodes made out of network namespaces.
//!
//! `cluster` is the stage and `node` its programs; `rows` are the calls and `evidence` tells how they
//! went; `live` puts a label on and off under load; `toggles` is the operator; `kernel` looks at what the
//! kernel has; `show` prints.

mod cluster;
mod evidence;
mod kernel;
mod live;
mod node;
mod rows;
mod show;
mod stop;
mod toggles;

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::time::Instant;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use redirect_agent::output::Status;
use serde::Serialize;

pub use evidence::{Evidence, Over, Seen, Wire};
pub use kernel::{Footprint, PodsEntry, PodsMap};
pub use live::{Live, Old, Redirected, Switch, Tally};
pub(crate) use node::Node;
pub use node::NodeCommand;
pub use rows::Row;
pub use stop::Stop;
pub use toggles::Toggle;

use cluster::Cluster;

/// How the demo speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people, on stdout, as it goes along.
    Text,
    /// Progress on stderr; the report is for whoever called.
    Json,
}

/// Everything that the demo has seen.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Who calls whom, and how that went.
    pub rows: Vec<Row>,
    /// A label goes on and off a running pod.
    pub live: Live,
    /// What an operator can do.
    pub toggles: Vec<Toggle>,
    /// What the agents say at the end, by node.
    pub status: BTreeMap<&'static str, Status>,
    /// What the kernel knows of the pods.
    pub pods_maps: Vec<PodsMap>,
    /// What is in the namespaces of pods that bypass, and of one in the mesh.
    pub bypass_proof: Vec<Footprint>,
    /// How long all of it took.
    pub seconds: u64,
    /// Whether everything was as it should be.
    pub ok: bool,
}

/// Gives this process mounts of its own, which vanish with the last process that has them, even when
/// all are killed. To be called before there are threads.
pub fn leave_no_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    // What is unmounted elsewhere goes here, too; nothing goes the other way.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .context("keep mounts to ourselves")
}

/// Runs the demo. Everything that it makes is gone when this returns, however it returns.
pub fn run(format: Format, stop: &Stop) -> Result<Report> {
    let started = Instant::now();
    let screen = Screen(format);
    screen.say("starting two nodes, each with an agent and a proxy", String::new)?;
    let cluster = Cluster::start(stop)?;
    let played = play(&cluster, &screen, stop);
    let explain = match &played {
        Ok(report) => !report.ok,
        // Whoever reads us has seen enough, or wants us to end.
        Err(error) => !error.is::<io::Error>() && stop.check().is_ok(),
    };
    if explain {
        eprint!("{}", cluster.logs()?);
    }
    drop(cluster);
    let report = Report { seconds: started.elapsed().as_secs(), ..played? };
    let verdict = show::verdict(&report);
    screen.say(&verdict, || format!("\n{}", show::paragraph(&verdict)))?;
    Ok(report)
}

fn play(cluster: &Cluster, screen: &Screen, stop: &Stop) -> Result<Report> {
    screen.say("calling", show::stage)?;
    let rows = rows::all(cluster, stop)?;
    screen.say("putting a label on a pod, and taking it off", || show::rows(&rows))?;
    let live = live::run(cluster, stop)?;
    screen.say("trying the toggles", || show::live(&live))?;
    let toggles = toggles::all(cluster, stop)?;
    screen.say("looking at what the kernel has", || show::toggles(&toggles))?;

    let mut status = BTreeMap::new();
    let mut pods_maps = Vec::new();
    for node in &cluster.nodes {
        status.insert(node.name, node.status()?);
        let printed = node.command(&["status"])?;
        screen.say("", || show::status(node.name, &printed))?;
        pods_maps.push(PodsMap::dump(cluster, node)?);
    }
    screen.say("", || show::pods_maps(&pods_maps))?;
    let bypass_proof = kernel::footprints(cluster)?;
    screen.say("cleaning up", || show::bypass_proof(&bypass_proof))?;
    stop.check()?;

    let ok = rows.iter().all(|row| row.ok)
        && live.ok
        && toggles.iter().all(|toggle| toggle.ok)
        && pods_maps.iter().all(|map| map.ok)
        && bypass_proof.iter().all(|footprint| footprint.ok);
    Ok(Report { rows, live, toggles, status, pods_maps, bypass_proof, seconds: 0, ok })
}

/// Where text goes.
struct Screen(Format);

impl Screen {
    /// Says in a line what comes next, or in full what has come.
    fn say(&self, next: &str, text: impl FnOnce() -> String) -> Result<()> {
        match self.0 {
            Format::Json if next.is_empty() => Ok(()),
            Format::Json => writeln!(io::stderr(), "demo: {next}"),
            Format::Text => io::stdout().lock().write_all(text().as_bytes()),
        }
        .context("print")
    }
}
