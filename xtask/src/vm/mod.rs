//! `cargo xtask test --vm 6.1,6.12`: the kernel tests on Debian's kernels, in qemu, without KVM or root.

mod initramfs;
mod kernels;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    initramfs::{BEGIN, END, Initramfs, STATUS},
    kernels::Kernel,
};
use crate::{
    process::{cargo, read},
    setup,
    test::Summary,
};

/// The test programs that run there.
const TESTS: [&str; 3] = ["preflight", "bytecode", "datapath"];

/// The scenarios of the datapath that run there, by parts of their names: emulated processors are slow,
/// and these have every program, map and link at work, in either family.
const SCENARIOS: [&str; 9] = [
    "addresses::ipv4::call_between_enrolled_pods_passes_both_proxies",
    "addresses::ipv6::call_between_enrolled_pods_passes_both_proxies",
    "enrollment::ipv4::connections_to_others_survive_enrollment",
    "enrollment::ipv6::connections_from_others_survive_enrollment",
    "enrollment::ipv4::detaching_restores_everything",
    "restart::ipv6::app_restarts_while_mesh_connections_to_its_port_are_open",
    "no_proxy::ipv4::outbound_calls_are_refused_without_a_proxy",
    "no_proxy::ipv6::inbound_calls_are_refused_without_a_proxy",
    "clsact::ipv4",
];

/// Fails if the kernel has complained.
const KERNEL_IS_SOUND: &str = "dmesg | ( ! grep -e BUG: -e WARNING: -e Oops )";

/// How long one kernel may take: several times what it took on two cores of 2024.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// How many of the last lines are shown of a kernel that did not get to the end.
const LAST_LINES: usize = 30;

/// Builds the tests, and runs them on the newest kernel of each of `versions`.
pub(crate) fn run_all(versions: &[String], harness: &[OsString]) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "boot a kernel: only x86-64 is known here");
    setup::for_building(setup::Report::Changes)?;
    setup::for_vm(setup::Report::Changes)?;
    let tests = build()?;
    let commands = commands(&tests, harness)?;
    let kernels = {
        let (tools, _lock) = setup::lock_tools()?;
        let dir = tools.join("kernels");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        kernels::fetch(versions, &dir)?
    };
    let mut failed = Vec::new();
    for kernel in kernels {
        let started = Instant::now();
        let outcome = boot(&kernel, &tests, &commands);
        let took = started.elapsed().as_secs();
        let release = &kernel.release;
        match outcome {
            Ok(summary) if summary.failures.is_empty() => {
                eprintln!("vm: {release}: {summary} in {took} s");
            }
            Ok(summary) => {
                for name in &summary.failures {
                    eprintln!("vm: {release}: failed: {name}");
                }
                eprintln!("vm: {release}: {summary} in {took} s");
                failed.push(release.clone());
            }
            Err(error) => {
                eprintln!("vm: {release}: {error:#}");
                failed.push(release.clone());
            }
        }
    }
    ensure!(failed.is_empty(), "run the kernel tests: not all passed on {}", failed.join(", "));
    Ok(())
}

/// Builds [`TESTS`] and what they run; the paths of the test programs by their names.
fn build() -> Result<BTreeMap<String, PathBuf>> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--locked", "--no-run", "--message-format=json"]);
    for test in TESTS {
        command.args(["--test", test]);
    }
    command.stderr(Stdio::inherit());
    let messages = read(&mut command).context("build the tests")?;
    let mut found = BTreeMap::new();
    for line in messages.lines() {
        let message: serde_json::Value =
            serde_json::from_str(line).context("read cargo's messages")?;
        let (name, program) = (&message["target"]["name"], &message["executable"]);
        if let (Some(name), Some(program)) = (name.as_str(), program.as_str())
            && (TESTS.contains(&name) || name == "redirect-agent")
        {
            found.insert(name.to_owned(), PathBuf::from(program));
        }
    }
    for name in TESTS.iter().chain(&["redirect-agent"]) {
        ensure!(found.contains_key(*name), "find the program {name} in cargo's messages");
    }
    Ok(found)
}

/// What the kernel's first process runs: the selection, or, with arguments for the test programs, all
/// scenarios that those choose.
fn commands(tests: &BTreeMap<String, PathBuf>, harness: &[OsString]) -> Result<Vec<String>> {
    let mut commands = vec![format!("{} check", tests["redirect-agent"].display())];
    // One at a time: the emulated machine is slow enough for the deadlines of the scenarios.
    let run = |name: &str, selection: &str| {
        format!("{} --test-threads=1 {selection}", tests[name].display())
    };
    if !harness.is_empty() {
        let words: Option<Vec<&str>> = harness.iter().map(|word| word.to_str()).collect();
        let words = words.context("pass on arguments that are not UTF-8")?;
        let quote = words.iter().all(|word| !word.contains(['\'', '"', '$', '\\', ' ']));
        ensure!(quote, "pass on {words:?}: no quotes, spaces, $ or \\ can be in them");
        commands.extend(TESTS.map(|name| run(name, &words.join(" "))));
    } else {
        let all = read(Command::new(&tests["datapath"]).arg("--list"))?;
        for scenario in SCENARIOS {
            ensure!(all.contains(scenario), "select {scenario}: there is no such scenario");
        }
        let selection = |name| if name == "datapath" { SCENARIOS.join(" ") } else { String::new() };
        commands.extend(TESTS.map(|name| run(name, &selection(name))));
    }
    commands.push(KERNEL_IS_SOUND.to_owned());
    Ok(commands)
}

