//! What CNI reported about the pods' sandboxes, kept across restarts of the agent. Before a pod's first
//! process runs, and before its status has an address, nothing else says where the pod is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read as _},
    net::IpAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::{dataplane::PodNetns, finder::hosts, netns::Netns};

/// The records' directory below the state directory.
const DIR: &str = "sandboxes";

/// A pod's sandbox, as CNI reported it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// The uid that kubelet knows the pod by.
    pub uid: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Sandbox {
    /// Its network namespace; `is_ours` as for `Finder::find`.
    ///
    /// # Errors
    ///
    /// When there is none at its path, when it is the node's own, or when it has none of the addresses.
    pub fn open(&self, is_ours: impl Fn(u32) -> bool) -> Result<PodNetns> {
        let netns = Netns::open(&self.netns)?;
        if hosts()?.contains(&netns.inode()) {
            bail!("{} is the node's own network namespace", self.netns.display());
        }
        let is_ours = is_ours(netns.inode());
        PodNetns::of_pod(netns, &self.addresses, is_ours)
    }

    /// Whether [`Sandbox::open`] can ever succeed again.
    fn stands(&self) -> Result<bool> {
        let netns = match Netns::open(&self.netns) {
            Ok(netns) => netns,
            Err(e) => match e.downcast_ref::<io::Error>() {
                Some(io) if io.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => return Ok(false),
            },
        };
        if hosts()?.contains(&netns.inode()) {
            return Ok(false);
        }
        let found = PodNetns::existing(netns)?.addresses;
        Ok(self.addresses.iter().any(|address| found.contains(address)))
    }

    /// Whether the two cannot both be alive.
    fn excludes(&self, other: &Sandbox) -> bool {
        self.netns == other.netns || self.addresses.iter().any(|ip| other.addresses.contains(ip))
    }
}

/// The sandboxes, by the pod's uid.
pub type Sandboxes = Arc<BTreeMap<String, Arc<Sandbox>>>;

/// The records, a file for each.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
    current: watch::Sender<Sandboxes>,
    /// The sandboxes in which nothing runs yet, by the pod's uid.
    held: Mutex<BTreeMap<String, Weak<()>>>,
}

/// As long as this exists, nothing runs in the sandbox.
#[derive(Debug)]
pub struct Held {
    _hold: Option<Arc<()>>,
}

impl Records {
    /// Reads the records in `state_dir`, which is created if it is missing. A file that cannot be parsed is
    /// dropped, which affects only its own pod.
    ///
    /// # Errors
    ///
    /// When the directory cannot be used.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let dir = state_dir.join(DIR);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("create {}", dir.display()))?;
        let mut known = BTreeMap::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
            match read(&path) {
                Ok(sandbox) => {
                    known.insert(sandbox.uid.clone(), Arc::new(sandbox));
                }
                Err(e) => {
                    warn!("drop the record {}: {e:#}", path.display());
                    let _left = fs::remove_file(&path);
                }
            }
        }
        Ok(Self { dir, current: watch::Sender::new(Arc::new(known)), held: Mutex::default() })
    }

    /// What is known now.
    pub fn current(&self) -> Sandboxes {
        Arc::clone(&self.current.borrow())
    }

    /// Follows what is known.
    pub fn subscribe(&self) -> watch::Receiver<Sandboxes> {
        self.current.subscribe()
    }

    /// The sandbox of the pod with this uid.
    pub fn of(&self, uid: &str) -> Option<Arc<Sandbox>> {
        self.current.borrow().get(uid).cloned()
    }

    /// Records what CNI has just reported. It overrides older records: an earlier sandbox of the pod, and a
    /// sandbox of another pod with the same namespace or one of the same addresses, must be dead.
    ///
    /// # Errors
    ///
    /// When it cannot be stored; then nothing has changed.
    pub fn put(&self, sandbox: Sandbox) -> Result<Held> {
        let file = self.file(&sandbox.uid)?;
        // Held while writing, so that records are written one after the other.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.current();
        if current.get(&sandbox.uid).is_some_and(|known| **known == sandbox) {
            // Reported again: something may run in it by now, unless the first request is still waiting.
            let hold = held.get(&sandbox.uid).and_then(Weak::upgrade);
            return Ok(Held { _hold: hold });
        }
        // It need not survive a power failure, because no sandbox does.
        let new = file.with_extension("new");
        fs::write(&new, serde_json::to_vec(&sandbox)?)
            .and_then(|()| fs::rename(&new, &file))
            .with_context(|| format!("write {}", file.display()))?;
        let mut next = BTreeMap::clone(&current);
        for dead in current.values().filter(|other| other.uid != sandbox.uid) {
            if sandbox.excludes(dead) {
                debug!("the sandbox of uid {} gives way to that of {}", dead.uid, sandbox.uid);
                self.remove(&dead.uid);
                next.remove(&dead.uid);
            }
        }
        let hold = Arc::new(());
        held.retain(|_, hold| hold.strong_count() > 0);
        held.insert(sandbox.uid.clone(), Arc::downgrade(&hold));
        next.insert(sandbox.uid.clone(), Arc::new(sandbox));
        self.current.send_replace(Arc::new(next));
        Ok(Held { _hold: Some(hold) })
    }

    /// Whether nothing runs in the pod's sandbox yet, because its CNI request is still waiting for an answer.
    pub fn is_held(&self, uid: &str) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(uid).is_some_and(|hold| hold.strong_count() > 0)
    }

    /// Drops those of `recorded` that have no namespace anymore, and, if `uids` is known, those that belong
    /// to none of these pods.
    pub fn sweep(&self, recorded: &Sandboxes, uids: Option<&BTreeSet<String>>) {
        for sandbox in recorded.values() {
            let stands = uids.is_none_or(|uids| uids.contains(&sandbox.uid))
                && sandbox.stands().unwrap_or_else(|e| {
                    debug!("look at the sandbox of uid {}: {e:#}", sandbox.uid);
                    true
                });
            if !stands {
                self.forget(sandbox);
            }
        }
    }

    /// Drops a record, unless another one has taken its place.
    fn forget(&self, sandbox: &Arc<Sandbox>) {
        let _one_after_the_other = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.current();
        if current.get(&sandbox.uid).is_some_and(|known| Arc::ptr_eq(known, sandbox)) {
            self.remove(&sandbox.uid);
            let mut next = BTreeMap::clone(&current);
            next.remove(&sandbox.uid);
            self.current.send_replace(Arc::new(next));
        }
    }

    fn remove(&self, uid: &str) {
        let removed = self.file(uid).and_then(|file| match fs::remove_file(&file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove {}", file.display()))
            }
            _ => Ok(()),
        });
        if let Err(e) = removed {
            warn!("{e:#}");
        }
    }

    /// The file of the pod with this uid.
    fn file(&self, uid: &str) -> Result<PathBuf> {
        ensure!(is_file_name(uid), "keep a record of uid {uid:?}: it cannot be the name of a file");
        Ok(self.dir.join(format!("{uid}.json")))
    }
}

