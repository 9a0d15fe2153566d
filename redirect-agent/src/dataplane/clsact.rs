//! Filters of clsact qdiscs, for kernels without tcx. Everything here runs inside the pod's namespace.
//!
//! Ours have the priority that comes first, and there the kernel puts a new one before those that are
//! there. They outlive the agent like pinned links, but whoever has `NET_ADMIN` in the namespace may
//! delete them.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::TcAttachType;
use futures_util::StreamExt as _;
use rtnetlink::{
    Error, Handle,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
        },
    },
};

use super::{
    kernel::{TC_PROGRAMS, TcProgram},
    routes,
};

/// The priority of our filters: 0 lets the kernel choose.
const PRIORITY: u16 = 1;
/// Filters for all protocols. Source: Linux `include/uapi/linux/if_ether.h`.
const ETH_P_ALL: u16 = 0x0003;
/// The handles of our filters: a program that is no longer the first gets the other one, before the old is
/// deleted.
const HANDLES: [u32; 2] = [0x5244_0001, 0x5244_0002];
/// How many are read of a pod, as in `routes`: nobody needs more.
const POD_FILTERS: usize = 1024;
/// The kind of the qdisc that has filters in both directions.
const CLSACT: &str = "clsact";

/// A connection to the kernel's traffic control in the namespace that it was opened in.
pub(super) struct Clsact {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

/// A BPF filter of our priority.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    handle: u32,
    name: String,
    program_id: u32,
}

impl Filter {
    /// Reads it from the kernel's message; `None` for the one that comes before those of a priority.
    fn read(message: &TcMessage) -> Option<Self> {
        let options = message.attributes.iter().find_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        })?;
        let mut filter =
            Self { handle: message.header.handle.into(), name: String::new(), program_id: 0 };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name.clone_from(name),
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program_id = *id,
                _ => {}
            }
        }
        Some(filter)
    }

    fn is_ours(&self) -> bool {
        HANDLES.contains(&self.handle) && TC_PROGRAMS.contains(&self.name.as_str())
    }
}

/// What has to be done so that one filter of ours comes first.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    /// The handle that the program is to be at: there it replaces the one that has it, else it becomes the
    /// first.
    put: Option<u32>,
    /// Handles of ours that are deleted afterwards.
    delete: Vec<u32>,
}

impl Change {
    /// `filters` are those that are there, in the order in which they run.
    fn new(filters: &[Filter], program_id: u32) -> Self {
        let ours: Vec<&Filter> = filters.iter().filter(|filter| filter.is_ours()).collect();
        let others = |kept: u32| -> Vec<u32> {
            ours.iter().map(|filter| filter.handle).filter(|handle| *handle != kept).collect()
        };
        match filters.first() {
            Some(first) if first.is_ours() => {
                let put = (first.program_id != program_id).then_some(first.handle);
                Self { put, delete: others(first.handle) }
            }
            _ => {
                let is_free = |handle: &u32| ours.iter().all(|filter| filter.handle != *handle);
                match HANDLES.into_iter().find(is_free) {
                    Some(free) => Self { put: Some(free), delete: others(free) },
                    // Left by an agent that died in between: one of them goes on running meanwhile.
                    None => Self { put: None, delete: others(ours[0].handle) },
                }
            }
        }
    }
}

