//! Installs the CNI plugin on the node, keeps it installed, and removes it.
//!
//! The runtime uses the first network, in lexical order of the files, that it can read. That one gets our
//! entry. If somebody else rewrites it, their content is kept, and our entry is added again.
//!
//! | file | what becomes of it |
//! |---|---|
//! | `10-net.conflist` | our entry at its end |
//! | `10-net.conf`, `10-net.json` | renamed to `10-net.conf.before-redirect-cni`, with its plugin and ours in `10-net.conflist` |
//! | one that cannot be read | nothing, and it is told |

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use notify::Watcher as _;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    entry::{Entry, PLUGIN},
    network::{List, Network, Single},
};

/// The directories are checked this often even without a notification: they may be created later than the
/// agent, and a directory that was replaced has lost its watch.
const RESCAN: Duration = Duration::from_secs(2);
/// A file that was written to within this time may be half-written.
const SETTLE: Duration = Duration::from_millis(50);
/// A file that is written to all the time is read anyway after this many checks.
const SETTLE_AT_MOST: u32 = 20;

/// The files that a runtime reads. Source: containerd/go-cni `opts.go`, `loadFromConfDir`.
pub const CONFIGURATIONS: [&str; 3] = [".conf", ".conflist", ".json"];
/// Appended to the name of a file that a list replaces. No runtime reads such a file.
const SAVED: &str = ".before-redirect-cni";
/// The temporary file that is written first and then renamed.
const TEMPORARY: &str = ".redirect-cni.tmp";

/// Where the node has its CNI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirs {
    /// The configuration of its networks.
    pub conf: PathBuf,
    /// The plugins' programs.
    pub bin: PathBuf,
}

impl Dirs {
    fn program(&self) -> PathBuf {
        self.bin.join(PLUGIN)
    }
}

/// Keeps the plugin installed.
#[derive(Debug)]
pub struct Installer {
    dirs: Dirs,
    entry: Entry,
    missing: Missing,
    /// The installed program when it was last compared with this one.
    program: Option<Stamp>,
    notes: BTreeSet<String>,
}

/// What is missing from the installation; `None`: nothing.
#[derive(Clone, Debug)]
pub struct Missing(Arc<Mutex<Option<String>>>);

impl Missing {
    /// What it is at the moment.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, missing: Option<String>) -> bool {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *current != missing;
        *current = missing;
        changed
    }
}

