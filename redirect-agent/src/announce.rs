//! Says what a change of the overrides does to the pods of this node, for the operator who made it.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use crate::{
    membership::{Decision, PodKey},
    overrides::{Change, Mode, Moment, Overrides, Target},
};

/// A change, and the state before it.
#[derive(Debug)]
pub struct Effect<'a> {
    /// What was asked for.
    pub change: &'a Change,
    /// The overrides before.
    pub before: &'a Overrides,
    /// The overrides now.
    pub after: &'a Overrides,
    /// The pods of this node, with the decision by their labels.
    pub decided: Vec<(PodKey, Decision)>,
    /// How long connections of a leaving pod may continue.
    pub drain: Duration,
    /// Now.
    pub now: SystemTime,
}

impl Effect<'_> {
    /// The pods that the change is about, and whether each should be in the mesh now.
    pub fn wanted(&self) -> BTreeMap<PodKey, bool> {
        self.pods().map(|(key, _, after)| (key.clone(), after)).collect()
    }

    /// The pods that leave, and those that enter.
    pub fn moving(&self) -> (Vec<PodKey>, Vec<PodKey>) {
        let moving = |to: bool| {
            let pods =
                self.pods().filter(move |(_, before, after)| before != after && *after == to);
            pods.map(|(key, ..)| key.clone()).collect()
        };
        (moving(false), moving(true))
    }

    /// Each pod, with whether it should have been, and should be, in the mesh.
    fn pods(&self) -> impl Iterator<Item = (&PodKey, bool, bool)> {
        let is_meant = |key: &PodKey| self.target().is_none_or(|target| target.is_of(key));
        self.decided.iter().filter(move |(key, _)| is_meant(key)).map(|(key, decision)| {
            let under = |overrides: &Overrides| overrides.apply(*decision, key, self.now).enrolled;
            (key, under(self.before), under(self.after))
        })
    }

    fn target(&self) -> Option<&Target> {
        match self.change {
            Change::Set { target, .. } | Change::Clear { target } => Some(target),
            Change::Pause(_) | Change::Resume => None,
        }
    }

    /// What is true now.
    pub fn message(&self) -> String {
        let changed = self.before != self.after;
        match self.change {
            Change::Set { target, value } => {
                let until = self.until(value.until);
                match (value.mode, changed) {
                    (mode, false) => format!(
                        "{target} has this override already{until}{}",
                        self.without_effect(mode)
                    ),
                    (mode, true) => self.set(target, mode, &until),
                }
            }
            Change::Clear { target } if !changed => format!("{target} has no override"),
            Change::Clear { target } => {
                let moves = self.moves("it ", "");
                let moves = if moves.is_empty() { moves } else { format!("; {moves}") };
                format!("the labels decide again for {target}{moves}")
            }
            Change::Pause(_) if !changed => "the node is paused already".to_owned(),
            Change::Pause(pause) => match (self.before.pause(self.now), pause.until) {
                (Some(_), None) => "the pause no longer ends by itself".to_owned(),
                (Some(_), Some(_)) => format!("the pause now holds{}", self.until(pause.until)),
                (None, until) => {
                    let until = self.until(until);
                    match self.moving().0.len() {
                        0 => {
                            format!("no pod of this node is in the mesh, and none enters it{until}")
                        }
                        n => format!("{} leaving the mesh{until}{}", are(n), self.drain()),
                    }
                }
            },
            Change::Resume if !changed => "the node was not paused".to_owned(),
            Change::Resume => match self.moving().1.len() {
                0 => "the labels and overrides decide again".to_owned(),
                n => format!("{} entering the mesh", are(n)),
            },
        }
    }

    fn set(&self, target: &Target, mode: Mode, until: &str) -> String {
        let moves = self.moves(&format!("{target} "), until);
        if !moves.is_empty() {
            return moves;
        }
        let stays = self.pods().any(|(_, _, after)| after == (mode == Mode::Enroll));
        match (mode, stays) {
            (Mode::Enroll, true) => format!("{target} stays in the mesh{until}"),
            (Mode::Unenroll, true) => format!("{target} stays out of the mesh{until}"),
            (Mode::Enroll, false) => format!("{target} is to be in the mesh{until}"),
            (Mode::Unenroll, false) => format!("{target} is to be out of the mesh{until}"),
        }
    }

    /// What an override that is in force cannot bring about. The notes say why.
    fn without_effect(&self, mode: Mode) -> &'static str {
        let mut pods = self.pods().peekable();
        match mode {
            _ if pods.peek().is_none() => "; no pod of this node matches",
            Mode::Enroll if pods.all(|(.., after)| !after) => "; it stays out of the mesh",
            _ => "",
        }
    }

    /// Which pods leave or enter; one that was named is called `it`.
    fn moves(&self, it: &str, until: &str) -> String {
        let (leaving, entering) = self.moving();
        let (leaves, count, drain) = match (leaving.len(), entering.len()) {
            (0, 0) => return String::new(),
            (0, n) => (false, n, String::new()),
            (n, _) => (true, n, self.drain()),
        };
        let verb = if leaves { "leave" } else { "enter" };
        match self.target() {
            Some(Target::Namespace(namespace)) => {
                let s = if count == 1 { ("", "s") } else { ("s", "") };
                format!("{count} pod{} of {namespace} {verb}{} the mesh{until}{drain}", s.0, s.1)
            }
            _ => format!("{it}{verb}s the mesh{until}{drain}"),
        }
    }

    fn drain(&self) -> String {
        format!("; open connections have {}", humantime::format_duration(self.drain))
    }

    fn until(&self, until: Option<Moment>) -> String {
        until.map_or_else(String::new, |until| format!(" until {}", until.clock(self.now)))
    }
}