impl Clsact {
    /// Connects in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let (runtime, handle) = routes::connect()?;
        Ok(Self { runtime, handle })
    }

    /// Lets the program be the first that runs. `made` is called before the qdisc is made, where there is none.
    pub(super) fn ensure(
        &self,
        index: u32,
        at: TcAttachType,
        program: &TcProgram,
        made: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.runtime.block_on(async {
            match self.qdisc(index).await? {
                Some(kind) if kind == CLSACT => {}
                // It would take what is for egress, too.
                Some(kind) => bail!("it has a qdisc of kind {kind}; make it clsact"),
                None => {
                    made()?;
                    self.make_qdisc(index).await?;
                }
            }
            loop {
                let filters = self.filters(index, at).await?;
                let Change { put, delete } = Change::new(&filters, program.id);
                if let Some(handle) = put {
                    self.put(index, at, handle, program).await?;
                }
                for handle in &delete {
                    self.delete(index, at, *handle).await?;
                }
                if put.is_some() || delete.is_empty() {
                    return Ok(());
                }
            }
        })
    }

    /// Whether this program is the first that runs.
    pub(super) fn runs(&self, index: u32, at: TcAttachType, program_id: u32) -> Result<bool> {
        let filters = self.runtime.block_on(self.filters(index, at))?;
        Ok(filters.first().is_some_and(|first| first.is_ours() && first.program_id == program_id))
    }

    /// Removes our filters, and the qdisc, where it is `made` by us and has no others.
    pub(super) fn clear(&self, index: u32, made: bool) -> Result<()> {
        self.runtime.block_on(async {
            let mut others = 0;
            for at in [TcAttachType::Ingress, TcAttachType::Egress] {
                for filter in self.filters(index, at).await?.iter().filter(|f| f.is_ours()) {
                    self.delete(index, at, filter.handle).await?;
                }
                others += self
                    .get(RouteNetlinkMessage::GetTrafficFilter(at_hook(index, at)))
                    .await?
                    .len();
            }
            if made && others == 0 && self.qdisc(index).await?.as_deref() == Some(CLSACT) {
                let delete = RouteNetlinkMessage::DelQueueDiscipline(qdisc(index));
                done(self.send(delete, 0).await).context("delete our clsact qdisc")?;
            }
            Ok(())
        })
    }

    /// The kind of the qdisc whose filters see what comes in.
    async fn qdisc(&self, index: u32) -> Result<Option<String>> {
        // The kernel lists those of all interfaces.
        let all = self.get(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default())).await?;
        let ours = qdisc(index).header;
        let found = all.into_iter().find(|message| {
            (message.header.index, message.header.parent) == (ours.index, ours.parent)
        });
        Ok(found.and_then(|message| {
            message.attributes.into_iter().find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind),
                _ => None,
            })
        }))
    }

    async fn make_qdisc(&self, index: u32) -> Result<()> {
        let mut message = qdisc(index);
        message.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
        let new = RouteNetlinkMessage::NewQueueDiscipline(message);
        let hint = "the kernel needs CONFIG_NET_SCH_INGRESS (module sch_ingress)";
        done(self.send(new, NLM_F_CREATE | NLM_F_EXCL).await)
            .with_context(|| format!("make a clsact qdisc: {hint}"))
    }

    /// The BPF filters of our priority, in the order in which they run: their names, and their programs' ids.
    pub(super) fn list(&self, index: u32, at: TcAttachType) -> Result<Vec<(String, u32)>> {
        self.runtime.block_on(async {
            if self.qdisc(index).await?.is_none_or(|kind| kind != CLSACT) {
                return Ok(Vec::new());
            }
            let filters = self.filters(index, at).await?;
            Ok(filters.into_iter().map(|filter| (filter.name, filter.program_id)).collect())
        })
    }

    /// The BPF filters of our priority, in the order in which they run.
    async fn filters(&self, index: u32, at: TcAttachType) -> Result<Vec<Filter>> {
        let mut message = at_priority(index, at);
        message.attributes.push(TcAttribute::Chain(0));
        let found = self.get(RouteNetlinkMessage::GetTrafficFilter(message)).await?;
        Ok(found.iter().filter_map(Filter::read).collect())
    }

    /// Adds a filter, before all others of our priority, or replaces the program of the one with this handle.
    async fn put(
        &self,
        index: u32,
        at: TcAttachType,
        handle: u32,
        program: &TcProgram,
    ) -> Result<()> {
        let fd = u32::try_from(program.fd.as_fd().as_raw_fd())?;
        let options = [
            TcFilterBpfOption::ProgFd(fd),
            TcFilterBpfOption::ProgName(program.name.to_owned()),
            TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
        ];
        let mut message = at_priority(index, at);
        message.header.handle = handle.into();
        message.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(options.map(TcOption::Bpf).into()),
        ];
        let put = self.send(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE).await;
        let hint = match &put {
            Err(Error::NetlinkError(e)) if -e.raw_code() == libc::EINVAL => {
                ": one that is not of BPF, or not for all protocols, is there; give it a later priority"
            }
            Err(Error::NetlinkError(e)) if -e.raw_code() == libc::ENOENT => {
                ": the kernel needs CONFIG_NET_CLS_BPF (module cls_bpf)"
            }
            _ => "",
        };
        put.with_context(|| format!("add a BPF filter of priority {PRIORITY}{hint}"))
    }

    async fn delete(&self, index: u32, at: TcAttachType, handle: u32) -> Result<()> {
        let mut message = at_priority(index, at);
        message.header.handle = handle.into();
        message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
        done(self.send(RouteNetlinkMessage::DelTrafficFilter(message), 0).await)
            .context("delete a filter of ours")
    }

    /// Asks for a list of qdiscs or filters.
    async fn get(&self, question: RouteNetlinkMessage) -> Result<Vec<TcMessage>> {
        let mut request = NetlinkMessage::from(question);
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self.handle.clone().request(request).context("ask netlink")?;
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewQueueDiscipline(message)
                    | RouteNetlinkMessage::NewTrafficFilter(message),
                ) => found.push(message),
                NetlinkPayload::Error(error) => {
                    return Err(Error::NetlinkError(error)).context("list qdiscs or filters");
                }
                _ => {}
            }
            ensure!(found.len() <= POD_FILTERS, "the pod has more than {POD_FILTERS} filters");
        }
        Ok(found)
    }

    async fn send(&self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(request)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return Err(Error::NetlinkError(error));
            }
        }
        Ok(())
    }
}

