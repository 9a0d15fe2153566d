//! Where a program of ours runs on an interface: by a pinned tcx link, or, where the kernel has no tcx, by a
//! filter of a clsact qdisc.

use anyhow::{Context as _, Result};
use aya::programs::TcAttachType;
use nix::net::if_::if_nameindex;
use redirect_ebpf::abi::LOOPBACK_IFINDEX;

use super::{
    PartKind,
    clsact::Clsact,
    kernel::TcProgram,
    links::{PodLinks, attach_tcx, tcx_links},
};

/// By what programs run on interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hooks {
    /// tcx links, since Linux 6.6.
    Tcx,
    /// Filters of a clsact qdisc, since Linux 4.5.
    Clsact,
}

impl Hooks {
    /// The better of the two that the running kernel has. Not by its version: distributions bring features
    /// to older kernels, and leave them out of newer ones.
    ///
    /// # Errors
    ///
    /// When that cannot be asked.
    pub fn of_kernel() -> Result<Self> {
        match tcx_links(LOOPBACK_IFINDEX, TcAttachType::Ingress) {
            Ok(_) => Ok(Hooks::Tcx),
            // The kernel does not know this kind of attachment.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Hooks::Clsact),
            Err(e) => Err(e).context("ask for the tcx programs of lo"),
        }
    }

    /// The name of the feature.
    pub fn as_str(self) -> &'static str {
        self.part().as_str()
    }

    /// What of a pod is missing where a program does not run.
    pub(super) fn part(self) -> PartKind {
        match self {
            Hooks::Tcx => PartKind::Tcx,
            Hooks::Clsact => PartKind::Clsact,
        }
    }

    /// Attaches a program to ingress of `lo`, in a namespace that nobody needs.
    pub(super) fn try_on_lo(self, program: &TcProgram) -> Result<()> {
        let at = TcAttachType::Ingress;
        match self {
            Hooks::Tcx => {
                attach_tcx(&program.fd, LOOPBACK_IFINDEX, at).map(drop).context("attach to lo")
            }
            Hooks::Clsact => Clsact::open()?
                .ensure(LOOPBACK_IFINDEX, at, program, || Ok(()))
                .context("attach to lo"),
        }
    }

    /// One direction of an interface of the pod with these links.
    pub(super) fn at<'a>(
        self,
        links: &'a PodLinks,
        (index, name): (u32, &'a str),
        at: TcAttachType,
    ) -> Hook<'a> {
        Hook { hooks: self, links, index, name, at }
    }

    /// Takes our programs off all interfaces, where they are not links, which are detached by their pins.
    /// Runs inside the pod's namespace.
    pub(super) fn clear(self, links: &PodLinks) -> Result<()> {
        if self == Hooks::Tcx {
            return Ok(());
        }
        let clsact = Clsact::open()?;
        for interface in &if_nameindex().context("list the interfaces")? {
            let index = interface.index();
            clsact.clear(index, links.has_made_qdisc(index)).with_context(|| {
                format!("remove our filters from interface {}", interface.name().to_string_lossy())
            })?;
        }
        Ok(())
    }
}

/// One direction of one interface, where one program of ours runs before all others. Everything here runs
/// inside the pod's namespace.
pub(super) struct Hook<'a> {
    hooks: Hooks,
    links: &'a PodLinks,
    index: u32,
    name: &'a str,
    at: TcAttachType,
}

impl Hook<'_> {
    /// Lets `program` run, in the place of any other of ours, without a moment in which none does.
    pub(super) fn ensure(&self, program: &TcProgram) -> Result<()> {
        match self.hooks {
            Hooks::Tcx => self.links.ensure_tcx(program, (self.index, self.name), self.at),
            Hooks::Clsact => {
                let made = || self.links.note_qdisc(self.index);
                Clsact::open()?
                    .ensure(self.index, self.at, program, made)
                    .with_context(|| format!("attach a clsact filter to interface {}", self.name))
            }
        }
    }

    /// Whether this program runs, and not one of a former agent.
    pub(super) fn runs(&self, program_id: u32) -> Result<bool> {
        match self.hooks {
            Hooks::Tcx => self.links.has_tcx(program_id, self.index, self.at),
            Hooks::Clsact => Clsact::open()?.runs(self.index, self.at, program_id),
        }
    }
}

/// In which directions an interface has a program.
pub(super) fn directions(index: u32) -> &'static [TcAttachType] {
    match index {
        LOOPBACK_IFINDEX => &[TcAttachType::Ingress],
        // The guard comes first: what it is for is not let in before.
        _ => &[TcAttachType::Egress, TcAttachType::Ingress],
    }
}
