//! What `bpftool map dump` prints in place of numbers. The maps declare these types, so the kernel gets their
//! names with the maps (BTF). They have the layout of the types of the same name in [`crate::abi`], which both
//! sides compute with: a value that a later agent adds is no valid enum here.

use crate::abi::{self, Addr, Counter, PodId};

/// [`abi::PodEntry::decision`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// [`abi::DECISION_BYPASS`].
    Bypass = abi::DECISION_BYPASS,
    /// [`abi::DECISION_ENROLLED`].
    Enrolled = abi::DECISION_ENROLLED,
}

macro_rules! reasons {
    ($($reason:ident = $code:literal,)*) => {
        /// [`abi::PodEntry::reason`]: the agent's `membership::Reason`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "membership::Reason has them")]
        pub enum Reason {
            $($reason = $code,)*
        }

        impl Reason {
            /// Every reason, by number.
            pub const ALL: &[Reason] = &[$(Reason::$reason,)*];
        }
    };
}

reasons! {
    NamespaceExcluded = 1,
    HostNetwork = 2,
    PodFinished = 3,
    Sidecar = 4,
    PodLabelNone = 5,
    PodLabelAmbient = 6,
    NamespaceLabelAmbient = 7,
    NotLabeled = 8,
    OverrideEnrolled = 9,
    OverrideBypass = 10,
    Paused = 11,
    Selected = 12,
    NotSelected = 13,
}

/// [`abi::PodEntry`].
#[repr(C)]
#[allow(missing_docs, reason = "abi::PodEntry has them")]
pub struct PodEntry {
    pub decision: Decision,
    pub reason: Reason,
    pub flags: u32,
    pub uplink: u32,
    pub captured_at_ns: u64,
    pub v4: Addr,
    pub v6: Addr,
}

/// [`abi::CounterKey`].
#[repr(C)]
#[allow(missing_docs, reason = "abi::CounterKey has them")]
pub struct CounterKey {
    pub pod_id: PodId,
    pub counter: Counter,
}

const _: () = {
    assert!(size_of::<PodEntry>() == size_of::<abi::PodEntry>());
    assert!(size_of::<CounterKey>() == size_of::<abi::CounterKey>());
};