/// Removes all records below `state_dir`.
///
/// # Errors
///
/// When something that is there cannot be removed.
pub fn remove_state(state_dir: &Path) -> Result<()> {
    let dir = state_dir.join(DIR);
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// The longest record that is read, in bytes: the agent's own have some hundred.
const LONGEST: u64 = 64 * 1024;

/// What is recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recorded {
    /// The records, by uid.
    pub sandboxes: Vec<Sandbox>,
    /// How many files are left out: they cannot be read, or are longer than 64 KiB.
    pub left_out: usize,
}

/// What is recorded in `state_dir`. Changes nothing there.
///
/// # Errors
///
/// When the directory cannot be read. One that does not exist has no records.
pub fn look(state_dir: &Path) -> Result<Recorded> {
    let dir = state_dir.join(DIR);
    let list = || format!("list {}", dir.display());
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Recorded::default()),
        entries => entries.with_context(list)?,
    };
    let mut found = Recorded::default();
    for entry in entries {
        match read(&entry.with_context(list)?.path()) {
            Ok(sandbox) => found.sandboxes.push(sandbox),
            Err(_) => found.left_out += 1,
        }
    }
    found.sandboxes.sort_by(|a, b| a.uid.cmp(&b.uid));
    Ok(found)
}

fn read(path: &Path) -> Result<Sandbox> {
    let name = path.file_name().and_then(|name| name.to_str());
    understand(name.unwrap_or_default(), File::open(path)?.take(LONGEST))
}

/// The record in a file of this name.
pub(crate) fn understand(name: &str, content: impl io::Read) -> Result<Sandbox> {
    let sandbox: Sandbox = serde_json::from_reader(content)?;
    ensure!(
        is_file_name(&sandbox.uid) && name == format!("{}.json", sandbox.uid),
        "it is of uid {:?}",
        sandbox.uid
    );
    Ok(sandbox)
}

