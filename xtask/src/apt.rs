//! Debian packages beside the system's: apt with package lists of our own, which installs nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::process::run;

/// Where Debian keeps its archive's keys.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt, with everything that it writes below one directory.
pub(crate) struct Apt {
    scratch: PathBuf,
}

impl Apt {
    /// Reads the lists of `suites`, each an archive of deb.debian.org and a suite of it: `debian` and
    /// `sid`. Downloads go into `scratch`.
    pub(crate) fn update<'a>(
        scratch: &Path,
        suites: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        if !Path::new(KEYRING).is_file() {
            bail!("find {KEYRING}: install the package debian-archive-keyring");
        }
        for dir in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(scratch.join(dir))
                .with_context(|| format!("create {dir} in {}", scratch.display()))?;
        }
        let apt = Self { scratch: scratch.to_owned() };
        let lines = suites.into_iter().map(|(archive, suite)| {
            format!(
                "deb [signed-by={KEYRING} lang=none target=Packages] \
                 http://deb.debian.org/{archive} {suite} main\n"
            )
        });
        let sources = apt.sources();
        fs::write(&sources, lines.collect::<String>())
            .with_context(|| format!("write {}", sources.display()))?;
        run(apt.command("apt-get").args(["--quiet", "--error-on=any", "update"]))
            .context("read the package lists of deb.debian.org")?;
        Ok(apt)
    }

    /// `apt-get` or `apt-cache`, with our lists alone.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.scratch);
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.sources()),
            ("Dir::Etc::sourceparts", PathBuf::from("-")),
            ("Dir::State::lists", self.scratch.join("lists")),
            // Else what the system has installed is listed, too.
            ("Dir::State::status", PathBuf::from("/dev/null")),
            ("Dir::Cache", self.scratch.join("cache")),
            // The download user of apt cannot enter a home directory.
            ("APT::Sandbox::User", PathBuf::from("root")),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        command
    }

    /// Downloads packages, each by its name or as `NAME=VERSION`; apt checks their checksums.
    pub(crate) fn download(&self, packages: &[String]) -> Result<()> {
        run(self.command("apt-get").args(["--quiet", "download"]).args(packages))
    }

    fn sources(&self) -> PathBuf {
        self.scratch.join("sources.list")
    }
}
