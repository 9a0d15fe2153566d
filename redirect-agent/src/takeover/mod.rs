//! Taking over from istio-cni, pod by pod: removes its rules from pods in which ours are in place.
//!
//! It is a command, not something that the agent does by itself: a pod may have both sets of rules, and ours
//! take precedence.

mod nftables;
mod rules;

use anyhow::Result;
use redirect_ebpf::abi::{PORT_INBOUND, PORT_OUTBOUND};
use serde::Serialize;

use crate::{
    dataplane::istio_cni,
    netns::Netns,
    output::{Document, PodState, PodStatus},
};

/// What was done for a pod, or would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// istio-cni's rules are removed.
    TakenOver,
    /// They would be removed without `--dry-run`.
    WouldBeTakenOver,
    /// They were removed before, and connections that they had redirected are still open.
    Open,
    /// Nothing of istio-cni's, or of a takeover, is left.
    Done,
    /// Ours are not in place yet, so nothing was done.
    NotCaptured,
    /// istio-cni's rules are not in nf_tables, so nothing was done.
    NotNftables,
}

impl Answer {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Answer::TakenOver => "taken over",
            Answer::WouldBeTakenOver => "would be taken over",
            Answer::Open => "connections open",
            Answer::Done => "done",
            Answer::NotCaptured => "left alone",
            Answer::NotNftables => "left alone",
        }
    }

    /// What it means, and what to do.
    pub fn detail(self) -> &'static str {
        match self {
            Answer::TakenOver => "istio-cni's rules are removed; open connections go on",
            Answer::WouldBeTakenOver => "istio-cni's rules are in it",
            Answer::Open => {
                "a table (inet redirect-agent-nat) keeps connections going that istio-cni had \
                 redirected; run this again when they have ended"
            }
            Answer::Done => "nothing of istio-cni's is left",
            Answer::NotCaptured => {
                "the agent does not redirect it yet: run the agent with --beside-istio-cni, and see \
                 `redirect-agent status`"
            }
            Answer::NotNftables => {
                "istio-cni's routing rule is in it, and none of its rules in nf_tables; with \
                 iptables-legacy, start the pod anew"
            }
        }
    }

    /// Whether somebody has to do something.
    pub fn is_unfinished(self) -> bool {
        matches!(self, Answer::NotCaptured | Answer::NotNftables)
    }
}

/// What was done for a pod, as `takeover` says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// What was done.
    pub answer: Answer,
    /// What that means.
    pub detail: &'static str,
}

impl Row {
    /// The answer for a pod.
    pub fn new(pod: &PodStatus, answer: Answer) -> Self {
        let [namespace, name] = [&pod.namespace, &pod.name].map(String::clone);
        Self { namespace, name, answer, detail: answer.detail() }
    }
}

/// What `takeover` prints as JSON.
pub fn document(pods: &[Row]) -> Document<impl Serialize> {
    #[derive(Serialize)]
    struct Takeover<'a> {
        pods: &'a [Row],
    }
    Document::new("Takeover", Takeover { pods })
}

/// Removes istio-cni's rules from a pod, unless `dry_run` is set. `None` if the pod never had any. Repeating
/// it completes what was interrupted.
///
/// # Errors
///
/// When a system call fails.
pub fn take_over(pod: &PodStatus, netns: &Netns, dry_run: bool) -> Result<Option<Answer>> {
    netns.run(|| {
        let found = istio_cni::look()?;
        let ruleset = nftables::read()?;
        let (removal, kept) = (rules::removal(&ruleset), rules::has_keeper(&ruleset));
        if removal.is_empty() {
            return match (found.sign, kept) {
                (false, false) => Ok(None),
                (true, false) => Ok(Some(Answer::NotNftables)),
                (_, true) => clear_up(dry_run).map(Some),
            };
        }
        let stays_out = !pod.reason.enrolls() && !found.ours;
        let captured = found.ours && matches!(pod.state, PodState::Enrolled | PodState::Degraded);
        if !captured && !stays_out {
            return Ok(Some(Answer::NotCaptured));
        }
        if dry_run {
            return Ok(Some(Answer::WouldBeTakenOver));
        }
        removal.carry_out(kept)?;
        // Last, because an interrupted takeover is recognized by it.
        istio_cni::remove()?;
        Ok(Some(Answer::TakenOver))
    })?
}

/// Completes a takeover, and removes the table that keeps translated connections alive once there are none.
fn clear_up(dry_run: bool) -> Result<Answer> {
    if !dry_run {
        istio_cni::remove()?;
    }
    if istio_cni::connections_at(&[PORT_OUTBOUND, PORT_INBOUND])? > 0 {
        return Ok(Answer::Open);
    }
    if !dry_run {
        rules::remove_keeper()?;
    }
    Ok(Answer::Done)
}

/// Removes what a takeover has left in a pod that is being restored, and ends the connections that need it.
///
/// # Errors
///
/// When a system call fails.
pub fn forget(netns: &Netns) -> Result<()> {
    netns.run(|| {
        if rules::has_keeper(&nftables::read()?) { rules::remove_keeper() } else { Ok(()) }
    })?
}
