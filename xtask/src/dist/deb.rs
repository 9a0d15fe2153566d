//! The Debian package. Its texts are in `deploy/debian`.
//! Source: deb(5), and Debian Policy 4.6, chapters 3 to 6 and 12.

use std::{fs, io::Write as _, os::unix::fs::symlink, path::Path};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};

use super::{
    Machine, ROOT, VERSION,
    archive::{archive, put, remove},
    date, executable, read_source,
};

/// The texts.
const SOURCE: &str = "deploy/debian";
const PROGRAM: &str = "usr/bin/redirect-agent";
const DOCUMENTS: &str = "usr/share/doc/redirect-agent";
const MAN: &str = "usr/share/man/man1";
const SETTINGS: &str = "etc/default/redirect-agent";
/// What dpkg calls when it installs, upgrades or removes.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];
/// Files of [`SOURCE`] that are installed as they are, and where.
const TEXTS: [(&str, &str); 5] = [
    ("redirect-agent.service", "usr/lib/systemd/system/redirect-agent.service"),
    ("redirect-agent.default", SETTINGS),
    ("completions/redirect-agent.bash", "usr/share/bash-completion/completions/redirect-agent"),
    ("completions/redirect-agent.fish", "usr/share/fish/vendor_completions.d/redirect-agent.fish"),
    ("completions/_redirect-agent", "usr/share/zsh/vendor-completions/_redirect-agent"),
];

/// The package; what is in it is put together in `scratch`.
pub(super) fn package(
    scratch: &Path,
    machine: Machine,
    binary: &[u8],
    epoch: u64,
) -> Result<Vec<u8>> {
    remove(scratch)?;
    let data = scratch.join("data");
    fill(&data, binary, epoch)?;
    let about = scratch.join("control");
    let control = control(&read("control")?, machine, size(&data)?)?;
    put(&about.join("control"), control.as_bytes())?;
    put(&about.join("conffiles"), format!("/{SETTINGS}\n").as_bytes())?;
    for script in SCRIPTS {
        put(&about.join(script), read(script)?.as_bytes())?;
        executable(&about.join(script))?;
    }
    let members = [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.gz", gzip(&archive(&about, epoch)?)?),
        ("data.tar.gz", gzip(&archive(&data, epoch)?)?),
    ];
    remove(scratch)?;
    let mut package = ar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = ar::Header::new(name.into(), u64::try_from(bytes.len())?);
        header.set_mtime(epoch);
        header.set_mode(0o100_644);
        package.append(&header, &bytes[..]).with_context(|| format!("archive {name}"))?;
    }
    package.into_inner().context("finish the package")
}

/// What is installed.
fn fill(data: &Path, binary: &[u8], epoch: u64) -> Result<()> {
    put(&data.join(PROGRAM), binary)?;
    executable(&data.join(PROGRAM))?;
    symlink("redirect-agent", data.join("usr/bin/kubectl-redirect"))
        .context("link the kubectl plugin")?;
    for (text, path) in TEXTS {
        put(&data.join(path), read(text)?.as_bytes())?;
    }
    let manifests = data.join("etc/redirect-agent/manifests");
    fs::create_dir_all(&manifests).with_context(|| format!("create {}", manifests.display()))?;

    let man = Path::new(ROOT).join(SOURCE).join("man");
    for page in fs::read_dir(&man).with_context(|| format!("read {}", man.display()))? {
        let page = page?.path();
        let text = fs::read(&page).with_context(|| format!("read {}", page.display()))?;
        let name = page.file_name().unwrap_or_default().to_string_lossy().into_owned();
        put(&data.join(MAN).join(format!("{name}.gz")), &gzip(&text)?)?;
    }
    symlink("redirect-agent-cluster.1.gz", data.join(MAN).join("kubectl-redirect.1.gz"))
        .context("link the plugin's man page")?;

    let documents = data.join(DOCUMENTS);
    put(&documents.join("copyright"), copyright()?.as_bytes())?;
    put(&documents.join("changelog.gz"), &gzip(changelog(epoch)?.as_bytes())?)?;
    put(&documents.join("CHANGELOG.md.gz"), &gzip(read_source("CHANGELOG.md")?.as_bytes())?)
}

/// The control file: what `deploy/debian/control` says, and what depends on the build.
fn control(text: &str, machine: Machine, bytes: u64) -> Result<String> {
    let (first, rest) = text.split_once('\n').context("read the control file")?;
    Ok(format!(
        "{first}\nVersion: {VERSION}\nArchitecture: {}\nInstalled-Size: {}\n{rest}",
        machine.debian(),
        bytes.div_ceil(1024)
    ))
}

