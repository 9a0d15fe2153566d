//! `cargo xtask dist`: the static binary, and the image that it goes into.
//!
//! | in `target/dist` | what it is |
//! |---|---|
//! | `rootfs/` | the image's content; `deploy/Dockerfile` copies it |
//! | `redirect-agent-VERSION-ARCH.tar` | the same as an archive |
//! | `redirect-agent-VERSION-ARCH.oci.tar` | the image, as `ctr image import`, `podman load` and `skopeo` take it |
//! | `SHA256SUMS` | of the archives and the binary |
//!
//! Everything is the same, byte by byte, for the same source at the same path with the same
//! toolchains. Times are that of the commit, or `SOURCE_DATE_EPOCH`.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use oci_spec::image::{
    Arch, ConfigBuilder, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, RootFsBuilder, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::{
    process::{cargo, read, run},
    setup,
};

/// Where everything is put.
const DIST: &str = "target/dist";
/// Where it is built.
const BUILD: &str = "target/dist-build";
/// Where `--check` does both a second time.
const SECOND: &str = "target/dist-check";
/// The binary in the image.
const BINARY: &str = "usr/local/bin/redirect-agent";
/// What goes with it.
const LICENSES: [&str; 3] = ["LICENSE", "LICENSES/GPL-2.0-only.txt", "LICENSES/BSD-3-Clause.txt"];

/// Builds all of it; with `check` a second time, from nothing, and compares.
pub(crate) fn make(check: bool) -> Result<()> {
    setup::for_building(setup::Report::Changes)?;
    let epoch = epoch()?;
    let first = Path::new(DIST);
    let sums = build(Path::new(BUILD), epoch).and_then(|binary| assemble(first, &binary, epoch))?;
    if check {
        let second = Path::new(SECOND);
        remove(second)?;
        let again = build(&second.join("build"), epoch)
            .and_then(|binary| assemble(second, &binary, epoch))?;
        ensure!(sums == again, "build it twice: it differs\n{sums}\n{again}");
        remove(second)?;
        eprintln!("dist: a second build is the same, byte by byte");
    }
    eprint!("dist: {DIST}\n{sums}");
    Ok(())
}

/// Seconds since 1970 of the source.
fn epoch() -> Result<u64> {
    let epoch = match env::var("SOURCE_DATE_EPOCH") {
        Ok(epoch) => epoch,
        Err(_) => read(Command::new("git").args(["log", "-1", "--format=%ct"]))
            .context("find out how old the source is; without git, set SOURCE_DATE_EPOCH")?,
    };
    epoch.parse().with_context(|| format!("read SOURCE_DATE_EPOCH: {epoch:?}"))
}

/// The binary, which needs nothing of the system that it runs on: the CNI plugin is the same one, and
/// runs on any node.
fn build(target_dir: &Path, epoch: u64) -> Result<PathBuf> {
    let host = read(Command::new("rustc").arg("-vV"))?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("find the host's target in the output of `rustc -vV`")?;
    let here = env::current_dir().context("find this directory")?;
    let home = cargo_home()?;
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        // Backtraces keep the names of functions.
        "-Cstrip=debuginfo".to_owned(),
        format!("--remap-path-prefix={}=/source", here.display()),
        format!("--remap-path-prefix={}=/cargo", home.display()),
    ];
    run(cargo()
        .args(["build", "--release", "--locked", "--package", "redirect-agent", "--bins"])
        .args(["--target", host])
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_INCREMENTAL", "0")
        .env("SOURCE_DATE_EPOCH", epoch.to_string()))
    .context("build the static binary")?;
    let binary = target_dir.join(host).join("release/redirect-agent");
    let kind = read(Command::new("readelf").arg("-lW").arg(&binary))
        .context("look at the binary; readelf comes with the C linker (binutils)")?;
    if kind.lines().any(|line| line.trim_start().starts_with("INTERP")) {
        bail!("link {} statically: it asks for a dynamic loader", binary.display());
    }
    Ok(binary)
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(home) => Ok(home.into()),
        None => {
            Ok(PathBuf::from(env::var_os("HOME").context("find HOME: it is not set")?)
                .join(".cargo"))
        }
    }
}