/// The qdisc of an interface that clsact is, or whatever else has its place.
fn qdisc(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.header.parent = TcHandle::CLSACT;
    message
}

/// The filters of one direction.
fn at_hook(index: u32, at: TcAttachType) -> TcMessage {
    let minor = match at {
        TcAttachType::Egress => TcHandle::MIN_EGRESS,
        _ => TcHandle::MIN_INGRESS,
    };
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle { minor, ..TcHandle::CLSACT };
    message
}

/// Those of our priority, for all protocols.
fn at_priority(index: u32, at: TcAttachType) -> TcMessage {
    let mut message = at_hook(index, at);
    message.header.info = TcHandle { major: PRIORITY, minor: ETH_P_ALL.to_be() }.into();
    message
}

/// What is there already, or gone already, is no error.
fn done(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::NetlinkError(e))
            if matches!(-e.raw_code(), libc::EEXIST | libc::ENOENT | libc::ENODEV) =>
        {
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(handle: u32, name: &str, program_id: u32) -> Filter {
        Filter { handle, name: name.to_owned(), program_id }
    }

    fn ours(n: usize, program_id: u32) -> Filter {
        filter(HANDLES[n], "redirect_out", program_id)
    }

    fn change(filters: &[Filter]) -> Change {
        Change::new(filters, 7)
    }

    #[test]
    fn a_filter_that_is_first_stays_and_gets_the_new_program_in_place() {
        let other = || filter(1, "cil_to_netdev", 3);
        assert_eq!(change(&[ours(1, 7), other()]), Change { put: None, delete: vec![] });
        let replaced = Change { put: Some(HANDLES[1]), delete: vec![] };
        assert_eq!(change(&[ours(1, 6), other()]), replaced);
        let left = Change { put: None, delete: vec![HANDLES[0]] };
        assert_eq!(change(&[ours(1, 7), other(), ours(0, 6)]), left);
    }

    #[test]
    fn a_filter_that_is_not_first_is_added_before_the_old_one_goes() {
        let other = || filter(1, "cil_to_netdev", 3);
        assert_eq!(change(&[]), Change { put: Some(HANDLES[0]), delete: vec![] });
        assert_eq!(change(&[other()]), Change { put: Some(HANDLES[0]), delete: vec![] });
        let moved = Change { put: Some(HANDLES[1]), delete: vec![HANDLES[0]] };
        assert_eq!(change(&[other(), ours(0, 7)]), moved);
        let both = change(&[other(), ours(1, 7), ours(0, 6)]);
        assert_eq!(both, Change { put: None, delete: vec![HANDLES[0]] });
    }

    #[test]
    fn a_filter_is_ours_by_its_handle_and_its_name() {
        assert!(ours(0, 1).is_ours());
        assert!(!filter(HANDLES[0], "other", 1).is_ours());
        assert!(!filter(1, "redirect_out", 1).is_ours());
    }
}
