//! The pinned links. A pod has `sk_lookup` on its namespace, and tcx on each of its interfaces: ingress on
//! `lo`, both directions on all others. One more link is on kubelet's cgroup.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::programs::{CgroupAttachMode, ProgramFd, SockOps, TcAttachType, links::FdLink};
use aya_obj::generated::bpf_attach_type;
use redirect_ebpf::abi::PodId;

use super::{kernel::TcProgram, remove_if_there, sys};
use crate::netns::Netns;

/// The pins of one pod, `<bpffs>/links/<netns inode>/…`.
pub(super) struct PodLinks {
    dir: PathBuf,
}

/// The pods that have links below this directory of bpffs.
///
/// # Errors
///
/// When bpffs cannot be read. A directory that does not exist has none.
pub fn linked_pods(bpffs_dir: &Path) -> Result<BTreeSet<PodId>> {
    let dir = bpffs_dir.join("links");
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries.with_context(|| format!("list {}", dir.display()))?,
    };
    let mut pods = BTreeSet::new();
    for entry in entries {
        pods.extend(entry?.file_name().to_str().and_then(|name| name.parse::<PodId>().ok()));
    }
    Ok(pods)
}

/// What a pinned link is attached to, and what it runs. Source: Linux `kernel/bpf/syscall.c`,
/// `kernel/bpf/tcx.c`, `kernel/bpf/net_namespace.c` and `kernel/bpf/cgroup.c`, their `show_fdinfo`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LinkView {
    pub(super) id: u32,
    pub(super) program_id: u32,
    /// The hash of its instructions, in hexadecimal.
    pub(super) program_tag: String,
    /// The interface's index, the namespace's inode number, or the cgroup's id; 0 once its target is gone.
    pub(super) target: u64,
}

impl PodLinks {
    pub(super) fn new(bpffs_dir: &Path, netns_inode: u32) -> Self {
        Self { dir: bpffs_dir.join("links").join(netns_inode.to_string()) }
    }

