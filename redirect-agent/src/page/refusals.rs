//! Which counters of refusals have moved lately. A counter by itself does not tell last week's outage from
//! one that goes on.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, SystemTime},
};

use crate::{output::PodStatus, overrides::Moment, verdicts::is_refusal};

/// What counts as lately.
const LATELY: Duration = Duration::from_secs(5 * 60);
/// How far apart the remembered looks are. This bounds how many there are.
const APART: Duration = Duration::from_secs(60);

/// What the counters were when somebody looked.
#[derive(Debug, Default)]
pub(super) struct Refusals(VecDeque<Look>);

#[derive(Debug)]
struct Look {
    at: SystemTime,
    /// By the pod's uid and the counter's name.
    totals: BTreeMap<(String, String), u64>,
}

/// What was refused or dropped, of all pods.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// Since when growth is known; `None`: this is the first look.
    pub(super) since: Option<Moment>,
    /// Those that have moved most first, then those with the highest totals.
    pub(super) rows: Vec<Row>,
}

/// One counter of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// namespace/name
    pub(super) pod: String,
    pub(super) counter: String,
    /// By how much it has grown; `None`: this is the first look.
    pub(super) grown: Option<u64>,
    pub(super) total: u64,
}

impl Refusals {
    /// Compares the counters with the oldest look that is recent, and remembers them.
    pub(super) fn look(&mut self, pods: &[PodStatus], now: SystemTime) -> Refused {
        // One from the future was before the clock was set back.
        let is_recent = |look: &Look| now.duration_since(look.at).is_ok_and(|age| age <= LATELY);
        self.0.retain(is_recent);
        let before = self.0.front();
        let refusals = pods.iter().flat_map(|pod| {
            let counters = pod.counters.iter();
            counters
                .filter(|(name, total)| **total > 0 && is_refusal(name))
                .map(move |(name, total)| (pod, name, *total))
        });
        let (mut rows, mut totals) = (Vec::new(), BTreeMap::new());
        for (pod, name, total) in refusals {
            let key = (pod.uid.clone(), name.clone());
            let grown = before.map(|look| {
                // Less than before: they have begun anew.
                let was = look.totals.get(&key).copied().unwrap_or_default();
                total.checked_sub(was).unwrap_or(total)
            });
            let pod = format!("{}/{}", pod.namespace, pod.name);
            rows.push(Row { pod, counter: name.clone(), grown, total });
            totals.insert(key, total);
        }
        rows.sort_by(|a, b| {
            let order = |row: &Row| (row.grown, row.total);
            order(b).cmp(&order(a)).then_with(|| (&a.pod, &a.counter).cmp(&(&b.pod, &b.counter)))
        });
        let since = before.map(|look| Moment::of(look.at));
        let last = self.0.back().and_then(|look| now.duration_since(look.at).ok());
        if last.is_none_or(|age| age >= APART) {
            self.0.push_back(Look { at: now, totals });
        }
        Refused { since, rows }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests, *};
    use crate::output::PodState;

    fn pod(name: &str, counters: &[(&str, u64)]) -> PodStatus {
        PodStatus {
            counters: counters.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect(),
            ..tests::pod(name, PodState::Enrolled)
        }
    }

    #[test]
    fn growth_is_that_of_the_last_minutes_and_comes_first() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let seen = |refused: &Refused| -> Vec<(String, Option<u64>, u64)> {
            let row = |row: &Row| (format!("{} {}", row.pod, row.counter), row.grown, row.total);
            refused.rows.iter().map(row).collect()
        };
        let row = |name: &str, grown, total| (format!("shop/{name}"), grown, total);
        let mut refusals = Refusals::default();
        let old = pod("old", &[("refused_proxy_away", 900), ("hbone", 5), ("no_listener", 0)]);

        let first = refusals.look(&[old.clone(), pod("new", &[("no_listener", 1)])], at(1000));
        assert_eq!(first.since, None);
        assert_eq!(
            seen(&first),
            [row("old refused_proxy_away", None, 900), row("new no_listener", None, 1)]
        );

        let now = [old.clone(), pod("new", &[("no_listener", 4), ("dropped_unreadable", 2)])];
        let second = refusals.look(&now, at(1015));
        assert_eq!(second.since, Some(Moment::of(at(1000))));
        let expected = [
            row("new no_listener", Some(3), 4),
            row("new dropped_unreadable", Some(2), 2),
            row("old refused_proxy_away", Some(0), 900),
        ];
        assert_eq!(seen(&second), expected);

        // The pod's namespace is another: the counters begin anew.
        let anew = refusals.look(&[pod("new", &[("no_listener", 1)])], at(1030));
        assert_eq!(seen(&anew), [row("new no_listener", Some(0), 1)]);

        // Each minute one is remembered, and none for longer than five.
        for seconds in (1060..2000).step_by(15) {
            refusals.look(&now, at(seconds));
        }
        assert!(refusals.0.len() <= 6, "{}", refusals.0.len());
        let late = refusals.look(&now, at(2000));
        assert_eq!(seen(&late)[0], row("old refused_proxy_away", Some(0), 900));
        assert!(late.since.is_some_and(|since| since >= Moment::of(at(1700))));
        // The clock is set back.
        assert_eq!(refusals.look(&now, at(500)).since, None);
    }
}