/// Boots a kernel, which runs the commands; an error when it did not run all of them to their ends.
fn boot(
    kernel: &Kernel,
    tests: &BTreeMap<String, PathBuf>,
    commands: &[String],
) -> Result<Summary> {
    let image = kernel.image().context("find the kernel's image")?;
    let dir = Path::new("target/vm").join(&kernel.release);
    let initramfs = Initramfs::new(&dir.join("root"))?;
    tests.values().try_for_each(|program| initramfs.add_ours(program))?;
    initramfs.add_modules(kernel)?;
    let archive = dir.join("initramfs.cpio");
    initramfs.pack(commands, &archive)?;
    eprintln!("vm: booting {} …", kernel.release);
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "2G"])
        // cmpxchg16b as TCG emulates it corrupts the kernel's slab lists.
        .args(["-cpu", "qemu64,-cx16"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-serial", "stdio"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(&archive)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let console = qemu.stdout.take().context("read from qemu")?;
    let read = follow(console, &kernel.release, commands.len(), &mut qemu);
    // Killed, where it has not ended by itself.
    let _ended = qemu.kill();
    qemu.wait().context("wait for qemu")?;
    read
}

/// Passes on what the kernel's console shows, and sums it up.
fn follow(
    console: impl Read + Send + 'static,
    release: &str,
    commands: usize,
    qemu: &mut Child,
) -> Result<Summary> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + LIMIT;
    let mut console = Console::default();
    while !console.ended {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => console.add(release, line),
            Err(RecvTimeoutError::Timeout) => {
                let _ended = qemu.kill();
                bail!("run the tests: not at the end after {} s", LIMIT.as_secs());
            }
            Err(RecvTimeoutError::Disconnected) => {
                let last = console.last.join("\n  ");
                bail!("run the tests: the kernel ended before them; its last words:\n  {last}");
            }
        }
    }
    ensure!(console.statuses == commands, "run the tests: {} of {commands} ran", console.statuses);
    Ok(console.summary)
}

/// What the console has shown.
#[derive(Default)]
struct Console {
    summary: Summary,
    /// The command that runs.
    command: String,
    /// How many have ended.
    statuses: usize,
    ended: bool,
    last: Vec<String>,
}

impl Console {
    fn add(&mut self, release: &str, line: String) {
        if let Some(command) = line.strip_prefix(BEGIN) {
            command.clone_into(&mut self.command);
        } else if let Some(status) = line.strip_prefix(STATUS) {
            self.statuses += 1;
            if status != "0" {
                let command = self.command.split(' ').next().unwrap_or_default();
                let name = Path::new(command).file_name().unwrap_or_default().display();
                self.summary.failures.push(format!("{name}: exit status {status}"));
            }
        } else if line == END {
            self.ended = true;
        } else {
            self.summary.add(&line);
            // Before the first command it is the firmware, which moves the cursor about.
            if !self.command.is_empty() && !line.is_empty() {
                eprintln!("{release}: {line}");
            }
        }
        if self.last.len() == LAST_LINES {
            self.last.remove(0);
        }
        self.last.push(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(lines: &[&str]) -> Console {
        let mut console = Console::default();
        lines.iter().for_each(|line| console.add("6.1", (*line).to_owned()));
        console
    }

    #[test]
    fn a_command_that_fails_is_named() {
        let console = shown(&[
            "vm-begin: /t/redirect-agent check",
            "this node cannot run redirect-agent",
            "vm-status: 1",
            "vm-begin: /t/datapath x",
            "test a::b ... FAILED",
            "vm-status: 101",
            "vm-end",
        ]);
        assert!(console.ended);
        assert_eq!(console.statuses, 2);
        assert_eq!(
            console.summary.failures,
            ["redirect-agent: exit status 1", "a::b", "datapath: exit status 101"]
        );
    }

    #[test]
    fn a_kernel_that_ends_early_is_no_success() {
        let mut qemu = Command::new("true").spawn().unwrap();
        let early = "vm-begin: /t/x\nKernel panic\n".as_bytes();
        let error = follow(early, "6.1", 1, &mut qemu).unwrap_err().to_string();
        qemu.wait().unwrap();
        assert!(error.contains("Kernel panic"), "{error}");
    }
}
