//! Archives whose every byte is known, and the files that they are made of.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result};

/// A directory as an archive: in order, everything root's, and of one time.
pub(super) fn archive(root: &Path, epoch: u64) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, root, Path::new(""), epoch)
        .with_context(|| format!("archive {}", root.display()))?;
    archive.into_inner().context("finish an archive")
}

fn append(
    archive: &mut tar::Builder<Vec<u8>>,
    root: &Path,
    below: &Path,
    epoch: u64,
) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(root.join(below))?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = below.join(entry.file_name());
        let metadata = entry.path().symlink_metadata()?;
        let mut header = tar::Header::new_gnu();
        header.set_mtime(epoch);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mode(if metadata.is_file() && metadata.permissions().mode() & 0o100 == 0 {
            0o644
        } else {
            0o755
        });
        if metadata.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            archive.append_data(&mut header, path.join(""), std::io::empty())?;
            append(archive, root, &path, epoch)?;
        } else if metadata.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, &path, fs::read_link(entry.path())?)?;
        } else {
            header.set_size(metadata.len());
            archive.append_data(&mut header, &path, fs::File::open(entry.path())?)?;
        }
    }
    Ok(())
}

pub(super) fn put(file: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    fs::write(file, bytes).with_context(|| format!("write {}", file.display()))
}

pub(super) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{collections::BTreeMap, io::Read as _, os::unix::fs::symlink};

    use super::*;

    /// What is in an archive, whose times must all be 7 and whose owner root.
    pub(in crate::dist) fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            assert_eq!((entry.header().mtime().unwrap(), entry.header().uid().unwrap()), (7, 0));
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    #[test]
    fn archive_does_not_depend_on_when_and_by_whom_files_were_made() {
        let make = |mode: u32| {
            let dir = tempfile::tempdir().unwrap();
            put(&dir.path().join("b/tool"), b"tool").unwrap();
            put(&dir.path().join("a"), b"text").unwrap();
            let mode = fs::Permissions::from_mode(mode);
            fs::set_permissions(dir.path().join("b/tool"), mode).unwrap();
            symlink("b/tool", dir.path().join("link")).unwrap();
            archive(dir.path(), 7).unwrap()
        };
        let made = make(0o700);
        assert_eq!(made, make(0o755));
        let names: Vec<String> = files(&made).into_keys().collect();
        assert_eq!(names, ["a", "b/", "b/tool", "link"]);
        assert_ne!(made, make(0o644));
    }
}
