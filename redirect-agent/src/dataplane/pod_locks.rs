//! One lock per pod, so that a slow step of one pod delays no other.

use std::{
    collections::BTreeSet,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use redirect_ebpf::abi::PodId;

/// The pods that have a step in progress.
#[derive(Debug, Default)]
pub(super) struct PodLocks {
    busy: Mutex<BTreeSet<PodId>>,
    free: Condvar,
}

/// The lock of one pod, held until dropped.
#[derive(Debug)]
pub(super) struct PodLock<'a> {
    locks: &'a PodLocks,
    pod_id: PodId,
}

impl PodLocks {
    /// Waits until nobody else holds the pod's lock, and takes it.
    pub(super) fn lock(&self, pod_id: PodId) -> PodLock<'_> {
        let mut busy = self
            .free
            .wait_while(self.busy(), |busy| busy.contains(&pod_id))
            .unwrap_or_else(PoisonError::into_inner);
        busy.insert(pod_id);
        PodLock { locks: self, pod_id }
    }

    fn busy(&self) -> MutexGuard<'_, BTreeSet<PodId>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PodLock<'_> {
    fn drop(&mut self) {
        self.locks.busy().remove(&self.pod_id);
        self.locks.free.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn who_has_a_pod_keeps_nobody_from_another() {
        let locks = PodLocks::default();
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            let first = locks.lock(1);
            let _another = locks.lock(65);
            scope.spawn(|| {
                let _second = locks.lock(1);
                sender.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
            drop(first);
            receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        });
    }
}
