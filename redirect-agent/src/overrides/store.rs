//! Stores the overrides.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::error;

use super::{Change, Overrides};

/// Version of the state file's layout. No other version is read.
const FORMAT: u32 = 1;
/// The state file's name in the state directory.
pub(super) const FILE: &str = "overrides.json";

/// Keeps the overrides in the state directory, across restarts of the agent.
#[derive(Debug)]
pub struct Store {
    file: PathBuf,
    current: watch::Sender<Arc<Overrides>>,
    /// Held while a change is written, so that changes are made one after the other.
    writing: Mutex<()>,
}

/// The state file.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    #[serde(flatten)]
    overrides: Overrides,
}

impl Store {
    /// Reads what is stored in `state_dir`, which is created if it is missing.
    ///
    /// A file that cannot be parsed is renamed, and only the labels decide: an agent that does not start
    /// helps nobody.
    ///
    /// # Errors
    ///
    /// When the directory or the file cannot be used.
    pub fn open(state_dir: &Path) -> anyhow::Result<Store> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .with_context(|| format!("create the state directory {}", state_dir.display()))?;
        let file = state_dir.join(FILE);
        let overrides = match fs::read(&file) {
            Ok(content) => match understand(&content) {
                Ok(overrides) => overrides,
                Err(reason) => {
                    let aside = move_aside(&file)?;
                    error!(
                        "read the overrides in {}: {reason}; moved it to {}, and go on without \
                         overrides: give them again where they are still wanted",
                        file.display(),
                        aside.display()
                    );
                    Overrides::default()
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Overrides::default(),
            Err(error) => {
                return Err(error).with_context(|| format!("read {}", file.display()));
            }
        };
        Ok(Store {
            file,
            current: watch::Sender::new(Arc::new(overrides)),
            writing: Mutex::default(),
        })
    }

    /// The current overrides.
    pub fn current(&self) -> Arc<Overrides> {
        Arc::clone(&self.current.borrow())
    }

    /// Watches the overrides. An override that expires ([`Overrides::next_end`]) is not reported as a change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Overrides>> {
        self.current.subscribe()
    }

    /// Applies `change` and stores it. Returns whether it changed anything.
    ///
    /// # Errors
    ///
    /// When it cannot be stored; then nothing has changed.
    pub fn change(&self, change: Change, now: SystemTime) -> anyhow::Result<bool> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current();
        let next = before.with(change, now);
        if next == *before {
            return Ok(false);
        }
        write(&self.file, &next).with_context(|| format!("write {}", self.file.display()))?;
        self.current.send_replace(Arc::new(next));
        Ok(true)
    }
}

/// Where the overrides are stored in `state_dir`.
pub fn file(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Removes what is stored in `state_dir`, and the directory if it is otherwise empty and not a container's
/// mount.
///
/// # Errors
///
/// When something that is there cannot be removed.
pub fn remove_state(state_dir: &Path) -> anyhow::Result<()> {
    let file = state_dir.join(FILE);
    for file in [&file, &new(&file), &aside(&file)] {
        match fs::remove_file(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.with_context(|| format!("remove {}", file.display()))?,
        }
    }
    match fs::remove_dir(state_dir) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::DirectoryNotEmpty
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::ResourceBusy
            ) =>
        {
            Err(error).with_context(|| format!("remove {}", state_dir.display()))
        }
        _ => Ok(()),
    }
}

/// The temporary file that is renamed to the state file.
fn new(file: &Path) -> PathBuf {
    file.with_extension("json.new")
}

/// The new name of a state file that cannot be parsed.
fn aside(file: &Path) -> PathBuf {
    file.with_extension("json.unreadable")
}

pub(crate) fn understand(content: &[u8]) -> Result<Overrides, String> {
    let saved: Saved = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    if saved.version != FORMAT {
        return Err(format!("its version is {}, this agent reads {FORMAT}", saved.version));
    }
    Ok(saved.overrides)
}

fn move_aside(file: &Path) -> anyhow::Result<PathBuf> {
    let aside = aside(file);
    fs::rename(file, &aside)
        .with_context(|| format!("move {} to {}", file.display(), aside.display()))?;
    Ok(aside)
}

/// What [`understand`] reads.
pub(crate) fn content(overrides: &Overrides) -> serde_json::Result<Vec<u8>> {
    let mut content =
        serde_json::to_vec_pretty(&Saved { version: FORMAT, overrides: overrides.clone() })?;
    content.push(b'\n');
    Ok(content)
}

/// Even after a power failure, the file has either the old or the new content.
fn write(file: &Path, overrides: &Overrides) -> anyhow::Result<()> {
    let content = content(overrides)?;
    let new = new(file);
    let mut writer =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    writer.write_all(&content)?;
    writer.sync_all()?;
    fs::rename(&new, file)?;
    if let Some(dir) = file.parent() {
        fs::File::open(dir)?.sync_all()?;
    }
    Ok(())
}