/// Puts what is released of `binary` into `dist`; the checksums.
fn assemble(dist: &Path, binary: &Path, epoch: u64) -> Result<String> {
    let rootfs = dist.join("rootfs");
    remove(&rootfs)?;
    let bytes = fs::read(binary).with_context(|| format!("read {}", binary.display()))?;
    put(&rootfs.join(BINARY), &bytes)?;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(rootfs.join(BINARY), executable).context("make the binary executable")?;
    for license in LICENSES {
        let text = fs::read(license).with_context(|| format!("read {license}"))?;
        put(
            &rootfs.join("licenses").join(Path::new(license).file_name().unwrap_or_default()),
            &text,
        )?;
    }
    // As on nodes, so that a network namespace has both of its names in the container, too.
    for dir in ["run", "var"] {
        fs::create_dir_all(rootfs.join(dir)).with_context(|| format!("create /{dir}"))?;
    }
    symlink("../run", rootfs.join("var/run")).context("link /var/run to /run")?;

    let name = format!("redirect-agent-{}-{}", env!("CARGO_PKG_VERSION"), env::consts::ARCH);
    let archive = archive(&rootfs, epoch)?;
    let image = image(&dist.join("image"), &archive, epoch)?;
    let mut sums = String::new();
    for (file, bytes) in [
        (format!("{name}.tar"), &archive),
        (format!("{name}.oci.tar"), &image),
        (format!("rootfs/{BINARY}"), &bytes),
    ] {
        put(&dist.join(&file), bytes)?;
        sums += &format!("{:x}  {file}\n", Sha256::digest(bytes));
    }
    put(&dist.join("SHA256SUMS"), sums.as_bytes())?;
    Ok(sums)
}

/// A directory as an archive: in order, everything root's, and of one time.
fn archive(root: &Path, epoch: u64) -> Result<Vec<u8>> {
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

/// The image with this one layer: its layout in `dir`, as an archive.
/// Source: OCI image-spec 1.1, `image-layout.md`.
fn image(dir: &Path, layer: &[u8], epoch: u64) -> Result<Vec<u8>> {
    remove(dir)?;
    let blobs = dir.join("blobs/sha256");
    let blob = |bytes: &[u8], kind: MediaType| {
        let digest = format!("{:x}", Sha256::digest(bytes));
        put(&blobs.join(&digest), bytes)?;
        let descriptor = DescriptorBuilder::default()
            .media_type(kind)
            .digest(digest.parse::<Sha256Digest>()?)
            .size(u64::try_from(bytes.len())?);
        anyhow::Ok((descriptor, digest))
    };
    let arch = Arch::from(match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    });
    let (layer, diff_id) = blob(layer, MediaType::ImageLayer)?;
    let config = ImageConfigurationBuilder::default()
        .created(rfc3339(epoch)?)
        .architecture(arch)
        .os(Os::Linux)
        .config(
            ConfigBuilder::default()
                .entrypoint(vec![format!("/{BINARY}")])
                .env(vec!["PATH=/usr/local/bin".to_owned()])
                .build()?,
        )
        .rootfs(
            RootFsBuilder::default()
                .typ("layers")
                .diff_ids(vec![format!("sha256:{diff_id}")])
                .build()?,
        )
        .history(vec![])
        .build()?;
    let (config, _) = blob(&json(&config)?, MediaType::ImageConfig)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageManifest)
        .config(config.build()?)
        .layers(vec![layer.build()?])
        .build()?;
    let (manifest, _) = blob(&json(&manifest)?, MediaType::ImageManifest)?;
    let reference = format!("docker.io/library/redirect-agent:{}", env!("CARGO_PKG_VERSION"));
    let index = ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(vec![
            manifest
                .annotations([
                    // containerd's name for it, and everybody's.
                    ("io.containerd.image.name".to_owned(), reference),
                    (
                        "org.opencontainers.image.ref.name".to_owned(),
                        env!("CARGO_PKG_VERSION").to_owned(),
                    ),
                ])
                .build()?,
        ])
        .build()?;
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
    put(&dir.join("index.json"), &json(&index)?)?;
    put(&dir.join("oci-layout"), &json(&layout)?)?;
    let image = archive(dir, epoch)?;
    remove(dir)?;
    Ok(image)
}

/// The fields in the order of their names, whatever the maps that they are from.
fn json(document: &impl Serialize) -> Result<Vec<u8>> {
    let value = serde_json::to_value(document).context("write a document of the image")?;
    serde_json::to_vec(&value).context("write a document of the image")
}

fn rfc3339(epoch: u64) -> Result<String> {
    let mut date = Command::new("date");
    read(date.args(["--utc", "--date", &format!("@{epoch}"), "+%Y-%m-%dT%H:%M:%SZ"]))
}

fn put(file: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    fs::write(file, bytes).with_context(|| format!("write {}", file.display()))
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use serde_json::Value;

    use super::*;

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
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
    fn image_names_its_parts_by_their_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let layer = b"a layer".to_vec();
        let image = image(&dir.path().join("image"), &layer, 7).unwrap();
        let files = files(&image);
        let read = |name: &str| -> Value { serde_json::from_slice(&files[name]).unwrap() };
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let content = files[&format!("blobs/sha256/{digest}")].clone();
            assert_eq!(digest, format!("{:x}", Sha256::digest(&content)));
            assert_eq!(descriptor["size"], content.len());
            content
        };
        assert_eq!(read("oci-layout")["imageLayoutVersion"], "1.0.0");
        let manifest: Value =
            serde_json::from_slice(&blob(&read("index.json")["manifests"][0])).unwrap();
        assert_eq!(blob(&manifest["layers"][0]), layer);
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(config["config"]["Entrypoint"][0], "/usr/local/bin/redirect-agent");
        assert_eq!(config["created"], "1970-01-01T00:00:07Z");
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
