//! Writes the archive: as a whole, or not at all.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::{
        fd::AsRawFd as _,
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process,
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};
use flate2::{Compression, write::GzEncoder};
use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    unistd::linkat,
};
use tar::{Builder, EntryType, Header};

use super::Bundle;

/// Root alone may read it: it says which pods the node has and whom they call.
const MODE: u32 = 0o600;

impl Bundle {
    /// Writes the archive to `out`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write(&self, out: impl Write) -> Result<()> {
        let time = self.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut archive = Builder::new(GzEncoder::new(out, Compression::default()));
        for (name, content) in &self.files {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Regular);
            header.set_size(u64::try_from(content.len())?);
            header.set_mode(MODE);
            header.set_mtime(time);
            let path = Path::new(&self.dir).join(name);
            archive.append_data(&mut header, path, content.as_bytes())?;
        }
        archive.into_inner()?.finish()?.flush()?;
        Ok(())
    }
}

/// A file that has no name until it is complete, so that an interrupted command leaves nothing.
#[derive(Debug)]
pub struct Output {
    file: File,
    /// Its name until then, on a filesystem without files that have none; it is removed when this is dropped.
    temporary: Option<PathBuf>,
    overwrite: bool,
}

impl Output {
    /// Makes a file that is to be at `path`, or under another name in that directory.
    ///
    /// # Errors
    ///
    /// When something is at `path` and not to be overwritten, or when the directory cannot be written to.
    pub fn open(path: &Path, overwrite: bool) -> Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(found) if !found.is_file() && !found.is_symlink() => {
                bail!(
                    "{} is not a file; give another one with -o, or - for standard output",
                    path.display()
                )
            }
            Ok(_) if !overwrite => bail!(exists(path)),
            _ => {}
        }
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let context = || {
            format!(
                "write to {}; give a file elsewhere with -o, or - for standard output",
                dir.display()
            )
        };
        let mut options = File::options();
        options.write(true).mode(MODE);
        let (file, temporary) = match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
            Ok(file) => (file, None),
            Err(error) if has_no_unnamed_files(&error) => {
                let temporary = hidden(path)?;
                (options.create_new(true).open(&temporary).with_context(context)?, Some(temporary))
            }
            Err(error) => return Err(error).with_context(context),
        };
        Ok(Self { file, temporary, overwrite })
    }

    /// Writes the archive, and puts it at `path`. Returns its size in bytes.
    ///
    /// # Errors
    ///
    /// When it cannot be written, or when somebody has made a file of that name meanwhile.
    pub fn finish(mut self, bundle: &Bundle, path: &Path) -> Result<u64> {
        let context = || format!("write {}", path.display());
        self.file.set_permissions(Permissions::from_mode(MODE)).with_context(context)?;
        bundle.write(io::BufWriter::new(&self.file)).with_context(context)?;
        self.file.sync_all().with_context(context)?;
        let size = self.file.metadata().with_context(context)?.len();
        if self.overwrite {
            // A link in place of the file is replaced, not followed.
            let temporary = match &self.temporary {
                Some(temporary) => temporary.clone(),
                None => {
                    let temporary = hidden(path)?;
                    self.name(&temporary).with_context(context)?;
                    self.temporary = Some(temporary.clone());
                    temporary
                }
            };
            fs::rename(&temporary, path).with_context(context)?;
            self.temporary = None;
        } else {
            match self.name(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => bail!(exists(path)),
                named => named.with_context(context)?,
            }
        }
        Ok(size)
    }

    /// Gives it a name that nobody has.
    fn name(&self, path: &Path) -> io::Result<()> {
        if let Some(temporary) = self.temporary.as_ref().filter(|temporary| *temporary != path) {
            return fs::hard_link(temporary, path);
        }
        // Source: open(2), O_TMPFILE.
        let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(linkat(AT_FDCWD, open.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _gone = fs::remove_file(temporary);
        }
    }
}

fn exists(path: &Path) -> String {
    format!("{} exists; give another file with -o, or --overwrite", path.display())
}

/// Source: open(2), O_TMPFILE; a kernel without it takes the flag for O_DIRECTORY.
fn has_no_unnamed_files(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL))
}

fn hidden(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    Ok(path.with_file_name(format!(".{}.{}", name.to_string_lossy(), process::id())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn bundle() -> Bundle {
        Bundle {
            dir: "top".to_owned(),
            files: vec![("a/b.txt".to_owned(), "hello\n".to_owned())],
            missing: Vec::new(),
            time: SystemTime::UNIX_EPOCH,
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn file_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar.gz");
        drop(Output::open(&path, false).unwrap());
        assert_eq!(names(dir.path()), [""; 0]);
        let size = Output::open(&path, false).unwrap().finish(&bundle(), &path).unwrap();
        let written = fs::metadata(&path).unwrap();
        assert_eq!((written.len(), written.permissions().mode() & 0o7777), (size, MODE));
        assert_eq!(names(dir.path()), ["x.tar.gz"]);
        let error = Output::open(&path, false).unwrap_err();
        assert!(format!("{error:#}").contains("--overwrite"), "{error:#}");
    }

    #[test]
    fn file_that_is_made_meanwhile_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar.gz");
        let output = Output::open(&path, false).unwrap();
        fs::write(&path, "mine").unwrap();
        let error = output.finish(&bundle(), &path).unwrap_err();
        assert!(format!("{error:#}").contains("exists"), "{error:#}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert_eq!(names(dir.path()), ["x.tar.gz"]);
    }

    #[test]
    fn link_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("x.tar.gz"), dir.path().join("precious"));
        fs::write(&target, "mine").unwrap();
        symlink(&target, &path).unwrap();
        assert!(Output::open(&path, false).is_err());
        Output::open(&path, true).unwrap().finish(&bundle(), &path).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "mine");
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(names(dir.path()), ["precious", "x.tar.gz"]);
    }
}
