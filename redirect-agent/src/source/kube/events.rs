//! Events on pods, for `kubectl describe pod`: best effort, and limited in number.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client, Error,
    runtime::events::{self, EventType, Recorder, Reporter},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tracing::{debug, warn};

use super::{
    super::{Event, EventKind},
    NAME,
};
use crate::membership::Pod;

/// How many events may wait for the API server.
const QUEUE: usize = 256;
/// How many events of one pod are written at once, and how long until one more may be. client-go's are 25 and
/// 5 minutes: `tools/record/events_cache.go`.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_secs(60);
/// How long a pod without new events is remembered: until all of [`BURST`] is available again.
const REMEMBER: Duration = Duration::from_secs(20 * 60);
/// How long the API server may take for one event.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest note that the API server accepts, in bytes.
/// Source: Kubernetes `pkg/apis/core/validation/events.go`, `NoteLengthLimit`.
const LONGEST_NOTE: usize = 1024;
/// The longest reporting instance. Source: the same, `ReportingInstanceLengthLimit`.
const LONGEST_INSTANCE: usize = 128;

/// An event and its pod.
struct Entry {
    pod: ObjectReference,
    event: Event,
}

/// Accepts events, and never waits.
pub(super) struct Intake {
    queue: mpsc::Sender<Entry>,
    lost: Arc<AtomicU64>,
}

/// Writes accepted events to the API server.
pub(super) struct Scribe {
    client: Client,
    reporter: Reporter,
    queue: mpsc::Receiver<Entry>,
    lost: Arc<AtomicU64>,
    budgets: BTreeMap<String, Budget>,
    series: BTreeMap<(String, EventKind), Series>,
    complaint: Option<String>,
}

/// How many events of a pod may still be written.
struct Budget {
    left: u32,
    since: Instant,
}

/// Repeats of one message. kube's recorder merges events with the same reason, whatever their text, so each
/// message has a recorder of its own.
struct Series {
    message: String,
    recorder: Recorder,
    last: Instant,
}

/// The two ends for the agent of `node`.
pub(super) fn channel(client: Client, node: &str) -> (Intake, Scribe) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let lost = Arc::new(AtomicU64::new(0));
    let instance = truncate(&format!("{NAME}-{node}"), LONGEST_INSTANCE).to_owned();
    let scribe = Scribe {
        client,
        reporter: Reporter { controller: NAME.to_owned(), instance: Some(instance) },
        queue: receiver,
        lost: Arc::clone(&lost),
        budgets: BTreeMap::new(),
        series: BTreeMap::new(),
        complaint: None,
    };
    (Intake { queue: sender, lost }, scribe)
}

impl Intake {
    /// Accepts an event. If too many are waiting already, it is lost and counted.
    pub(super) fn take(&self, pod: &Pod, event: Event) {
        debug!(pod = %pod.key, event = event.kind.as_str(), "{}", event.message);
        let pod = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(pod.key.namespace.clone()),
            name: Some(pod.key.name.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        if self.queue.try_send(Entry { pod, event }).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Scribe {
    /// Writes until it is dropped.
    pub(super) async fn run(mut self) {
        while let Some(Entry { pod, event }) = self.queue.recv().await {
            let lost = self.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                warn!("{lost} Events on pods are lost: the API server takes them too slowly");
            }
            let now = Instant::now();
            let uid = pod.uid.clone().unwrap_or_default();
            if self.may_tell(&uid, now) {
                self.tell(uid, &pod, event, now).await;
            } else {
                debug!(pod = uid, "an Event is not told: there were {BURST} of this pod lately");
            }
        }
    }

    /// Takes one event from the pod's share. `false`: the share is used up.
    fn may_tell(&mut self, uid: &str, now: Instant) -> bool {
        self.budgets.retain(|_, budget| now.duration_since(budget.since) < REMEMBER);
        self.series.retain(|_, series| now.duration_since(series.last) < REMEMBER);
        let full = Budget { left: BURST, since: now };
        let budget = self.budgets.entry(uid.to_owned()).or_insert(full);
        while budget.left < BURST && now.duration_since(budget.since) >= REFILL {
            budget.left += 1;
            budget.since += REFILL;
        }
        if budget.left == BURST {
            budget.since = now;
        }
        let may = budget.left > 0;
        budget.left = budget.left.saturating_sub(1);
        may
    }

    async fn tell(&mut self, uid: String, pod: &ObjectReference, event: Event, now: Instant) {
        let Event { kind, message, .. } = event;
        let series = self.series.entry((uid, kind)).or_insert_with(|| Series {
            message: message.clone(),
            recorder: Recorder::new(self.client.clone(), self.reporter.clone()),
            last: now,
        });
        series.last = now;
        if series.message != message {
            series.recorder = Recorder::new(self.client.clone(), self.reporter.clone());
            series.message.clone_from(&message);
        }
        let event = events::Event {
            type_: if kind.is_warning() { EventType::Warning } else { EventType::Normal },
            reason: kind.as_str().to_owned(),
            note: Some(truncate(&message, LONGEST_NOTE).to_owned()),
            action: action(kind).to_owned(),
            secondary: None,
        };
        let complaint = match timeout(PATIENCE, series.recorder.publish(&event, pod)).await {
            Ok(Ok(())) => None,
            // Events of a deleted namespace's pods are gone with the namespace.
            Ok(Err(Error::Api(status))) if status.message.contains("is being terminated") => None,
            Ok(Err(error)) => Some(super::explain(&error)),
            Err(_) => Some(format!("the API server took more than {PATIENCE:?}")),
        };
        if let Some(complaint) = complaint.as_ref().filter(|c| self.complaint.as_ref() != Some(c)) {
            warn!("an Event on a pod is lost: {complaint}");
        }
        self.complaint = complaint;
    }
}

/// What the agent was doing when it happened.
fn action(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Enrolled | EventKind::EnrollmentFailed => "Enroll",
        EventKind::Unenrolled => "Unenroll",
        EventKind::Repaired => "Verify",
        EventKind::Overridden => "Override",
        EventKind::InvalidAnnotation | EventKind::UnknownWord => "Read",
    }
}

fn truncate(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}
