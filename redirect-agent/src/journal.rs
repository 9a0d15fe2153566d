//! What happened recently to the pods of this node, for `explain`. It is the same as the Events on the pods,
//! but those exist only in a cluster, and others may have deleted them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    dataplane::PartKind,
    membership::PodKey,
    overrides::Moment,
    source::{Event, EventKind},
};

/// How many entries are kept, for all pods together.
const ENTRIES: usize = 1024;

/// What happened recently, oldest first.
#[derive(Debug, Default)]
pub struct Journal(Mutex<VecDeque<(PodKey, Entry)>>);

/// Something that happened to a pod, once or several times in a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When first.
    pub first: Moment,
    /// When last.
    pub last: Moment,
    /// How often.
    pub count: u32,
    /// What: the reason of the Event.
    #[serde(rename = "event")]
    pub kind: EventKind,
    /// The particulars.
    pub message: String,
    /// What was put back, if anything.
    #[serde(skip)]
    pub repaired: Vec<PartKind>,
}

/// An entry, and the pod that it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The pod.
    pub pod: PodKey,
    /// What happened to it.
    #[serde(flatten)]
    pub entry: Entry,
}

impl Journal {
    /// Records what just happened to a pod.
    pub fn note(&self, pod: &PodKey, event: &Event) {
        let now = Moment::of(SystemTime::now());
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let former = entries.iter_mut().rev().find(|(key, _)| key == pod);
        if let Some((_, former)) = former
            && former.kind == event.kind
            && former.message == event.message
        {
            former.last = now;
            former.count = former.count.saturating_add(1);
            return;
        }
        if entries.len() == ENTRIES {
            drop_one(&mut entries);
        }
        let Event { kind, message, repaired } = event.clone();
        let entry = Entry { first: now, last: now, count: 1, kind, message, repaired };
        entries.push_back((pod.clone(), entry));
    }

    /// What happened, oldest first.
    pub fn all(&self) -> Vec<Note> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let note = |(pod, entry): &(PodKey, Entry)| Note { pod: pod.clone(), entry: entry.clone() };
        entries.iter().map(note).collect()
    }

    /// What happened to a pod, oldest first.
    pub fn of(&self, pod: &PodKey) -> Vec<Entry> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().filter(|(key, _)| key == pod).map(|(_, entry)| entry.clone()).collect()
    }
}

/// Drops the oldest entry of the pod that has the most, in the namespace that has the most. Who changes an annotation
/// again and again, or removes what the agent puts back, makes others forget nothing.
fn drop_one(entries: &mut VecDeque<(PodKey, Entry)>) {
    let (mut namespaces, mut pods) = (BTreeMap::new(), BTreeMap::new());
    for (pod, _) in entries.iter() {
        *namespaces.entry(&pod.namespace).or_insert(0_usize) += 1;
        *pods.entry(pod).or_insert(0_usize) += 1;
    }
    let most = |pod: &PodKey| (namespaces.get(&pod.namespace), pods.get(pod));
    let most = (0..entries.len()).rev().max_by_key(|n| entries.get(*n).map(|(pod, _)| most(pod)));
    if let Some(oldest) = most {
        entries.remove(oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_counted_and_who_has_most_loses_the_oldest() {
        let journal = Journal::default();
        let [cart, web, queue] =
            ["shop/cart", "shop/web", "bank/queue"].map(|pod| pod.parse::<PodKey>().unwrap());
        let repaired = Event {
            repaired: vec![PartKind::Rule],
            ..Event::new(EventKind::Repaired, "rule ipv4")
        };
        journal.note(&cart, &Event::new(EventKind::Enrolled, "in the mesh"));
        journal.note(&cart, &repaired);
        journal.note(&web, &repaired);
        journal.note(&cart, &repaired);
        let of = |key| -> Vec<(EventKind, u32)> {
            journal.of(key).iter().map(|entry| (entry.kind, entry.count)).collect()
        };
        assert_eq!(of(&cart), [(EventKind::Enrolled, 1), (EventKind::Repaired, 2)]);
        assert_eq!(journal.of(&web)[0].repaired, [PartKind::Rule]);
        for n in 0..ENTRIES {
            journal.note(&cart, &Event::new(EventKind::Enrolled, n.to_string()));
        }
        let last = |pod| journal.of(pod).last().map(|entry| entry.message.clone());
        assert_eq!((journal.of(&web).len(), journal.of(&cart).len()), (1, ENTRIES - 1));
        assert_eq!(last(&cart), Some((ENTRIES - 1).to_string()));
        // So does a namespace with many pods.
        journal.note(&queue, &repaired);
        for n in 0..ENTRIES {
            let pod = PodKey::new("shop", format!("pod-{n}")).unwrap();
            journal.note(&pod, &Event::new(EventKind::Enrolled, "in the mesh"));
        }
        assert_eq!((journal.of(&queue).len(), journal.all().len()), (1, ENTRIES));
    }
}
