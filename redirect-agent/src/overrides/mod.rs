//! An operator's overrides of the labels on this node, and where they are stored.

pub(crate) mod store;

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

pub use self::store::{Store, file, remove_state};
use crate::membership::{Decision, NameError, PodKey, Reason, check_namespace_name};

/// Longer than anybody needs, and short enough that every year has four digits.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// The direction of an override.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Into the mesh.
    Enroll,
    /// Out of it.
    Unenroll,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Enroll => "enroll",
            Mode::Unenroll => "unenroll",
        })
    }
}

/// The target of an override: `NAMESPACE/POD`, or `NAMESPACE` for all its pods.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Target {
    /// Every pod of the namespace on this node.
    Namespace(String),
    /// The pod of that name, now and whenever it comes back.
    Pod(PodKey),
}

impl Target {
    /// The namespace of the target.
    pub fn namespace(&self) -> &str {
        match self {
            Target::Namespace(namespace) => namespace,
            Target::Pod(key) => &key.namespace,
        }
    }

    /// Whether it applies to this pod.
    pub fn is_of(&self, pod: &PodKey) -> bool {
        match self {
            Target::Namespace(namespace) => pod.namespace == *namespace,
            Target::Pod(key) => pod == key,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Namespace(namespace) => f.write_str(namespace),
            Target::Pod(key) => key.fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Target, NameError> {
        if s.contains('/') {
            return s.parse().map(Target::Pod);
        }
        check_namespace_name(s)?;
        Ok(Target::Namespace(s.to_owned()))
    }
}

crate::text::by_text!(Target);

/// A wall-clock time, in whole seconds; RFC 3339 in UTC as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Moment(SystemTime);

impl Moment {
    /// The time `after` from `now`; fractions of a second are dropped.
    ///
    /// # Errors
    ///
    /// When that is more than ten years away.
    pub fn after(now: SystemTime, after: Duration) -> anyhow::Result<Moment> {
        let until = now.checked_add(after).filter(|_| after <= LONGEST).with_context(|| {
            format!("wait {}: that is more than ten years", humantime::format_duration(after))
        })?;
        Ok(Moment::of(until))
    }

    /// The time of day if that is unambiguous from `now` on, otherwise the full date.
    pub fn clock(self, now: SystemTime) -> String {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        let whole = self.to_string();
        match whole.get(11..19) {
            Some(time) if self.from(now) < DAY && self.until(now) < DAY => format!("{time} UTC"),
            _ => whole,
        }
    }

    /// That time; fractions of a second are dropped.
    pub fn of(time: SystemTime) -> Moment {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        Moment(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    /// How long ago that was at `now`; zero if it is in the future.
    pub fn until(self, now: SystemTime) -> Duration {
        now.duration_since(self.0).unwrap_or_default()
    }

    /// How long it is from `now` until then; zero if it has passed.
    pub fn from(self, now: SystemTime) -> Duration {
        self.0.duration_since(now).unwrap_or_default()
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_seconds(self.0).fmt(f)
    }
}

impl TryFrom<String> for Moment {
    type Error = humantime::TimestampError;

    fn try_from(s: String) -> Result<Moment, humantime::TimestampError> {
        humantime::parse_rfc3339(&s).map(Moment::of)
    }
}

impl From<Moment> for String {
    fn from(moment: Moment) -> String {
        moment.to_string()
    }
}

/// One override.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Override {
    /// Which way.
    pub mode: Mode,
    /// When it ends by itself; `None`: not before `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Moment>,
    /// Why, as the operator said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The whole node bypasses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// When it ends by itself; `None`: not before `resume`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Moment>,
    /// Why, as the operator said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// All overrides, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    /// The overrides; some may have ended.
    #[serde(default)]
    targets: BTreeMap<Target, Override>,
    /// The pause; it may have ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pause: Option<Pause>,
}

/// What an operator requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// `enroll` and `unenroll`.
    Set {
        /// For whom.
        target: Target,
        /// What.
        value: Override,
    },
    /// `auto`: the labels decide again.
    Clear {
        /// For whom.
        target: Target,
    },
    /// `pause`.
    Pause(Pause),
    /// `resume`.
    Resume,
}

impl Change {
    /// The command that requests it.
    pub fn verb(&self) -> &'static str {
        match self {
            Change::Set { value: Override { mode: Mode::Enroll, .. }, .. } => "enroll",
            Change::Set { value: Override { mode: Mode::Unenroll, .. }, .. } => "unenroll",
            Change::Clear { .. } => "auto",
            Change::Pause(_) => "pause",
            Change::Resume => "resume",
        }
    }
}

fn in_force(until: Option<Moment>, now: SystemTime) -> bool {
    until.is_none_or(|until| !until.from(now).is_zero())
}

impl Overrides {
    /// The override that applies to `pod`: its own, otherwise its namespace's.
    pub fn find(&self, pod: &PodKey, now: SystemTime) -> Option<(Target, Override)> {
        [Target::Pod(pod.clone()), Target::Namespace(pod.namespace.clone())].into_iter().find_map(
            |target| {
                let found = self.targets.get(&target)?.clone();
                in_force(found.until, now).then_some((target, found))
            },
        )
    }

