//! The file system that a kernel boots with: busybox, our programs, what they call, and an init script.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::kernels::Kernel;
use crate::process::{find, run};

/// What the tests call.
const PROGRAMS: [&str; 4] = ["ip", "ss", "tc", "bpftool"];

/// What Debian's kernels have as modules, in an order in which they can be loaded.
const MODULES: [&str; 7] = ["llc", "stp", "bridge", "veth", "dummy", "sch_ingress", "cls_bpf"];

/// What the init script says before and after each command; nothing else that is printed begins so.
pub(super) const BEGIN: &str = "vm-begin: ";
pub(super) const STATUS: &str = "vm-status: ";
pub(super) const END: &str = "vm-end";

/// A directory that becomes an initramfs.
pub(super) struct Initramfs {
    root: PathBuf,
}

impl Initramfs {
    /// Makes the directory anew, with busybox and [`PROGRAMS`].
    pub(super) fn new(root: &Path) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(root).with_context(|| format!("remove {}", root.display()))?;
        }
        let this = Self { root: root.to_owned() };
        this.add_program(&located("busybox")?, Path::new("bin/busybox"))?;
        for name in PROGRAMS {
            this.add_program(&located(name)?, &Path::new("sbin").join(name))?;
        }
        Ok(this)
    }

    /// Adds a program of ours at its own path, without debug information.
    pub(super) fn add_ours(&self, program: &Path) -> Result<()> {
        let to = self.place(program)?;
        run(Command::new("strip").arg("-o").arg(&to).arg(program))?;
        self.add_libraries(program)
    }

    fn add_program(&self, program: &Path, to: &Path) -> Result<()> {
        copy(program, &self.place(to)?)?;
        self.add_libraries(program)
    }

    /// The shared libraries that the dynamic linker finds for it here, at the same paths.
    fn add_libraries(&self, program: &Path) -> Result<()> {
        let output = Command::new("ldd").arg(program).output().context("start ldd")?;
        // A static program is an error to it.
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            copy(library, &self.place(library)?)?;
        }
        Ok(())
    }

    /// Adds those of [`MODULES`] that the kernel has as modules.
    pub(super) fn add_modules(&self, kernel: &Kernel) -> Result<()> {
        for (n, name) in MODULES.iter().enumerate() {
            let Some(module) = kernel.module(name)? else { continue };
            let to = self.place(Path::new(&format!("modules/{n}-{name}.ko")))?;
            let extension = module.extension().and_then(|extension| extension.to_str());
            let unpack = match extension {
                Some("xz") => "xz",
                Some("zst") => "zstd",
                _ => {
                    copy(&module, &to)?;
                    continue;
                }
            };
            let out = File::create(&to).with_context(|| format!("create {}", to.display()))?;
            let status = Command::new(unpack).arg("-dc").arg(&module).stdout(out).status();
            let status = status.with_context(|| format!("start {unpack}"))?;
            ensure!(status.success(), "unpack {}: {status}", module.display());
        }
        Ok(())
    }

    /// Writes the init script, which runs `commands`, each a line of the shell, and packs it all into
    /// `archive`.
    pub(super) fn pack(&self, commands: &[String], archive: &Path) -> Result<()> {
        let init = self.place(Path::new("init"))?;
        fs::write(&init, init_script(commands))
            .and_then(|()| fs::set_permissions(&init, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("write {}", init.display()))?;
        let list = read_tree(&self.root)?;
        let out = File::create(archive).with_context(|| format!("create {}", archive.display()))?;
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "--create", "--format=newc", "--owner=0:0"])
            .current_dir(&self.root)
            .stdin(Stdio::piped())
            .stdout(out)
            .spawn()
            .context("start cpio")?;
        let mut stdin = cpio.stdin.take().context("write to cpio")?;
        stdin.write_all(list.as_bytes()).context("write to cpio")?;
        drop(stdin);
        let status = cpio.wait().context("wait for cpio")?;
        ensure!(status.success(), "pack {}: cpio: {status}", archive.display());
        Ok(())
    }

    /// The path below the root, with its directory made.
    fn place(&self, path: &Path) -> Result<PathBuf> {
        let to = self.root.join(path.strip_prefix("/").unwrap_or(path));
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(to)
    }
}

fn located(program: &str) -> Result<PathBuf> {
    find(program).with_context(|| format!("find {program} in PATH"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("copy {}", from.display()))
}

/// The paths in what ldd prints: `libc.so.6 => /lib/libc.so.6 (0x…)`, `/lib64/ld.so (0x…)`.
fn libraries(ldd: &str) -> impl Iterator<Item = &Path> {
    let words = ldd.lines().filter_map(|line| line.split_whitespace().find(|w| w.starts_with('/')));
    words.map(Path::new)
}

/// All paths below `root`, a line each, directories before what is in them.
fn read_tree(root: &Path) -> Result<String> {
    let mut list = String::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let path = entry?.path();
            let name = path.strip_prefix(root).unwrap_or(&path);
            list.push_str(
                name.to_str().with_context(|| format!("{} is not UTF-8", name.display()))?,
            );
            list.push('\n');
            if path.is_dir() {
                left.push(path);
            }
        }
    }
    Ok(list)
}

/// The first process: mounts what the tests expect, runs the commands, and switches the machine off.
fn init_script(commands: &[String]) -> String {
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         /bin/busybox mkdir -p /proc /sys /dev /run /tmp /bin /sbin /etc\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/sbin:/bin HOME=/tmp RUST_BACKTRACE=0\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t devtmpfs dev /dev\n\
         mount -t tmpfs run /run\n\
         mount -t tmpfs tmp /tmp\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mount -t cgroup2 cgroup /sys/fs/cgroup\n\
         for module in /modules/*; do insmod $module; done\n\
         ip link set lo up\n\
         ulimit -n 65536\n",
    );
    script.extend(commands.iter().map(|command| step(command)));
    script += &format!("echo; echo {END}\npoweroff -f\n");
    script
}

/// Runs a command, and says how it ended.
fn step(command: &str) -> String {
    format!("echo; echo '{BEGIN}{command}'\n{command}\nstatus=$?; echo; echo \"{STATUS}$status\"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let ldd = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let found: Vec<_> = libraries(ldd).collect();
        assert_eq!(
            found,
            [Path::new("/lib/x/libc.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
        assert_eq!(libraries("\tnot a dynamic executable\n").count(), 0);
    }

    #[test]
    fn each_command_says_how_it_ended() {
        for (command, status) in [("true", 0), ("false", 1), ("echo BUG: | ( ! grep BUG: )", 1)] {
            let ran = Command::new("sh").args(["-c", &step(command)]).output().unwrap();
            let told = String::from_utf8(ran.stdout).unwrap();
            assert!(told.starts_with(&format!("\n{BEGIN}{command}\n")), "{told}");
            assert!(told.ends_with(&format!("\n{STATUS}{status}\n")), "{told}");
        }
    }
}