fn is_file_name(uid: &str) -> bool {
    (1..=200).contains(&uid.len())
        && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(uid: &str, netns: &str, addresses: &[&str]) -> Sandbox {
        Sandbox {
            uid: uid.to_owned(),
            netns: netns.into(),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    fn files(state: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(state.join(DIR))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn records_are_kept_over_a_restart_and_the_newest_word_counts() {
        let state = tempfile::tempdir().unwrap();
        let records = Records::open(state.path()).unwrap();
        let first = sandbox("u-1", "/run/netns/a", &["10.0.0.1", "fd00::1"]);
        let anew = sandbox("u-1", "/run/netns/b", &["10.0.0.2", "fd00::2"]);
        let other = sandbox("u-2", "/run/netns/c", &["10.0.0.3", "fd00::3"]);
        for sandbox in [&first, &anew, &other] {
            records.put(sandbox.clone()).unwrap();
        }
        let again = Records::open(state.path()).unwrap();
        for records in [&records, &again] {
            assert_eq!(records.of("u-1").as_deref(), Some(&anew));
            assert_eq!(records.of("u-2").as_deref(), Some(&other));
        }
        assert_eq!(files(state.path()), ["u-1.json", "u-2.json"]);
        remove_state(state.path()).unwrap();
        remove_state(state.path()).unwrap();
        assert!(Records::open(state.path()).unwrap().current().is_empty());
    }

    #[test]
    fn address_or_namespace_that_is_given_to_another_pod_ends_the_former_ones_record() {
        for (uid, netns, addresses) in [
            ("u-2", "/run/netns/b", ["10.0.0.1", "fd00::2"]),
            ("u-2", "/run/netns/b", ["10.0.0.2", "fd00::1"]),
            ("u-2", "/run/netns/a", ["10.0.0.2", "fd00::2"]),
        ] {
            let state = tempfile::tempdir().unwrap();
            let records = Records::open(state.path()).unwrap();
            records.put(sandbox("u-1", "/run/netns/a", &["10.0.0.1", "fd00::1"])).unwrap();
            records.put(sandbox(uid, netns, &addresses)).unwrap();
            assert_eq!(records.of("u-1"), None);
            assert_eq!(files(state.path()), ["u-2.json"]);
        }
    }

    #[test]
    fn sandbox_is_held_as_long_as_the_one_who_told_of_it_waits() {
        let state = tempfile::tempdir().unwrap();
        let records = Records::open(state.path()).unwrap();
        let told = sandbox("u-1", "/run/netns/a", &["10.0.0.1"]);
        let first = records.put(told.clone()).unwrap();
        let again = records.put(told.clone()).unwrap();
        drop(first);
        assert!(records.is_held("u-1"));
        drop(again);
        assert!(!records.is_held("u-1"));
        // Its containers may run by now.
        let late = records.put(told).unwrap();
        assert!(!records.is_held("u-1"));
        drop(late);
        let _anew = records.put(sandbox("u-1", "/run/netns/b", &["10.0.0.1"])).unwrap();
        assert!(records.is_held("u-1"));
    }

    #[test]
    fn file_that_cannot_be_understood_costs_only_itself() {
        let state = tempfile::tempdir().unwrap();
        let good = sandbox("good", "/run/netns/a", &["10.0.0.1"]);
        Records::open(state.path()).unwrap().put(good.clone()).unwrap();
        let good_bytes = fs::read(state.path().join(DIR).join("good.json")).unwrap();
        let odd: &[&[u8]] = &[
            b"",
            b"{",
            b"\0\xff\xfe",
            b"null",
            br#"{"uid":"odd"}"#,
            br#"{"uid":"odd","netns":1,"addresses":[]}"#,
            br#"{"uid":"odd","netns":"/a","addresses":["10.0.0.256"]}"#,
            br#"{"uid":"../../etc/passwd","netns":"/a","addresses":[]}"#,
            br#"{"uid":"other","netns":"/a","addresses":[]}"#,
            // What a power failure may leave.
            &good_bytes[..good_bytes.len() / 2],
        ];
        for odd in odd {
            let dir = state.path().join(DIR);
            fs::write(dir.join("odd.json"), odd).unwrap();
            fs::write(dir.join("half.new"), odd).unwrap();
            let records = Records::open(state.path()).unwrap();
            assert_eq!(records.current().len(), 1);
            assert_eq!(records.of("good").as_deref(), Some(&good));
            assert_eq!(files(state.path()), ["good.json"]);
        }
    }

    #[test]
    fn uid_that_cannot_be_the_name_of_a_file_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let records = Records::open(state.path()).unwrap();
        for uid in ["", "..", "a/b", "a\0b", &"x".repeat(201)] {
            assert!(records.put(sandbox(uid, "/run/netns/a", &[])).is_err(), "{uid:?}");
        }
        assert!(records.current().is_empty() && files(state.path()).is_empty());
    }

    #[test]
    fn what_has_no_namespace_or_no_pod_is_swept() {
        let state = tempfile::tempdir().unwrap();
        let records = Records::open(state.path()).unwrap();
        let no_netns = state.path().join("file");
        fs::write(&no_netns, "").unwrap();
        for (uid, netns, ip) in [
            ("gone", "/nonexistent/netns", "10.0.0.1"),
            ("no-netns", no_netns.to_str().unwrap(), "10.0.0.2"),
            // The test's own namespace stands for the node's.
            ("node", "/proc/self/ns/net", "127.0.0.1"),
        ] {
            records.put(sandbox(uid, netns, &[ip])).unwrap();
        }
        let recorded = records.current();
        // Told anew meanwhile: that is not what was looked at.
        let anew = sandbox("gone", "/nonexistent/other", &["10.0.0.4"]);
        records.put(anew.clone()).unwrap();
        records.sweep(&recorded, None);
        assert_eq!(records.of("gone").as_deref(), Some(&anew));
        assert_eq!(files(state.path()), ["gone.json"]);
        records.sweep(&records.current(), Some(&BTreeSet::new()));
        assert!(records.current().is_empty() && files(state.path()).is_empty());
    }
}
