//! The preflight on the kernel that is running.

use std::{fs, path::PathBuf};

use redirect_agent::{
    cni::install::Dirs,
    output::Format,
    preflight::{self, Answer, Options},
};

fn options() -> Options {
    Options {
        bpffs_dir: PathBuf::from("/sys/fs/bpf/redirect-preflight-test"),
        cni: Dirs { conf: "/nonexistent".into(), bin: "/nonexistent".into() },
    }
}

#[test]
fn a_kernel_that_has_everything_passes_and_is_left_as_it_was() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it loads eBPF programs");
    let mounts = || {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().filter(|m| m.contains(" /sys/fs/bpf")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = mounts();
    let report = preflight::check(&options());
    println!("{}", report.print(Format::Table).unwrap());
    for check in &report.checks {
        // Where nothing has mounted bpffs yet, `run` will try.
        if check.required && check.name != "bpffs" {
            assert_eq!(check.answer, Answer::Yes, "{check:?}");
        }
    }
    assert!(report.ok);
    preflight::require(&options()).unwrap();
    assert_eq!(mounts(), before);
    assert!(!options().bpffs_dir.exists());
}

#[test]
fn json_says_the_same_as_the_table() {
    let report = preflight::check(&options());
    let json: serde_json::Value =
        serde_json::from_str(&report.print(Format::Json).unwrap()).unwrap();
    assert_eq!(json["ok"], report.ok);
    let table = report.print(Format::Table).unwrap();
    for check in json["checks"].as_array().unwrap() {
        assert!(table.contains(check["name"].as_str().unwrap()), "{check}");
        assert!(["yes", "no", "cannot-tell"].contains(&check["answer"].as_str().unwrap()));
    }
}

#[test]
fn run_says_what_is_missing_and_where_to_see_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { bpffs_dir: dir.path().join("redirect"), ..options() };
    let error = preflight::require(&options).unwrap_err().to_string();
    assert!(error.contains("this node cannot run redirect-agent: it lacks bpffs"), "{error}");
    assert!(error.contains("mount -t bpf"), "{error}");
    assert!(error.contains("`redirect-agent check` shows the whole list"), "{error}");
}