    pub(super) fn create_dir(&self) -> Result<()> {
        fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))
    }

    /// Attaches `sk_lookup` if it is not attached: `load` gives the pod's own program, which never changes.
    pub(super) fn ensure_lookup(
        &self,
        netns: &Netns,
        load: impl FnOnce() -> Result<OwnedFd>,
    ) -> Result<()> {
        let pin = self.lookup_pin();
        if adopt(&pin, |view| view.target == u64::from(netns.inode()))?.is_some() {
            return Ok(());
        }
        let program = load()?;
        let link = sys::link_lookup(program.as_fd(), netns.as_fd()).context("attach sk_lookup")?;
        sys::obj_pin(link.as_fd(), &pin).with_context(|| format!("pin {}", pin.display()))
    }

    /// Attaches a program to an interface, at the head of its tcx chain, or swaps the program of the existing
    /// link. Runs inside the pod's namespace. Attaching takes some milliseconds, one at a time on the whole
    /// node, because the kernel waits for an RCU grace period.
    pub(super) fn ensure_tcx(
        &self,
        program: &TcProgram,
        (index, name): (u32, &str),
        at: TcAttachType,
    ) -> Result<()> {
        let pin = self.tcx_pin(index, at);
        let attached = tcx_links(index, at)
            .with_context(|| format!("list the tcx programs of interface {name}"))?;
        // The index alone is not enough: the link may be on another interface that has left the namespace.
        if let Some(link) = adopt(&pin, |view| attached.contains(&view.id))? {
            return swap(&link, program.id, program.fd.as_fd());
        }
        let link = attach_tcx(&program.fd, index, at)
            .with_context(|| format!("attach tcx program to interface {name}"))?;
        sys::obj_pin(link.as_fd(), &pin).with_context(|| format!("pin {}", pin.display()))
    }

    /// Whether `sk_lookup` is attached to the namespace.
    pub(super) fn has_lookup(&self, netns_inode: u32) -> Result<bool> {
        is_attached(&self.lookup_pin(), netns_inode.into())
    }

    /// Whether this program is attached to the interface, rather than one of an earlier agent. Runs inside
    /// the pod's namespace.
    pub(super) fn has_tcx(&self, program_id: u32, index: u32, at: TcAttachType) -> Result<bool> {
        let Some(link) = open(&self.tcx_pin(index, at))? else { return Ok(false) };
        let view = view(&link)?;
        // An interface that is gone has no links.
        Ok(view.program_id == program_id
            && tcx_links(index, at).is_ok_and(|attached| attached.contains(&view.id)))
    }

    /// Whether no link is attached anymore, which means that the namespace is gone. A single interface may be
    /// gone too, or may have been moved to another namespace.
    pub(super) fn are_dead(&self) -> Result<bool> {
        let lookup = self.lookup_pin();
        let pins = self.pins()?;
        for pin in if pins.contains(&lookup) { vec![lookup] } else { pins } {
            if let Some(link) = open(&pin)?
                && view(&link)?.target != 0
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether there are pins and all of their links are dead.
    pub(super) fn are_left(&self) -> Result<bool> {
        Ok(!self.pins()?.is_empty() && self.are_dead()?)
    }

    /// The links that are attached, each with the name of its pin.
    pub(super) fn attached(&self) -> Result<Vec<(String, LinkView)>> {
        let mut links = self.all()?;
        links.retain(|(_, view)| view.target != 0);
        Ok(links)
    }

    /// The pinned links, attached or not, each with the name of its pin.
    pub(super) fn all(&self) -> Result<Vec<(String, LinkView)>> {
        let mut links = Vec::new();
        for pin in self.pins()? {
            let Some(name) = pin.file_name().and_then(|name| name.to_str()) else { continue };
            if let Some(link) = open(&pin)? {
                links.push((name.to_owned(), view(&link)?));
            }
        }
        links.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(links)
    }

    /// Removes the links of interfaces that are gone.
    pub(super) fn prune_tcx(&self) -> Result<()> {
        for pin in self.pins()?.iter().filter(|pin| **pin != self.lookup_pin()) {
            if let Some(link) = open(pin)?
                && view(&link)?.target == 0
            {
                remove_if_there(pin)?;
            }
        }
        Ok(())
    }

    /// Remembers that the clsact qdisc of an interface is ours.
    pub(super) fn note_qdisc(&self, index: u32) -> Result<()> {
        let note = self.qdisc_note(index);
        fs::create_dir_all(&note).with_context(|| format!("create {}", note.display()))
    }

    /// Whether the clsact qdisc of an interface is ours.
    pub(super) fn has_made_qdisc(&self, index: u32) -> bool {
        self.qdisc_note(index).is_dir()
    }

    /// Detaches everything.
    pub(super) fn detach(&self) -> Result<()> {
        self.pins()?.iter().try_for_each(|pin| detach(pin))
    }

    /// Removes the directory, which has no pin by now.
    pub(super) fn remove_dir(&self) -> Result<()> {
        for note in self.entries(fs::FileType::is_dir)? {
            remove_dir_if_there(&note)?;
        }
        remove_dir_if_there(&self.dir)
    }

    fn pins(&self) -> Result<Vec<PathBuf>> {
        self.entries(fs::FileType::is_file)
    }

    fn entries(&self, is_right: impl Fn(&fs::FileType) -> bool) -> Result<Vec<PathBuf>> {
        let list = || -> io::Result<Vec<PathBuf>> {
            let mut paths = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                if is_right(&entry.file_type()?) {
                    paths.push(entry.path());
                }
            }
            Ok(paths)
        };
        match list() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            paths => paths.with_context(|| format!("list {}", self.dir.display())),
        }
    }

    /// A directory, because bpffs has no plain files.
    fn qdisc_note(&self, index: u32) -> PathBuf {
        self.dir.join(format!("clsact_{index}"))
    }

    fn lookup_pin(&self) -> PathBuf {
        self.dir.join("lookup")
    }

    fn tcx_pin(&self, index: u32, at: TcAttachType) -> PathBuf {
        let direction = if at == TcAttachType::Egress { "out" } else { "in" };
        self.dir.join(format!("{direction}_{index}"))
    }
}

/// The pin of the link on kubelet's cgroup.
pub(super) struct KubeletLink {
    pin: PathBuf,
}

impl KubeletLink {
    pub(super) fn new(bpffs_dir: &Path) -> Self {
        Self { pin: bpffs_dir.join("kubelet") }
    }

    /// Attaches the program to the cgroup, or swaps the program of the existing link. A link on another
    /// cgroup is detached.
    pub(super) fn ensure(&self, program: &mut SockOps, cgroup: &fs::File, id: u64) -> Result<()> {
        let program_id = program.info().context("inspect sock_ops program")?.id();
        if let Some(link) = adopt(&self.pin, |view| view.target == id)? {
            return swap(&link, program_id, program.fd()?.as_fd());
        }
        // Links are never exclusive: programs of others stay attached.
        let link = program
            .attach(cgroup, CgroupAttachMode::Single)
            .context("attach the sock_ops program to kubelet's cgroup")?;
        let link = program.take_link(link).context("take the link of the sock_ops program")?;
        let link: FdLink = link.try_into().context("take the link of the sock_ops program")?;
        link.pin(&self.pin).with_context(|| format!("pin {}", self.pin.display()))?;
        Ok(())
    }