/// Identifies a state of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    mode: u32,
    changed: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Stamp {
            inode: (meta.dev(), meta.ino()),
            size: meta.size(),
            mode: meta.mode(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// The result of checking the directories.
enum Look {
    /// The plugin is in this file.
    Installed(PathBuf),
    /// It is not; why.
    Missing(String),
    /// Somebody is writing there right now.
    Unsettled,
}

impl Installer {
    /// For a plugin with this entry.
    pub fn new(dirs: Dirs, entry: Entry) -> Self {
        let missing = Missing(Arc::new(Mutex::new(Some("it is not installed yet".to_owned()))));
        Self { dirs, entry, missing, program: None, notes: BTreeSet::new() }
    }

    /// What is missing, kept current.
    pub fn missing(&self) -> Missing {
        self.missing.clone()
    }

    /// Installs the plugin, and installs it again whenever somebody undoes that, until `shutdown`. Failures
    /// are reported and retried.
    ///
    /// # Errors
    ///
    /// Only when the working task itself fails, which is a defect.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<()> {
        let changed = Arc::new(Notify::new());
        let mut watch = Watch::new(Arc::clone(&changed));
        let mut unsettled = 0;
        loop {
            watch.follow([&self.dirs.conf, &self.dirs.bin]);
            let patient = unsettled < SETTLE_AT_MOST;
            let looking = tokio::task::spawn_blocking(move || {
                let settled = self.look(patient);
                (self, settled)
            });
            let settled;
            (self, settled) = looking.await.context("install the CNI plugin: the task failed")?;
            unsettled = if settled { 0 } else { unsettled + 1 };
            let pause = if settled { RESCAN } else { SETTLE };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                // Writing takes a moment, so the file is checked once it has settled.
                () = changed.notified(), if settled => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Does what is missing. Returns whether it succeeded.
    fn look(&mut self, patient: bool) -> bool {
        let mut notes = BTreeSet::new();
        let look = self.install(patient, &mut notes);
        for note in notes.difference(&self.notes) {
            warn!("{note}");
        }
        let missing = match look {
            Ok(Look::Unsettled) => return false,
            Ok(Look::Installed(file)) => {
                if self.missing.set(None) {
                    info!(file = %file.display(), "the CNI plugin is installed");
                }
                None
            }
            Ok(Look::Missing(why)) => Some(why),
            Err(error) => Some(format!("{error:#}")),
        };
        self.notes = notes;
        if let Some(missing) = missing
            && self.missing.set(Some(missing.clone()))
        {
            warn!("the CNI plugin is not installed: {missing}");
        }
        true
    }

    fn install(&mut self, patient: bool, notes: &mut BTreeSet<String>) -> Result<Look> {
        // The program comes first: an entry without it would keep every pod from starting.
        self.place_program()?;
        let files = match read(&self.dirs.conf, patient)? {
            Some(files) => files,
            None => return Ok(Look::Unsettled),
        };
        let mut networks = Vec::new();
        for file in &files {
            match file.network() {
                Ok(network) => networks.push((file, network)),
                Err(error) => {
                    notes.insert(format!("{} is left alone: {error:#}", file.path.display()));
                }
            }
        }
        let dir = self.dirs.conf.display();
        let Some(first) = networks.first() else {
            return Ok(Look::Missing(format!(
                "{dir} has no network that can be read; the network plugin has to bring one"
            )));
        };
        // What a list of ours was made of, and is there: written anew, or not yet put aside.
        let origin = match &first.1 {
            Network::List(list) => list.replaces(),
            Network::Single(_) => None,
        };
        let is_origin = |(file, network): &&(&Found, Network)| {
            matches!(network, Network::Single(_)) && Some(&file.name) == origin.as_ref()
        };
        let (file, network) = networks.iter().find(is_origin).unwrap_or(first);
        let path = file.path.display();
        if let Some(why) = network.unfit() {
            return Ok(Look::Missing(format!("{path} cannot have its entry: {why}")));
        }
        let at = match network {
            Network::Single(single) => self.replace_single(file, single, &files)?,
            Network::List(list) => {
                if list.has_istio() {
                    notes.insert(format!("{path} has istio-cni, too: never both on one pod"));
                }
                // The new entry still names the file that the list replaces.
                let entry = Entry { replaces: origin.clone(), ..self.entry.clone() };
                if !list.has(&entry) {
                    let text = list.with(&entry).with_context(|| format!("edit {path}"))?;
                    file.rewrite(&text)?;
                    info!(file = %path, "put {PLUGIN} into the node's CNI configuration");
                }
                file.path.clone()
            }
        };
        // A file that used to be the first one.
        for (file, network) in &networks[1..] {
            if let Network::List(list) = network
                && list.has_ours()
                && file.path != at
            {
                file.take_out(list)?;
                let path = file.path.display();
                info!(file = %path, "took {PLUGIN} out of what is not the first network any more");
            }
        }
        Ok(Look::Installed(at))
    }

    /// Makes a list of a single network and our entry, and replaces the network's file by it.
    fn replace_single(&self, file: &Found, single: &Single, all: &[Found]) -> Result<PathBuf> {
        let path = file.path.with_extension("conflist");
        let made_of = |other: &Found| match other.network() {
            Ok(Network::List(list)) => list.replaces().as_ref() == Some(&file.name),
            _ => false,
        };
        if all.iter().any(|other| other.path == path && !made_of(other)) {
            bail!(
                "make a list of {}: {} is there, and is not ours; remove one of them",
                file.path.display(),
                path.display()
            );
        }
        let entry = Entry { replaces: Some(file.name.clone()), ..self.entry.clone() };
        // In this order, there is a first network at every moment.
        write(&path, single.to_list(&entry).as_bytes(), &file.meta)?;
        file.is_as_read()?;
        rename(&file.path, &saved(&file.path))?;
        sync(&self.dirs.conf)?;
        let name = &file.name;
        info!(file = %path.display(), "put {PLUGIN} into the CNI configuration, in place of {name}");
        Ok(path)
    }

    /// Copies this program to where the runtime finds plugins.
    fn place_program(&mut self) -> Result<()> {
        let path = self.dirs.program();
        let stamp = |path: &Path| fs::metadata(path).ok().map(|meta| Stamp::of(&meta));
        if self.program.is_some() && self.program == stamp(&path) {
            return Ok(());
        }
        let mut own = File::open("/proc/self/exe").context("open this program")?;
        let there = File::open(&path).ok().filter(is_program);
        if !there.is_some_and(|there| same_content(&own, there).unwrap_or(false)) {
            own = File::open("/proc/self/exe").context("open this program")?;
            let context = || format!("copy the CNI plugin to {}", path.display());
            let temporary = self.dirs.bin.join(TEMPORARY);
            let mut file = create(&temporary).with_context(context)?;
            io::copy(&mut own, &mut file).with_context(context)?;
            file.set_permissions(Permissions::from_mode(0o755)).with_context(context)?;
            file.sync_all().with_context(context)?;
            // Nobody can run a program that is open for writing (ETXTBSY).
            drop(file);
            rename(&temporary, &path)?;
            sync(&self.dirs.bin)?;
            info!(file = %path.display(), "copied the CNI plugin");
        }
        self.program = stamp(&path);
        Ok(())
    }
}

/// Removes the plugin from the node, and restores the configuration. Returns what it did.
///
/// # Errors
///
/// When a file cannot be written. Missing files are not an error.
pub fn remove(dirs: &Dirs) -> Result<Vec<String>> {
    let mut done = Vec::new();
    for file in read(&dirs.conf, false)?.unwrap_or_default() {
        let Ok(Network::List(list)) = file.network() else { continue };
        if list.has_ours() {
            file.take_out(&list)?;
            done.push(format!("took {PLUGIN} out of {}", file.path.display()));
        }
    }
    // Last, when no entry names it anymore.
    for path in [dirs.conf.join(TEMPORARY), dirs.bin.join(TEMPORARY), dirs.program()] {
        if unlink(&path)? {
            done.push(format!("removed {}", path.display()));
        }
    }
    Ok(done)
}

/// What `check` says: the file with our entry, or why there is none.
///
/// # Errors
///
/// When the plugin is not installed, or only partly.
pub fn find(dirs: &Dirs) -> Result<PathBuf> {
    let mut found = None;
    for file in read(&dirs.conf, false)?.unwrap_or_default() {
        let Ok(network) = file.network() else { continue };
        let has_ours = matches!(&network, Network::List(list) if list.has_ours());
        found = has_ours.then_some(file.path);
        // The runtime looks no further.
        break;
    }
    let Some(file) = found else {
        bail!("the first network in {} has no entry of {PLUGIN}", dirs.conf.display());
    };
    let program = dirs.program();
    if !File::open(&program).is_ok_and(|program| is_program(&program)) {
        bail!(
            "{} names {PLUGIN}, but {} is no program: no pod can start; `redirect-agent cleanup` takes \
             the entry out",
            file.display(),
            program.display()
        );
    }
    Ok(file)
}

/// A configuration file as it was read.
struct Found {
    path: PathBuf,
    name: String,
    content: Vec<u8>,
    meta: Metadata,
}

impl Found {
    fn network(&self) -> Result<Network<'_>> {
        let text = std::str::from_utf8(&self.content).context("read it as UTF-8")?;
        Ok(Network::read(&self.name, text)?)
    }

    /// If somebody has written to it in the meantime, it is not overwritten.
    fn is_as_read(&self) -> Result<()> {
        let now = fs::read(&self.path).with_context(|| format!("read {}", self.path.display()))?;
        if now != self.content {
            bail!("edit {}: somebody else has written to it just now", self.path.display());
        }
        Ok(())
    }

    fn rewrite(&self, text: &str) -> Result<()> {
        self.is_as_read()?;
        // A symbolic link stays a link.
        let path = fs::canonicalize(&self.path)
            .with_context(|| format!("follow {}", self.path.display()))?;
        write(&path, text.as_bytes(), &self.meta)
    }

    /// Removes our entry. A list that replaced another file is removed, and that file is restored.
    fn take_out(&self, list: &List) -> Result<()> {
        let Some(replaced) = list.replaces().and_then(|name| replaced(&self.path, &name)) else {
            let text = list.without().with_context(|| format!("edit {}", self.path.display()))?;
            return self.rewrite(&text);
        };
        // A file that was written again is newer than the saved one.
        if replaced.exists() {
            unlink(&saved(&replaced))?;
        } else {
            rename(&saved(&replaced), &replaced)?;
        }
        unlink(&self.path)?;
        Ok(())
    }
}

/// The file that a list replaced, if it can be restored.
fn replaced(list: &Path, name: &str) -> Option<PathBuf> {
    let is_file_name = Path::new(name).file_name() == Some(name.as_ref());
    let path = list.with_file_name(name);
    (is_file_name && (path.exists() || saved(&path).exists())).then_some(path)
}

fn saved(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SAVED);
    name.into()
}

/// The configuration files, in the runtime's order; a node without the directory has none. `None` while a
/// file is still being written and `patient` is set.
fn read(dir: &Path, patient: bool) -> Result<Option<Vec<Found>>> {
    let context = || format!("read {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Vec::new())),
        entries => entries.with_context(context)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(context)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        if !CONFIGURATIONS.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        // A file may disappear in between; files that cannot be read cannot be read by a runtime, either.
        let Ok(mut file) = File::open(&path) else { continue };
        let Ok(meta) = file.metadata() else { continue };
        if !meta.is_file() {
            continue;
        }
        let age = meta.modified().ok().and_then(|modified| modified.elapsed().ok());
        if patient && age.is_some_and(|age| age < SETTLE) {
            return Ok(None);
        }
        let mut content = Vec::new();
        file.read_to_end(&mut content).with_context(|| format!("read {}", path.display()))?;
        found.push(Found { path, name, content, meta });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Some(found))
}

/// Writes a temporary file and renames it, with the mode and the owner of `like`.
fn write(path: &Path, content: &[u8], like: &Metadata) -> Result<()> {
    let context = || format!("write {}", path.display());
    let temporary = path.with_file_name(TEMPORARY);
    let mut file = create(&temporary).with_context(context)?;
    file.write_all(content).with_context(context)?;
    fchown(&file, Some(like.uid()), Some(like.gid())).with_context(context)?;
    // After the owner, because changing the owner clears mode bits.
    file.set_permissions(Permissions::from_mode(like.mode() & 0o7777)).with_context(context)?;
    file.sync_all().with_context(context)?;
    rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync)
}