    /// Every override in force, by its target.
    pub fn all(&self, now: SystemTime) -> impl Iterator<Item = (&Target, &Override)> {
        self.targets.iter().filter(move |(_, found)| in_force(found.until, now))
    }

    /// The pause, when the node is paused.
    pub fn pause(&self, now: SystemTime) -> Option<&Pause> {
        self.pause.as_ref().filter(|pause| in_force(pause.until, now))
    }

    /// Applies the overrides to `decision` for `pod`.
    ///
    /// A hard reason ([`Reason::is_hard`]) stands: no override enrolls such a pod. While the node is paused,
    /// no pod is enrolled, and a pod that bypasses for another reason keeps that reason.
    pub fn apply(&self, decision: Decision, pod: &PodKey, now: SystemTime) -> Decision {
        if decision.reason.is_hard() {
            return decision;
        }
        let decision = match self.find(pod, now).map(|(_, found)| found.mode) {
            Some(Mode::Enroll) => Decision::enrolled(Reason::OverrideEnrolled),
            Some(Mode::Unenroll) => Decision::bypass(Reason::OverrideBypass),
            None => decision,
        };
        match self.pause(now) {
            Some(_) if decision.enrolled => Decision::bypass(Reason::Paused),
            _ => decision,
        }
    }

    /// When the next override or the pause expires, so that decisions have to be made again.
    pub fn next_end(&self, now: SystemTime) -> Option<Moment> {
        let ends = self.targets.values().map(|found| found.until);
        ends.chain([self.pause.as_ref().and_then(|pause| pause.until)])
            .flatten()
            .filter(|until| !until.from(now).is_zero())
            .min()
    }

    /// The overrides after `change`, without those that have expired by `now`.
    pub(crate) fn with(&self, change: Change, now: SystemTime) -> Overrides {
        let mut next = self.clone();
        next.targets.retain(|_, found| in_force(found.until, now));
        next.pause = self.pause(now).cloned();
        match change {
            Change::Set { target, mut value } => {
                if let Some(old) = next.targets.get(&target).filter(|old| old.mode == value.mode) {
                    value.reason = value.reason.or_else(|| old.reason.clone());
                }
                next.targets.insert(target, value);
            }
            Change::Clear { target } => drop(next.targets.remove(&target)),
            Change::Pause(mut pause) => {
                let old = next.pause.take().and_then(|old| old.reason);
                pause.reason = pause.reason.or(old);
                next.pause = Some(pause);
            }
            Change::Resume => next.pause = None,
        }
        next
    }