/// The copyright file with the text of the license that Debian has no copy of at hand.
fn copyright() -> Result<String> {
    let license = read_source("LICENSES/BSD-3-Clause.txt")?;
    let indented = license.trim_end().lines().map(|line| match line.trim_end() {
        "" => " .".to_owned(),
        line => format!(" {line}"),
    });
    let indented: Vec<String> = indented.collect();
    Ok(read("copyright")?.replace("@BSD@", &indented.join("\n")))
}

/// Debian's changelog, which says of each version only where the real one is.
fn changelog(epoch: u64) -> Result<String> {
    let control = read("control")?;
    let maintainer = control.lines().find_map(|line| line.strip_prefix("Maintainer: "));
    Ok(format!(
        "redirect-agent ({VERSION}) stable; urgency=medium\n\n  \
         * See /{DOCUMENTS}/CHANGELOG.md.gz.\n\n -- {}  {}\n",
        maintainer.context("find the maintainer in the control file")?,
        date(epoch, "+%a, %d %b %Y %H:%M:%S %z")?
    ))
}

/// How many bytes of files are in a directory.
fn size(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        let metadata = path.symlink_metadata()?;
        sum += if metadata.is_dir() { size(&path)? } else { metadata.len() };
    }
    Ok(sum)
}

/// Without a time and a name.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
    gzip.write_all(bytes).and_then(|()| gzip.finish()).context("compress")
}

/// One of the texts.
fn read(text: &str) -> Result<String> {
    read_source(&format!("{SOURCE}/{text}"))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use flate2::read::GzDecoder;

    use super::*;
    use crate::dist::archive::tests::files;

    fn unzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        GzDecoder::new(bytes).read_to_end(&mut out).unwrap();
        out
    }

    /// A package's members, in their order.
    fn members(package: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut archive = ar::Archive::new(package);
        let mut members = Vec::new();
        while let Some(entry) = archive.next_entry() {
            let mut entry = entry.unwrap();
            assert_eq!((entry.header().mtime(), entry.header().uid()), (7, 0));
            let name = String::from_utf8(entry.header().identifier().to_vec()).unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            members.push((name, content));
        }
        members
    }

    fn text(files: &BTreeMap<String, Vec<u8>>, name: &str) -> String {
        let bytes = files.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", files.keys()));
        String::from_utf8(bytes.clone()).unwrap()
    }

    #[test]
    fn package_has_the_program_its_service_and_its_documents() {
        let dir = tempfile::tempdir().unwrap();
        let package = package(&dir.path().join("deb"), Machine::Arm64, b"program", 7).unwrap();
        let members = members(&package);
        let names: Vec<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["debian-binary", "control.tar.gz", "data.tar.gz"]);
        assert_eq!(members[0].1, b"2.0\n");

        let about = files(&unzip(&members[1].1));
        let control = text(&about, "control");
        for field in ["Package: redirect-agent", "Architecture: arm64", "Section: net"] {
            assert!(control.lines().any(|line| line == field), "{control}");
        }
        assert!(control.contains(&format!("\nVersion: {VERSION}\n")), "{control}");
        assert_eq!(text(&about, "conffiles"), "/etc/default/redirect-agent\n");
        for script in SCRIPTS {
            assert!(text(&about, script).starts_with("#!/bin/sh\n"));
        }

        let data = files(&unzip(&members[2].1));
        assert_eq!(text(&data, PROGRAM), "program");
        // A link has no content of its own.
        assert_eq!(text(&data, "usr/bin/kubectl-redirect"), "");
        let unit = text(&data, "usr/lib/systemd/system/redirect-agent.service");
        assert!(unit.contains(&format!("\nEnvironmentFile=-/{SETTINGS}\n")), "{unit}");
        assert!(unit.contains(&format!("\nExecStart=/{PROGRAM} run ")), "{unit}");
        let page = unzip(&data["usr/share/man/man1/redirect-agent-run.1.gz"]);
        assert!(String::from_utf8(page).unwrap().contains("beside"));
        let copyright = text(&data, "usr/share/doc/redirect-agent/copyright");
        assert!(copyright.contains("\n Redistribution and use"), "{copyright}");
        assert!(!copyright.contains("@BSD@"), "{copyright}");
        let changelog = unzip(&data["usr/share/doc/redirect-agent/changelog.gz"]);
        let changelog = String::from_utf8(changelog).unwrap();
        assert!(changelog.ends_with("  Thu, 01 Jan 1970 00:00:07 +0000\n"), "{changelog}");
    }

    #[test]
    fn size_is_in_kibibytes_rounded_up() {
        let control = |bytes| control("Package: p\nSection: net\n", Machine::Amd64, bytes).unwrap();
        let expected = format!(
            "Package: p\nVersion: {VERSION}\nArchitecture: amd64\nInstalled-Size: 2\nSection: net\n"
        );
        assert_eq!(control(1025), expected);
        assert!(control(1024).contains("Installed-Size: 1\n"));
    }
}
