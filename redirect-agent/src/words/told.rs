//! Reports each unknown word once, and keeps all of them for `status`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Reading, Slip, UnknownWord};
use crate::{
    membership::{Pod, PodKey},
    output::PodStatus,
    reconcile::Observer,
    source::{Event, EventKind, Inventory, Source},
};

/// The unknown words of each pod.
#[derive(Debug, Default)]
pub struct Told(Mutex<BTreeMap<PodKey, Vec<UnknownWord>>>);

impl Told {
    /// Adds them to what `status` says about pods.
    pub fn note(&self, pods: &mut [PodStatus]) {
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for pod in pods {
            let key = PodKey { namespace: pod.namespace.clone(), name: pod.name.clone() };
            // The sidecar's annotations do not matter if the pod should not be in the mesh.
            let counts = |word: &&UnknownWord| word.what != Slip::Sidecar || pod.reason.enrolls();
            let notes = words.get(&key).into_iter().flatten().filter(counts).map(|w| w.to_string());
            let notes: Vec<String> = pod.message.take().into_iter().chain(notes).collect();
            pod.message = (!notes.is_empty()).then(|| notes.join("; "));
        }
    }

    /// Applies what the source knows. Returns what is new, with its pod.
    fn take(&self, reading: Reading, inventory: &Inventory) -> Vec<(Pod, UnknownWord)> {
        let mut words = BTreeMap::new();
        let mut new = Vec::new();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, pod) in &inventory.pods {
            let found = reading.unknown(inventory.namespaces.get(&key.namespace), pod);
            let before = known.get(key);
            let is_new = |word: &&UnknownWord| !before.is_some_and(|words| words.contains(word));
            new.extend(found.iter().filter(is_new).map(|word| (pod.clone(), word.clone())));
            if !found.is_empty() {
                words.insert(key.clone(), found);
            }
        }
        *known = words;
        new
    }

    /// Follows the source until `shutdown`. Each word is logged once, and each pod gets an Event.
    pub async fn follow<S: Source>(
        &self,
        reading: Reading,
        observer: Arc<Observer<S>>,
        shutdown: CancellationToken,
    ) {
        let mut inventories = observer.inventories();
        loop {
            let inventory = Arc::clone(&inventories.borrow_and_update());
            let mut logged = BTreeSet::new();
            for (pod, word) in self.take(reading, &inventory) {
                if logged.insert((word.object.clone(), word.key.clone())) {
                    warn!("{word}");
                }
                if word.what != Slip::Sidecar {
                    observer.record(&pod, Event::new(EventKind::UnknownWord, word.to_string()));
                }
            }
            match shutdown.run_until_cancelled(inventories.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::membership::{LABEL_DATAPLANE_MODE, Namespace, Phase};

    #[test]
    fn each_word_is_told_once_and_again_when_it_comes_back() {
        let labels =
            |mode: &str| BTreeMap::from([(LABEL_DATAPLANE_MODE.to_owned(), mode.to_owned())]);
        let pod = |name: &str, mode: &str| Pod {
            key: PodKey::new("shop", name).unwrap(),
            uid: name.to_owned(),
            service_account: "default".to_owned(),
            node_name: None,
            labels: labels(mode),
            annotations: BTreeMap::new(),
            host_network: false,
            host_users: true,
            phase: Phase::Running,
            ips: Vec::new(),
            deleting: false,
        };
        let inventory = |pods: &[Pod], mode: &str| Inventory {
            namespaces: BTreeMap::from([(
                "shop".to_owned(),
                Namespace { name: "shop".to_owned(), labels: labels(mode) },
            )]),
            pods: pods.iter().map(|pod| (pod.key.clone(), pod.clone())).collect(),
            problems: Vec::new(),
        };
        let reading = Reading { by_label: true, sidecar_annotations: false };
        let told = Told::default();
        let new = |inventory: &Inventory| -> Vec<String> {
            let new = told.take(reading, inventory);
            new.iter().map(|(pod, word)| format!("{} {}", pod.key.name, word.value)).collect()
        };
        let bad = [pod("cart", "ambeint"), pod("web", "ambient")];
        assert_eq!(new(&inventory(&bad, "ambient")), ["cart ambeint"]);
        assert_eq!(new(&inventory(&bad, "ambient")), [""; 0]);
        assert_eq!(new(&inventory(&bad, "on")), ["cart on", "web on"]);
        let good = [pod("cart", "ambient"), pod("web", "ambient")];
        assert_eq!(new(&inventory(&good, "ambient")), [""; 0]);
        assert_eq!(new(&inventory(&bad, "ambient")), ["cart ambeint"]);
    }
}
