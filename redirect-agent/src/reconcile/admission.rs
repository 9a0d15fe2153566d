//! A pod's start: CNI's ADD is answered when the pod is in its desired state.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep_until},
};
use tracing::debug;

use super::{
    Judge, Views,
    plan::{Wish, steps},
};
use crate::{
    cni::{
        records::{Held, Records, Sandbox},
        request::AddRequest,
        server::{Agent, Refusal},
    },
    membership::{Pod, PodKey, can_be_a_pods},
    output::PodState,
    source::Inventory,
};

/// How many of the source's problems are reported; those of the API server come first.
const PROBLEMS: usize = 3;

/// Waits until pods are in their desired state, and takes no step of its own: it records what CNI reported,
/// and reads what the pods' tasks show.
pub struct Admission {
    judge: Judge,
    inventory: watch::Receiver<Arc<Inventory>>,
    records: Arc<Records>,
    views: Arc<Views>,
    timeout: Duration,
}

/// One waiting ADD.
struct Add {
    key: PodKey,
    request: AddRequest,
    /// The pod that it is for, once the source knows it.
    pod: Option<Told>,
}

/// What was recorded about the ADD's pod.
struct Told {
    uid: String,
    /// The sandbox, with the inode number of its network namespace; `None` if nothing had to be recorded.
    sandbox: Option<(Sandbox, u32)>,
    /// Nothing runs in the sandbox before the ADD is answered.
    _held: Option<Held>,
}

impl Admission {
    pub(super) fn new(
        judge: Judge,
        inventory: watch::Receiver<Arc<Inventory>>,
        records: Arc<Records>,
        views: Arc<Views>,
        timeout: Duration,
    ) -> Self {
        Self { judge, inventory, records, views, timeout }
    }

    /// `None`: the pod may start. Otherwise, why it may not start yet. An error is final.
    async fn look(&self, add: &mut Add) -> Result<Option<Refusal>, Refusal> {
        let inventory = Arc::clone(&self.inventory.borrow());
        let Some(pod) = pod_of(&inventory, add) else {
            return match add.pod {
                Some(_) => Err(Refusal::Deleted(add.key.clone())),
                None => Ok(Some(unknown(&inventory, add))),
            };
        };
        let enrolled = self.judge.decide(&inventory, pod).enrolled;
        if enrolled && pod.deleting {
            return Err(Refusal::Deleted(add.key.clone()));
        }
        let told = match add.pod.take() {
            // If nothing had to be recorded, the wish may have changed since.
            Some(told)
                if told.uid == pod.kubelet_uid() && (told.sandbox.is_some() || !enrolled) =>
            {
                told
            }
            _ => self.tell(add, pod, enrolled).await?,
        };
        let told = add.pod.insert(told);
        let recorded = self.records.of(pod.kubelet_uid());
        if let Some((sandbox, _)) = &told.sandbox
            && recorded.as_deref() != Some(sandbox)
        {
            return Err(Refusal::Superseded(add.key.clone()));
        }

        let views = self.views.lock();
        let view = views.get(&add.key).filter(|view| view.pod.kubelet_uid() == pod.kubelet_uid());
        let inode = view.and_then(|view| view.netns.as_ref()).map(|netns| netns.netns.inode());
        let is_there = match view {
            None => !enrolled,
            Some(view) if view.decision.enrolled != enrolled => false,
            Some(view) if enrolled => {
                inode == told.sandbox.as_ref().map(|(_, inode)| *inode)
                    && steps(Wish::Enrolled, &view.standing).is_empty()
            }
            Some(view) => view.state() == PodState::Bypassing,
        };
        if is_there {
            return Ok(None);
        }
        let awaited =
            if enrolled { "it is not in the mesh yet" } else { "it has not left the mesh yet" };
        let why = match view.and_then(|view| view.problem.as_ref()) {
            Some(problem) => format!("{awaited}: {problem}"),
            None => awaited.to_owned(),
        };
        Ok(Some(Refusal::Late { pod: add.key.clone(), why }))
    }

    /// Records what CNI reported. For a pod that bypasses, this is only needed if it enters the mesh later.
    async fn tell(&self, add: &Add, pod: &Pod, enrolled: bool) -> Result<Told, Refusal> {
        let uid = pod.kubelet_uid().to_owned();
        let mut sandbox = add.sandbox(&uid);
        let records = Arc::clone(&self.records);
        let told = spawn_blocking(move || {
            let found = sandbox.open(|_| false)?;
            let inode = found.netns.inode();
            if sandbox.addresses.is_empty() {
                // Not every network plugin reports addresses.
                sandbox.addresses = found.addresses;
            }
            let held = records.put(sandbox.clone())?;
            anyhow::Ok((sandbox, inode, held))
        });
        let told = told.await.map_err(anyhow::Error::from).flatten();
        match told {
            Ok((sandbox, inode, held)) => {
                Ok(Told { uid, sandbox: Some((sandbox, inode)), _held: Some(held) })
            }
            Err(e) if enrolled => {
                Err(Refusal::Unusable { pod: add.key.clone(), why: format!("{e:#}") })
            }
            Err(e) => {
                debug!(pod = %add.key, "no record: {e:#}");
                Ok(Told { uid, sandbox: None, _held: None })
            }
        }
    }
}

impl Agent for Admission {
    async fn add(&self, key: PodKey, request: AddRequest) -> Result<(), Refusal> {
        let mut add = Add { key, request, pod: None };
        let deadline = Instant::now() + self.timeout;
        let mut inventory = self.inventory.clone();
        let mut sandboxes = self.records.subscribe();
        let mut views = self.views.changed.subscribe();
        let mut waits = false;
        loop {
            inventory.mark_unchanged();
            sandboxes.mark_unchanged();
            views.mark_unchanged();
            let Some(refusal) = self.look(&mut add).await? else { return Ok(()) };
            if !std::mem::replace(&mut waits, true) {
                debug!(pod = %add.key, "waits to start");
            }
            tokio::select! {
                Ok(()) = inventory.changed() => {}
                Ok(()) = sandboxes.changed() => {}
                Ok(()) = views.changed() => {}
                () = sleep_until(deadline) => return Err(refusal),
            }
        }
    }
}

impl Add {
    fn sandbox(&self, uid: &str) -> Sandbox {
        let mut addresses = Vec::new();
        for config in &self.request.ips {
            let ip = config.address.ip.to_canonical();
            if can_be_a_pods(ip) && !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
        Sandbox { uid: uid.to_owned(), netns: self.request.netns.clone().into(), addresses }
    }
}

/// The pod that is starting. A pod of that name that is being deleted is an earlier one, unless CNI named its
/// uid.
fn pod_of<'a>(inventory: &'a Inventory, add: &Add) -> Option<&'a Pod> {
    let is_it = |pod: &&Pod| match add.request.pod_uid.as_deref() {
        None | Some("") => !pod.deleting,
        Some(uid) => pod.kubelet_uid() == uid,
    };
    inventory.pods.get(&add.key).filter(is_it)
}

/// What is known when the source has not reported the pod.
fn unknown(inventory: &Inventory, add: &Add) -> Refusal {
    let mut why = match inventory.pods.get(&add.key) {
        Some(pod) => {
            format!("the source knows only a former one of its name, with uid {}", pod.uid)
        }
        None => "the source does not know it".to_owned(),
    };
    for problem in inventory.problems.iter().take(PROBLEMS) {
        why = format!("{why}; {problem}");
    }
    Refusal::Unknown { pod: add.key.clone(), why }
}