fn are(pods: usize) -> String {
    if pods == 1 { "1 pod is".to_owned() } else { format!("{pods} pods are") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        membership::Reason,
        overrides::{Override, Pause, Store},
    };

    fn now() -> SystemTime {
        humantime::parse_rfc3339("2026-08-01T19:00:00Z").unwrap()
    }

    /// What is said to each of these changes in turn.
    fn said(changes: &[Change]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (ambient, plain, host) = (
            Decision::enrolled(Reason::PodLabelAmbient),
            Decision::bypass(Reason::NotLabeled),
            Decision::bypass(Reason::HostNetwork),
        );
        let pods = [("shop/a", ambient), ("shop/b", ambient), ("bank/c", plain), ("bank/d", host)];
        let say = |change: &Change| {
            let before = store.current();
            store.change(change.clone(), now()).unwrap();
            let decided = pods.map(|(key, decision)| (key.parse().unwrap(), decision)).to_vec();
            let (after, drain) = (store.current(), Duration::from_secs(5));
            let effect =
                Effect { change, before: &before, after: &after, decided, drain, now: now() };
            effect.message()
        };
        changes.iter().map(say).collect()
    }

    fn set(target: &str, mode: Mode, seconds: Option<u64>) -> Change {
        let until = seconds.map(|s| Moment::after(now(), Duration::from_secs(s)).unwrap());
        Change::Set {
            target: target.parse().unwrap(),
            value: Override { mode, until, reason: None },
        }
    }

    fn clear(target: &str) -> Change {
        Change::Clear { target: target.parse().unwrap() }
    }

    fn pause(seconds: Option<u64>) -> Change {
        let until = seconds.map(|s| Moment::after(now(), Duration::from_secs(s)).unwrap());
        Change::Pause(Pause { until, reason: None })
    }

    #[test]
    fn whoever_takes_pods_out_hears_what_becomes_of_them() {
        let out = Mode::Unenroll;
        assert_eq!(
            said(&[
                set("shop/a", out, Some(200)),
                set("shop/a", out, Some(200)),
                set("shop/a", out, None),
                set("shop", out, None),
                set("bank/c", out, None),
                set("bank/x", out, Some(100_000)),
                clear("shop/a"),
                clear("shop"),
                clear("shop"),
            ]),
            [
                "shop/a leaves the mesh until 19:03:20 UTC; open connections have 5s",
                "shop/a has this override already until 19:03:20 UTC",
                "shop/a stays out of the mesh",
                "1 pod of shop leaves the mesh; open connections have 5s",
                "bank/c stays out of the mesh",
                "bank/x is to be out of the mesh until 2026-08-02T22:46:40Z",
                "the labels decide again for shop/a",
                "the labels decide again for shop; 2 pods of shop enter the mesh",
                "shop has no override",
            ]
        );
    }

    #[test]
    fn whoever_brings_pods_in_hears_which_ones() {
        assert_eq!(
            said(&[
                set("bank", Mode::Enroll, None),
                set("bank/c", Mode::Enroll, None),
                set("bank/d", Mode::Enroll, None),
                clear("bank"),
                clear("bank/c"),
            ]),
            [
                "1 pod of bank enters the mesh",
                "bank/c stays in the mesh",
                "bank/d is to be in the mesh",
                "the labels decide again for bank",
                "the labels decide again for bank/c; it leaves the mesh; open connections have 5s",
            ]
        );
    }

    #[test]
    fn whoever_pauses_hears_how_many_pods_leave_and_when_it_ends() {
        assert_eq!(
            said(&[
                pause(Some(5)),
                pause(Some(60)),
                pause(None),
                pause(None),
                Change::Resume,
                Change::Resume,
                set("shop/a", Mode::Unenroll, None),
                pause(None),
            ]),
            [
                "2 pods are leaving the mesh until 19:00:05 UTC; open connections have 5s",
                "the pause now holds until 19:01:00 UTC",
                "the pause no longer ends by itself",
                "the node is paused already",
                "2 pods are entering the mesh",
                "the node was not paused",
                "shop/a leaves the mesh; open connections have 5s",
                "1 pod is leaving the mesh; open connections have 5s",
            ]
        );
        let out = [set("shop", Mode::Unenroll, None), pause(None), Change::Resume];
        assert_eq!(
            said(&out)[1..],
            [
                "no pod of this node is in the mesh, and none enters it",
                "the labels and overrides decide again"
            ]
        );
    }
}