/// An empty file that nobody else can read. One that a killed agent left behind is removed first.
fn create(path: &Path) -> Result<File> {
    unlink(path)?;
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options.open(path).with_context(|| format!("make {}", path.display()))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("rename {} to {}", from.display(), to.display()))
}

/// Removes a file; says whether it was there.
fn unlink(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
    }
}

/// Makes renames survive a power failure.
fn sync(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.with_context(|| format!("write {}", dir.display()))
}

fn is_program(file: &File) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 == 0o111)
}

fn same_content(a: &File, b: File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) =
        (io::BufReader::with_capacity(1 << 16, a), io::BufReader::with_capacity(1 << 16, b));
    loop {
        use io::BufRead as _;
        let (left, right) = (a.fill_buf()?, b.fill_buf()?);
        let length = left.len().min(right.len());
        if left[..length] != right[..length] || (length == 0 && left.len() != right.len()) {
            return Ok(false);
        }
        if length == 0 {
            return Ok(true);
        }
        a.consume(length);
        b.consume(length);
    }
}

/// Wakes us when a directory changes. Without it, changes are found by the regular check.
struct Watch {
    watcher: Option<notify::RecommendedWatcher>,
    followed: BTreeSet<PathBuf>,
}

impl Watch {
    fn new(changed: Arc<Notify>) -> Self {
        let wake = move |event: notify::Result<notify::Event>| {
            // Our own reads must not wake us.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                changed.notify_one();
            }
        };
        let watcher = notify::recommended_watcher(wake)
            .inspect_err(|error| warn!("watch the CNI configuration: {error}; the rescan goes on"));
        Self { watcher: watcher.ok(), followed: BTreeSet::new() }
    }

    /// Watches directories that have been created in the meantime.
    fn follow(&mut self, dirs: [&PathBuf; 2]) {
        let Some(watcher) = &mut self.watcher else { return };
        for dir in dirs {
            if !dir.is_dir() {
                self.followed.remove(dir);
            } else if !self.followed.contains(dir)
                && watcher.watch(dir, notify::RecursiveMode::NonRecursive).is_ok()
            {
                self.followed.insert(dir.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}"#;
    const SINGLE: &str = "{\"cniVersion\":\"0.3.1\", \"name\":\"n\", \"type\":\"ptp\"}\n";

    struct Node {
        dir: tempfile::TempDir,
        installer: Installer,
    }

    impl Node {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let dirs = Dirs { conf: dir.path().join("net.d"), bin: dir.path().join("bin") };
            fs::create_dir(&dirs.conf).unwrap();
            fs::create_dir(&dirs.bin).unwrap();
            let mut installer = Installer::new(dirs, Entry::default());
            // The test's own program is large, and what is copied is looked at elsewhere.
            let program = installer.dirs.program();
            fs::write(&program, "#!").unwrap();
            fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
            installer.program = Some(Stamp::of(&fs::metadata(&program).unwrap()));
            let node = Self { dir, installer };
            for (name, text) in files {
                node.write(name, text);
            }
            node
        }

        fn conf(&self, name: &str) -> PathBuf {
            self.installer.dirs.conf.join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.conf(name), text).unwrap();
        }

        fn text(&self, name: &str) -> String {
            fs::read_to_string(self.conf(name)).unwrap()
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.installer.dirs.conf).unwrap();
            let mut names: Vec<_> =
                entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        /// What is missing after a look.
        fn look(&mut self) -> Option<String> {
            assert!(self.installer.look(false));
            self.installer.missing.get()
        }

        fn notes(&self) -> String {
            self.installer.notes.iter().cloned().collect::<Vec<_>>().join("\n")
        }

        fn everything(&self) -> Vec<(String, String, u32)> {
            let mode = |name: &str| fs::metadata(self.conf(name)).unwrap().mode();
            self.names().into_iter().map(|n| (n.clone(), self.text(&n), mode(&n))).collect()
        }

        fn has_ours(&self, name: &str) -> bool {
            self.text(name).contains(PLUGIN)
        }
    }

    #[test]
    fn first_network_that_can_be_read_gets_the_entry_and_gives_it_back() {
        let mut node = Node::new(&[
            ("00-broken.conflist", "{"),
            ("05-not-a-list.conf", LIST),
            ("10-net.conflist", LIST),
            ("20-other.conflist", LIST),
            ("notes.txt", "x"),
        ]);
        fs::set_permissions(node.conf("10-net.conflist"), Permissions::from_mode(0o640)).unwrap();
        let root = nix::unistd::geteuid().is_root();
        if root {
            chown(node.conf("10-net.conflist"), Some(12), Some(34)).unwrap();
        }
        let found = node.everything();
        assert_eq!(node.look(), None);
        assert!(node.has_ours("10-net.conflist") && !node.has_ours("20-other.conflist"));
        assert!(node.notes().contains("00-broken.conflist is left alone"), "{}", node.notes());
        assert!(node.notes().contains("05-not-a-list.conf is left alone"), "{}", node.notes());
        let meta = fs::metadata(node.conf("10-net.conflist")).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o640);
        assert!(!root || (meta.uid(), meta.gid()) == (12, 34));
        assert_eq!(find(&node.installer.dirs).unwrap(), node.conf("10-net.conflist"));

        // Twice is once.
        let inode = meta.ino();
        assert_eq!(node.look(), None);
        assert_eq!(fs::metadata(node.conf("10-net.conflist")).unwrap().ino(), inode);

        let done = remove(&node.installer.dirs).unwrap();
        assert_eq!(done.len(), 2, "{done:?}");
        assert_eq!(node.everything(), found);
        assert!(!node.installer.dirs.program().exists());
        assert!(find(&node.installer.dirs).is_err());
        assert_eq!(remove(&node.installer.dirs).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn single_network_is_put_aside_and_comes_back() {
        for file in ["10-net.conf", "10-net.json"] {
            let mut node = Node::new(&[(file, SINGLE), ("20-other.conflist", LIST)]);
            let found = node.everything();
            assert_eq!(node.look(), None);
            let saved = format!("{file}.before-redirect-cni");
            let mut names =
                vec!["10-net.conflist".to_owned(), saved.clone(), "20-other.conflist".into()];
            names.sort();
            assert_eq!(node.names(), names);
            assert!(node.has_ours("10-net.conflist") && !node.has_ours("20-other.conflist"));
            let installed = node.everything();
            assert_eq!(node.look(), None);
            assert_eq!(node.everything(), installed);
            // Its owner writes it anew: it is the first, and in force.
            let newer = SINGLE.replace("ptp", "bridge");
            node.write(file, &newer);
            assert_eq!(node.look(), None);
            assert_eq!(node.names(), names);
            assert!(node.text("10-net.conflist").contains("bridge"));
            remove(&node.installer.dirs).unwrap();
            let names: Vec<_> = found.iter().map(|(name, ..)| name.clone()).collect();
            assert_eq!((node.names(), node.text(file)), (names, newer));
        }
    }

    #[test]
    fn agent_that_dies_while_it_puts_a_single_network_aside_goes_on() {
        let mut node = Node::new(&[("10-net.conf", SINGLE)]);
        node.look();
        // As if the last step had not been done.
        fs::rename(node.conf("10-net.conf.before-redirect-cni"), node.conf("10-net.conf")).unwrap();
        node.write(TEMPORARY, "half of it");
        assert_eq!(node.look(), None);
        assert_eq!(node.names(), ["10-net.conf.before-redirect-cni", "10-net.conflist"]);
        fs::rename(node.conf("10-net.conf.before-redirect-cni"), node.conf("10-net.conf")).unwrap();
        remove(&node.installer.dirs).unwrap();
        assert_eq!(
            (node.names(), node.text("10-net.conf")),
            (vec!["10-net.conf".into()], SINGLE.into())
        );
    }

    #[test]
    fn list_of_another_is_not_overwritten() {
        let mut node = Node::new(&[("10-net.conf", SINGLE), ("10-net.conflist", LIST)]);
        let found = node.everything();
        let missing = node.look().unwrap();
        assert!(missing.contains("is not ours"), "{missing}");
        assert_eq!(node.everything(), found);
    }

    #[test]
    fn new_file_that_sorts_first_takes_over() {
        let mut node = Node::new(&[("10-net.conflist", LIST)]);
        node.look();
        node.write("05-net.conflist", LIST);
        assert_eq!(node.look(), None);
        assert!(node.has_ours("05-net.conflist"));
        assert_eq!(node.text("10-net.conflist"), LIST);
        node.write("01-net.conf", SINGLE);
        assert_eq!(node.look(), None);
        assert!(node.has_ours("01-net.conflist"));
        assert_eq!(node.text("05-net.conflist"), LIST);
        // And away again.
        fs::remove_file(node.conf("01-net.conflist")).unwrap();
        assert_eq!(node.look(), None);
        assert!(node.has_ours("05-net.conflist"));
    }

    #[test]
    fn file_that_is_written_anew_gets_the_entry_again() {
        let mut node = Node::new(&[("10-net.conflist", LIST)]);
        for text in [LIST, &LIST.replace("ptp", "bridge"), LIST] {
            node.write("10-net.conflist", text);
            assert_eq!(node.look(), None);
            assert!(node.has_ours("10-net.conflist"));
        }
        node.write("10-net.conflist", &LIST[..20]);
        let missing = node.look().unwrap();
        assert!(missing.contains("no network that can be read"), "{missing}");
        assert_eq!(node.text("10-net.conflist"), LIST[..20]);
    }

    #[test]
    fn fresh_node_is_waited_for() {
        let mut node = Node::new(&[]);
        assert!(node.look().unwrap().contains("no network that can be read"));
        fs::remove_dir(&node.installer.dirs.conf).unwrap();
        assert!(node.look().unwrap().contains("no network that can be read"));
        fs::create_dir(&node.installer.dirs.conf).unwrap();
        node.write("10-net.conflist", LIST);
        assert_eq!(node.look(), None);
    }

    #[test]
    fn unfit_network_is_left_alone_and_told() {
        let mut node = Node::new(&[("10-net.conflist", &LIST.replace("1.0.0", "0.2.0"))]);
        let found = node.everything();
        let missing = node.look().unwrap();
        assert!(missing.contains("cniVersion is \"0.2.0\""), "{missing}");
        assert_eq!(node.everything(), found);
    }

    #[test]
    fn istio_cni_in_the_same_list_stays_and_is_told() {
        let both = LIST.replace("]}", r#",{"type":"istio-cni"}]}"#);
        let mut node = Node::new(&[("10-net.conflist", &both)]);
        assert_eq!(node.look(), None);
        assert!(node.text("10-net.conflist").contains("istio-cni"));
        assert!(node.notes().contains("istio-cni"), "{}", node.notes());
    }

    #[test]
    fn file_that_is_being_written_is_looked_at_later() {
        let mut node = Node::new(&[("10-net.conflist", LIST)]);
        assert!(!node.installer.look(true));
        assert!(!node.has_ours("10-net.conflist"));
        assert_eq!(node.look(), None);
    }

    #[test]
    fn link_to_a_configuration_stays_a_link() {
        let mut node = Node::new(&[]);
        let target = node.dir.path().join("real.conflist");
        fs::write(&target, LIST).unwrap();
        symlink(&target, node.conf("10-net.conflist")).unwrap();
        assert_eq!(node.look(), None);
        assert!(node.conf("10-net.conflist").is_symlink());
        assert!(fs::read_to_string(&target).unwrap().contains(PLUGIN));
        remove(&node.installer.dirs).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), LIST);
        assert!(node.conf("10-net.conflist").is_symlink());
    }

    #[test]
    fn program_comes_before_the_entry_and_comes_back() {
        let mut node = Node::new(&[("10-net.conflist", LIST)]);
        let program = node.installer.dirs.program();
        fs::remove_dir_all(&node.installer.dirs.bin).unwrap();
        let missing = node.look().unwrap();
        assert!(missing.contains("copy the CNI plugin to"), "{missing}");
        assert_eq!(node.text("10-net.conflist"), LIST);
        fs::create_dir(&node.installer.dirs.bin).unwrap();
        assert_eq!(node.look(), None);
        let own = fs::read("/proc/self/exe").unwrap();
        let meta = || fs::metadata(&program).unwrap();
        assert!(fs::read(&program).unwrap() == own && meta().mode() & 0o7777 == 0o755);
        // Another one that is the same is left alone; one that is not, or cannot be run, is not.
        let inode = meta().ino();
        node.installer.program = None;
        assert_eq!((node.look(), meta().ino()), (None, inode));
        fs::set_permissions(&program, Permissions::from_mode(0o644)).unwrap();
        assert_eq!((node.look(), meta().mode() & 0o7777), (None, 0o755));
        fs::write(&program, "old").unwrap();
        assert!(node.look().is_none() && fs::read(&program).unwrap() == own);
        fs::remove_file(&program).unwrap();
        assert!(find(&node.installer.dirs).unwrap_err().to_string().contains("no pod can start"));
        assert!(node.look().is_none() && fs::read(&program).unwrap() == own);
    }
}