    /// Detaches the program, if it is attached.
    pub(super) fn remove(&self) -> Result<()> {
        detach(&self.pin)
    }
}

/// Attaches a program at the head of an interface's tcx chain. Runs inside the pod's namespace.
pub(super) fn attach_tcx(program: &ProgramFd, index: u32, at: TcAttachType) -> io::Result<OwnedFd> {
    sys::link_tcx(program.as_fd(), index, kernels(at))
}

/// The tcx links of an interface. Runs inside the pod's namespace.
pub(super) fn tcx_links(index: u32, at: TcAttachType) -> io::Result<Vec<u32>> {
    sys::tcx_links(index, kernels(at))
}

fn kernels(at: TcAttachType) -> bpf_attach_type {
    match at {
        TcAttachType::Egress => bpf_attach_type::BPF_TCX_EGRESS,
        _ => bpf_attach_type::BPF_TCX_INGRESS,
    }
}

fn remove_dir_if_there(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Detaches the link pinned at `pin`, if there is one, and removes the pin.
fn detach(pin: &Path) -> Result<()> {
    if let Some(link) = open(pin)?
        && view(&link)?.target != 0
    {
        sys::link_detach(link.as_fd()).with_context(|| format!("detach {}", pin.display()))?;
    }
    remove_if_there(pin)
}

/// The link pinned at `pin`, if `is_right` accepts it. Any other pin is removed.
fn adopt(pin: &Path, is_right: impl FnOnce(&LinkView) -> bool) -> Result<Option<OwnedFd>> {
    let Some(link) = open(pin)? else { return Ok(None) };
    if is_right(&view(&link)?) {
        return Ok(Some(link));
    }
    remove_if_there(pin)?;
    Ok(None)
}

fn is_attached(pin: &Path, target: u64) -> Result<bool> {
    match open(pin)? {
        Some(link) => Ok(view(&link)?.target == target),
        None => Ok(false),
    }
}

fn open(pin: &Path) -> Result<Option<OwnedFd>> {
    match sys::obj_get(pin) {
        Ok(link) => Ok(Some(link)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("open pinned link {}", pin.display())),
    }
}

fn swap(link: &OwnedFd, program_id: u32, program: BorrowedFd<'_>) -> Result<()> {
    if view(link)?.program_id == program_id {
        return Ok(());
    }
    sys::link_update(link.as_fd(), program).context("swap the program of a link")
}

fn view(link: &OwnedFd) -> Result<LinkView> {
    let path = format!("/proc/self/fdinfo/{}", link.as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(parse_fdinfo(&text))
}

fn parse_fdinfo(text: &str) -> LinkView {
    let mut view = LinkView::default();
    for (key, text) in text.lines().filter_map(|line| line.split_once(':')) {
        let value: u64 = text.trim().parse().unwrap_or(0);
        match key {
            "prog_tag" => text.trim().clone_into(&mut view.program_tag),
            "link_id" => view.id = u32::try_from(value).unwrap_or(0),
            "prog_id" => view.program_id = u32::try_from(value).unwrap_or(0),
            "ifindex" | "netns_ino" | "cgroup_id" => view.target = value,
            _ => {}
        }
    }
    view
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_every_kind_of_link_names_program_and_target() {
        let tcx = "pos:\t0\nflags:\t02000002\nlink_type:\ttcx\nlink_id:\t7\nprog_tag:\tab\nprog_id:\t42\nifindex:\t3\nattach_type:\t46 (tcx_ingress)\n";
        let view = |id, program_id, program_tag: &str, target| {
            let program_tag = program_tag.to_owned();
            LinkView { id, program_id, program_tag, target }
        };
        assert_eq!(parse_fdinfo(tcx), view(7, 42, "ab", 3));
        let lookup = "link_type:\tnetns\nlink_id:\t8\nprog_id:\t43\nnetns_ino:\t4026532001\nattach_type:\t36\n";
        assert_eq!(parse_fdinfo(lookup), view(8, 43, "", 4_026_532_001));
        let cgroup = "link_type:\tcgroup\nlink_id:\t9\nprog_id:\t44\ncgroup_id:\t4294967297\nattach_type:\t3\n";
        assert_eq!(parse_fdinfo(cgroup), view(9, 44, "", 4_294_967_297));
    }

    #[test]
    fn fdinfo_of_a_detached_link_names_no_target() {
        assert_eq!(parse_fdinfo("prog_id:\t43\nnetns_ino:\t0\n").target, 0);
    }
}