    /// What an operator should know if `change` does not do, or not yet do, what it seems to. `decided` are
    /// the pods of this node, with the decision by their labels.
    pub fn notes<'a>(
        &self,
        change: &Change,
        decided: impl IntoIterator<Item = (&'a PodKey, Decision)>,
        now: SystemTime,
    ) -> Vec<String> {
        let target = match change {
            Change::Set { target, .. } | Change::Clear { target } => target,
            Change::Pause(_) | Change::Resume => return Vec::new(),
        };
        let mut notes = Vec::new();
        let mut pods = decided.into_iter().filter(|(pod, _)| target.is_of(pod)).peekable();
        if pods.peek().is_none() {
            notes.push(match target {
                Target::Namespace(namespace) => {
                    format!("namespace {namespace} has no pod on this node")
                }
                Target::Pod(key) => format!("there is no pod {key} on this node"),
            });
        }
        for (pod, decision) in pods {
            let found = self.find(pod, now);
            let enrolls = found.as_ref().is_some_and(|(_, found)| found.mode == Mode::Enroll);
            if decision.reason.is_hard() && enrolls {
                notes.push(format!(
                    "{pod} stays out of the mesh: {}, and no override changes that",
                    decision.reason.explain()
                ));
            }
            if let Some((by, found)) = found.filter(|(by, _)| by != target) {
                notes.push(format!("{pod} has an override by {by}, which counts: {}", found.mode));
            }
        }
        if self.pause(now).is_some() && matches!(change, Change::Set { .. }) {
            notes.push("the node is paused: every pod bypasses until `resume`".to_owned());
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

    use super::{store::FILE, *};

    const MINUTE: Duration = Duration::from_secs(60);

    fn start() -> SystemTime {
        humantime::parse_rfc3339("2026-08-01T12:00:00Z").unwrap()
    }

    #[test]
    fn time_that_was_stored_with_a_fraction_is_in_whole_seconds() {
        let stored = Moment::try_from("2026-08-01T12:00:00.5Z".to_owned()).unwrap();
        assert_eq!(stored, Moment::of(start()));
    }

    fn set(target: &str, mode: Mode, minutes: Option<u32>) -> Change {
        let until = minutes.map(|m| Moment::after(start(), MINUTE * m).unwrap());
        Change::Set {
            target: target.parse().unwrap(),
            value: Override { mode, until, reason: None },
        }
    }

    fn clear(target: &str) -> Change {
        Change::Clear { target: target.parse().unwrap() }
    }

    fn overrides(changes: &[Change]) -> Overrides {
        changes.iter().fold(Overrides::default(), |o, change| o.with(change.clone(), start()))
    }

    fn key(pod: &str) -> PodKey {
        pod.parse().unwrap()
    }

    const AMBIENT: Decision = Decision { enrolled: true, reason: Reason::NamespaceLabelAmbient };
    const PLAIN: Decision = Decision { enrolled: false, reason: Reason::NotLabeled };

    #[test]
    fn a_pods_override_beats_its_namespaces_and_both_beat_the_labels() {
        let o =
            overrides(&[set("shop", Mode::Unenroll, None), set("shop/cart", Mode::Enroll, None)]);
        let enrolled = Decision::enrolled(Reason::OverrideEnrolled);
        let bypass = Decision::bypass(Reason::OverrideBypass);
        for labels in [AMBIENT, PLAIN] {
            assert_eq!(o.apply(labels, &key("shop/cart"), start()), enrolled);
            assert_eq!(o.apply(labels, &key("shop/web"), start()), bypass);
            assert_eq!(o.apply(labels, &key("bank/cart"), start()), labels);
        }
        let o = o.with(clear("shop/cart"), start());
        assert_eq!(o.apply(AMBIENT, &key("shop/cart"), start()), bypass);
        let o = o.with(clear("shop"), start());
        assert_eq!(o.apply(AMBIENT, &key("shop/cart"), start()), AMBIENT);
    }

    #[test]
    fn a_hard_reason_cannot_be_overridden() {
        let o = overrides(&[
            set("shop", Mode::Enroll, None),
            Change::Pause(Pause { until: None, reason: None }),
        ]);
        for reason in Reason::ALL.into_iter().filter(|reason| reason.is_hard()) {
            let decision = Decision::bypass(reason);
            assert_eq!(o.apply(decision, &key("shop/cart"), start()), decision);
        }
    }

    #[test]
    fn a_pause_takes_everybody_out_and_resume_brings_everybody_back() {
        let o = overrides(&[
            set("shop/cart", Mode::Enroll, None),
            set("shop/web", Mode::Unenroll, None),
            Change::Pause(Pause { until: None, reason: None }),
        ]);
        let paused = Decision::bypass(Reason::Paused);
        assert_eq!(o.apply(PLAIN, &key("shop/cart"), start()), paused);
        assert_eq!(o.apply(AMBIENT, &key("bank/app"), start()), paused);
        assert_eq!(o.apply(PLAIN, &key("bank/app"), start()), PLAIN);
        let web = Decision::bypass(Reason::OverrideBypass);
        assert_eq!(o.apply(AMBIENT, &key("shop/web"), start()), web);
        let o = o.with(Change::Resume, start());
        assert_eq!(o.apply(AMBIENT, &key("bank/app"), start()), AMBIENT);
    }

    #[test]
    fn what_has_an_end_ends_by_itself() {
        let until = Some(Moment::after(start(), 5 * MINUTE).unwrap());
        let o = overrides(&[
            set("shop", Mode::Unenroll, None),
            set("shop/cart", Mode::Enroll, Some(10)),
            Change::Pause(Pause { until, reason: None }),
        ]);
        let cart = key("shop/cart");
        let at = |minutes: u32| start() + MINUTE * minutes;
        assert_eq!(o.next_end(at(0)), until);
        assert_eq!(o.apply(PLAIN, &cart, at(4)).reason, Reason::Paused);
        assert_eq!(o.apply(PLAIN, &cart, at(5)).reason, Reason::OverrideEnrolled);
        assert_eq!(o.next_end(at(5)).unwrap().from(at(5)), 5 * MINUTE);
        assert_eq!(o.apply(PLAIN, &cart, at(9)).reason, Reason::OverrideEnrolled);
        assert_eq!(o.apply(PLAIN, &cart, at(10)).reason, Reason::OverrideBypass);
        assert_eq!(o.next_end(at(10)), None);
        assert!(Moment::after(start(), Duration::MAX).is_err());
        assert!(Moment::after(start(), LONGEST + MINUTE).is_err());
    }

    #[test]
    fn the_operator_hears_what_an_override_does_not_do() {
        let (cart, web) = (key("shop/cart"), key("shop/web"));
        let decided = || {
            [
                (&cart, Decision::bypass(Reason::HostNetwork)),
                (&web, Decision::bypass(Reason::NotLabeled)),
            ]
        };
        let notes = |changes: &[Change]| {
            overrides(changes).notes(changes.last().unwrap(), decided(), start())
        };
        assert_eq!(
            notes(&[set("shop", Mode::Enroll, None)]),
            [
                "shop/cart stays out of the mesh: it uses the node's network (spec.hostNetwork), and \
              no override changes that"
            ]
        );
        assert_eq!(notes(&[set("shop/web", Mode::Enroll, None)]), [""; 0]);
        assert_eq!(
            notes(&[set("shop/gone", Mode::Enroll, None)]),
            ["there is no pod shop/gone on this node"]
        );
        assert_eq!(
            notes(&[set("nosuchns", Mode::Enroll, None)]),
            ["namespace nosuchns has no pod on this node"]
        );
        assert_eq!(
            notes(&[set("shop/web", Mode::Unenroll, None), set("shop", Mode::Unenroll, None)]),
            ["shop/web has an override by shop/web, which counts: unenroll"]
        );
        assert_eq!(
            notes(&[
                Change::Pause(Pause { until: None, reason: None }),
                set("shop/web", Mode::Enroll, None)
            ]),
            ["the node is paused: every pod bypasses until `resume`"]
        );
    }

    #[test]
    fn overrides_are_kept_over_a_restart_and_doing_it_twice_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let store = Store::open(&state).unwrap();
        let mut seen = store.subscribe();
        let changes = [
            set("shop/cart", Mode::Enroll, Some(10)),
            set("bank", Mode::Unenroll, None),
            Change::Pause(Pause { until: None, reason: None }),
        ];
        for change in changes {
            assert!(store.change(change.clone(), start()).unwrap());
            assert!(seen.has_changed().unwrap());
            seen.mark_unchanged();
            assert!(!store.change(change, start()).unwrap());
            assert!(!seen.has_changed().unwrap());
        }
        let expected = store.current();
        assert_eq!(*Store::open(&state).unwrap().current(), *expected);
        let file = state.join(FILE);
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            r#"{
  "version": 1,
  "targets": {
    "bank": {
      "mode": "unenroll"
    },
    "shop/cart": {
      "mode": "enroll",
      "until": "2026-08-01T12:10:00Z"
    }
  },
  "pause": {}
}
"#
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&file)), (0o700, 0o600));

        // What has ended goes from the file with the next change.
        store.change(Change::Resume, start() + 11 * MINUTE).unwrap();
        assert!(!fs::read_to_string(&file).unwrap().contains("shop/cart"));
    }

    #[test]
    fn a_state_file_that_cannot_be_understood_is_moved_aside() {
        for content in [
            "",
            "{\"version\":1,\"targets\":{\"shop/ca",
            "[]",
            "{\"version\":2}",
            "{\"version\":1,\"targets\":{\"../x\":{\"mode\":\"enroll\"}}}",
            "{\"version\":1,\"pause\":{\"until\":\"tomorrow\"}}",
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(FILE), content).unwrap();
            let store = Store::open(dir.path()).unwrap();
            assert_eq!(*store.current(), Overrides::default(), "{content}");
            let aside = dir.path().join("overrides.json.unreadable");
            assert_eq!(fs::read_to_string(aside).unwrap(), content);
            assert!(
                store.change(Change::Pause(Pause { until: None, reason: None }), start()).unwrap()
            );
        }
    }

    #[test]
    fn removing_the_state_leaves_what_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let pause = Change::Pause(Pause { until: None, reason: None });
        Store::open(&state).unwrap().change(pause.clone(), start()).unwrap();
        remove_state(&state).unwrap();
        assert!(!state.exists());
        remove_state(&state).unwrap();

        Store::open(&state).unwrap().change(pause, start()).unwrap();
        fs::write(state.join("precious"), "").unwrap();
        remove_state(&state).unwrap();
        let left: Vec<_> = fs::read_dir(&state).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["precious"]);
    }

    #[test]
    fn a_change_that_cannot_be_kept_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("overrides.json.new")).unwrap();
        assert!(store.change(Change::Pause(Pause { until: None, reason: None }), start()).is_err());
        assert_eq!(*store.current(), Overrides::default());
    }
}
