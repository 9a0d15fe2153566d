//! What is in a network namespace that matters to the datapath: for a report, whether or not an agent runs.
//! Looking changes nothing.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use serde::Serialize;

use super::{
    clsact::Clsact,
    hook::directions,
    links::PodLinks,
    routes::{Lines, Routing, Seen},
    sysctl,
};
use crate::netns::Netns;

/// A network namespace as it was found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// The inode number: the pod's id in the maps.
    pub netns: u32,
    /// The path by which it was opened.
    pub path: PathBuf,
    /// The pinned links of this id, attached or not.
    pub pins: Vec<PinnedLink>,
    /// The interfaces.
    pub interfaces: Vec<Interface>,
    /// The addresses, except 127.0.0.0/8 and ::1, each behind the name of its interface.
    pub addresses: Vec<String>,
    /// The rules in the kernel's order; ours are marked.
    rules: Lines,
    /// The routes, except those of the kernel's table `local`; ours are marked.
    routes: Lines,
    /// The sysctls that the agent sets.
    pub sysctls: BTreeMap<&'static str, Option<String>>,
    /// What could not be read, and why.
    pub failed: Vec<String>,
}

/// A pinned link.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PinnedLink {
    /// The pin's name.
    pub pin: String,
    /// The link's id.
    pub link: u32,
    /// The program's id.
    pub program: u32,
    /// The hash of the program's instructions.
    pub tag: String,
    /// The interface, or the namespace, that it is attached to; 0: it is detached, or its target is gone.
    pub target: u64,
}

/// A network interface.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// What runs at ingress, in order, tcx first: ours, and what others have attached.
    pub ingress: Vec<Running>,
    /// The same at egress.
    pub egress: Vec<Running>,
}

/// A program that runs on an interface.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    /// `tcx` or `clsact`.
    pub hook: &'static str,
    /// The program's name.
    pub name: String,
    /// The program's id.
    pub program: u32,
    /// The hash of its instructions, where the kernel says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// Looks at a network namespace. What cannot be read is in [`Snapshot::failed`].
///
/// # Errors
///
/// When it cannot be entered.
pub fn snapshot(bpffs_dir: &Path, netns: &Netns) -> Result<Snapshot> {
    let mut found =
        Snapshot { netns: netns.inode(), path: netns.path().to_owned(), ..Snapshot::default() };
    match pins(bpffs_dir, netns.inode()) {
        Ok(pins) => found.pins = pins,
        Err(error) => found.failed.push(format!("links: {error:#}")),
    }
    netns.run(|| found.look())?;
    Ok(found)
}

fn pins(bpffs_dir: &Path, netns: u32) -> Result<Vec<PinnedLink>> {
    let links = PodLinks::new(bpffs_dir, netns).all()?.into_iter();
    let shown = links.map(|(pin, view)| PinnedLink {
        pin,
        link: view.id,
        program: view.program_id,
        tag: view.program_tag,
        target: view.target,
    });
    Ok(shown.collect())
}

impl Snapshot {
    /// Runs inside the namespace.
    fn look(&mut self) {
        let mut keep = |what: &str, done: Result<()>| {
            self.failed.extend(done.err().map(|error| format!("{what}: {error:#}")));
        };
        keep("sysctls", sysctl::values().map(|values| self.sysctls = values));
        let routing = match Routing::open() {
            Ok(routing) => routing,
            Err(error) => return keep("netlink", Err(error)),
        };
        keep("rules", routing.rules_text().map(|rules| self.rules = rules));
        let names = routing.look().map(|seen| {
            self.interfaces = interfaces(&seen);
            self.addresses = addresses(&seen);
            self.interfaces.iter().map(|i| (i.index, i.name.clone())).collect::<BTreeMap<_, _>>()
        });
        let names = match names {
            Ok(names) => names,
            Err(error) => return keep("interfaces", Err(error)),
        };
        keep("routes", routing.routes_text(&names).map(|routes| self.routes = routes));
        for interface in &mut self.interfaces {
            let what = format!("programs of {}", interface.name);
            keep(&what, interface.look());
        }
    }
}

fn interfaces(seen: &Seen) -> Vec<Interface> {
    let all = seen.all_interfaces().map(|(index, name, up)| Interface {
        index,
        name: name.to_owned(),
        up,
        ingress: Vec::new(),
        egress: Vec::new(),
    });
    all.collect()
}

fn addresses(seen: &Seen) -> Vec<String> {
    seen.addresses().iter().map(|address| format!("{} {}", address.name, address.ip)).collect()
}

impl Interface {
    fn look(&mut self) -> Result<()> {
        let clsact = Clsact::open()?;
        for &at in directions(self.index) {
            let mut running = tcx(&self.name, at)?;
            running.extend(
                clsact.list(self.index, at)?.into_iter().map(|(name, program)| Running {
                    hook: "clsact",
                    name,
                    program,
                    tag: None,
                }),
            );
            match at {
                TcAttachType::Egress => self.egress = running,
                _ => self.ingress = running,
            }
        }
        Ok(())
    }
}

/// Nothing where the kernel has no tcx.
fn tcx(interface: &str, at: TcAttachType) -> Result<Vec<Running>> {
    let programs = match SchedClassifier::query_tcx(interface, at) {
        Err(ProgramError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            return Ok(Vec::new());
        }
        found => found.context("ask for tcx programs")?.1,
    };
    let shown = programs.iter().map(|program| Running {
        hook: "tcx",
        name: program.name_as_str().unwrap_or_default().to_owned(),
        program: program.id(),
        tag: Some(format!("{:016x}", program.tag())),
    });
    Ok(shown.collect())
}
