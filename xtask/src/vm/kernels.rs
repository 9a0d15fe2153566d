//! Debian's kernels: found in its package lists, downloaded, and unpacked.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    apt::Apt,
    process::{read, run},
};

/// Archives and suites that have kernels: 5.10, 6.1, 6.12, and the newest.
const SUITES: &[(&str, &str)] = &[
    ("debian", "bookworm"),
    ("debian", "bookworm-backports"),
    ("debian-security", "bookworm-security"),
    ("debian", "trixie"),
    ("debian-security", "trixie-security"),
    ("debian", "sid"),
];

/// The smallest flavor, signed: the unsigned ones are named otherwise.
const FLAVOR: &str = "-cloud-amd64";

/// An unpacked kernel.
pub(crate) struct Kernel {
    /// `6.1.0-48-cloud-amd64`
    pub(crate) release: String,
    dir: PathBuf,
}

impl Kernel {
    /// The bootable image; `None` where the packages have not brought it yet.
    pub(crate) fn image(&self) -> Option<PathBuf> {
        let release = &self.release;
        // The second since 7.0.
        [format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")]
            .into_iter()
            .map(|path| self.dir.join(path))
            .find(|image| image.is_file())
    }

    /// The file of a module, compressed or not; `None` where it is built in, or missing.
    pub(crate) fn module(&self, name: &str) -> Result<Option<PathBuf>> {
        // Newer packages have moved it below /usr.
        for above in ["lib/modules", "usr/lib/modules"] {
            let modules = self.dir.join(above).join(&self.release).join("kernel");
            if let Some(found) = find_module(&modules, name)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

fn find_module(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    if !dir.is_dir() {
        return Ok(None);
    }
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find_module(&path, name)? {
                return Ok(Some(found));
            }
        } else if path
            .file_name()
            .and_then(|file| file.to_str()?.strip_prefix(name))
            .is_some_and(|rest| rest.starts_with(".ko"))
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Brings Debian's newest kernel of each of `versions` (`6.1`, `7`) below `dir`; what is there already
/// is not downloaded again.
pub(crate) fn fetch(versions: &[String], dir: &Path) -> Result<Vec<Kernel>> {
    let scratch = dir.join("apt");
    let apt = Apt::update(&scratch, SUITES.iter().copied())?;
    let names = read(apt.command("apt-cache").args(["pkgnames", "linux-image-"]))?;
    let names: Vec<&str> = names.lines().collect();
    versions.iter().map(|version| fetch_one(&apt, version, &names, dir)).collect()
}

fn fetch_one(apt: &Apt, version: &str, names: &[&str], dir: &Path) -> Result<Kernel> {
    let package = choose(version, names).with_context(|| {
        let suites: Vec<_> = SUITES.iter().map(|(_, suite)| *suite).collect();
        format!("find linux-image-{version}*{FLAVOR} in Debian's {}", suites.join(", "))
    })?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let kernel = Kernel { dir: dir.join(&release), release };
    if kernel.image().is_some() {
        eprintln!("vm: {package} is there");
        return Ok(kernel);
    }
    eprintln!("vm: fetching {package} …");
    let depends = read(apt.command("apt-cache").args(["depends", "--important", package]))?;
    let mut packages = vec![package.to_owned()];
    packages.extend(parts(&depends, &kernel.release));
    let debs = dir.join("debs");
    fs::create_dir_all(&debs).with_context(|| format!("create {}", debs.display()))?;
    let mut download = apt.command("apt-get");
    run(download.current_dir(&debs).args(["--quiet", "download"]).args(&packages))?;
    // Under another name until it is whole.
    let staging = dir.join("new");
    for stale in [&staging, &kernel.dir].into_iter().filter(|stale| stale.exists()) {
        fs::remove_dir_all(stale).with_context(|| format!("remove {}", stale.display()))?;
    }
    for deb in fs::read_dir(&debs).with_context(|| format!("list {}", debs.display()))? {
        run(Command::new("dpkg").arg("--extract").arg(deb?.path()).arg(&staging))?;
    }
    fs::rename(&staging, &kernel.dir)
        .with_context(|| format!("create {}", kernel.dir.display()))?;
    fs::remove_dir_all(&debs).with_context(|| format!("remove {}", debs.display()))?;
    ensure!(
        kernel.image().is_some(),
        "find the image of {release} in {packages:?}",
        release = kernel.release
    );
    Ok(kernel)
}

/// The newest of the packages that have a kernel of this version.
fn choose<'a>(version: &str, names: &[&'a str]) -> Option<&'a str> {
    let is_right = |name: &&&str| {
        let rest = name
            .strip_prefix("linux-image-")
            .and_then(|name| name.strip_suffix(FLAVOR)?.strip_prefix(version));
        // 6.1 is not 6.12.
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    names.iter().filter(is_right).max_by_key(|name| numbers(name)).copied()
}

/// All numbers in it: `6.1.0-48` comes after `6.1.0-9`.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The packages of the same kernel among what `apt-cache depends` lists: since 7.0 the image and the
/// modules are in packages of their own.
fn parts(depends: &str, release: &str) -> Vec<String> {
    let names =
        depends.lines().filter_map(|line| line.split_once("Depends: ")).map(|(_, n)| n.trim());
    let ours = names.filter(|name| {
        ["linux-binary-", "linux-modules-"]
            .iter()
            .any(|prefix| name.strip_prefix(prefix) == Some(release))
    });
    ours.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::{choose, parts};

    #[test]
    fn the_newest_signed_kernel_of_the_version_is_chosen() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-48-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64-unsigned",
            "linux-image-6.1.0-49-amd64",
            "linux-image-6.12.95+deb12-cloud-amd64",
            "linux-image-cloud-amd64",
        ];
        assert_eq!(choose("6.1", &names), Some("linux-image-6.1.0-48-cloud-amd64"));
        assert_eq!(choose("6.12", &names), Some("linux-image-6.12.95+deb12-cloud-amd64"));
        assert_eq!(choose("6", &names), Some("linux-image-6.12.95+deb12-cloud-amd64"));
        assert_eq!(choose("5.10", &names), None);
    }

    #[test]
    fn a_kernel_in_parts_is_fetched_with_them() {
        let depends = "linux-image-7.2.13-cloud-amd64\n  PreDepends: linux-base\n \
                       |Depends: dracut\n  Depends: linux-base-7.2.13-cloud-amd64\n  \
                       Depends: linux-binary-7.2.13-cloud-amd64\n  \
                       Depends: linux-modules-7.2.13-cloud-amd64\n";
        assert_eq!(
            parts(depends, "7.2.13-cloud-amd64"),
            ["linux-binary-7.2.13-cloud-amd64", "linux-modules-7.2.13-cloud-amd64"]
        );
        assert!(parts("x\n  Depends: kmod\n  Depends: linux-base\n", "6.1.0").is_empty());
    }
}
