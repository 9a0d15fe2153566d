//! Cross-compiles the kernel programs; the agent embeds the object (see `dataplane`).

use std::{env, path::PathBuf};

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    // `cargo xtask setup` puts bpf-linker here, outside the user's PATH.
    let tools = tools_dir()?;
    println!("cargo:rerun-if-env-changed=REDIRECT_TOOLS_DIR");
    println!("cargo:rerun-if-changed={}", tools.join("bin/bpf-linker").display());
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([tools.join("bin")].into_iter().chain(env::split_paths(&path)))?;
    // SAFETY: the build script is single-threaded here.
    #[expect(unsafe_code, reason = "Command's environment is only reachable through ours")]
    unsafe {
        env::set_var("PATH", path);
        // aya-build prints each line of the inner cargo as a warning.
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "redirect-ebpf",
            root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../redirect-ebpf"),
            no_default_features: true,
            features: &["kernel"],
        }],
        aya_build::Toolchain::default(),
    )
    .context("cannot build the eBPF programs; run `cargo xtask setup` once to get what that needs")
}

/// Where `cargo xtask setup` installs our build tools; the same rule stands in xtask/src/setup.rs.
fn tools_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = env::var_os("REDIRECT_TOOLS_DIR") {
        return Ok(dir.into());
    }
    let cache = match env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(cache.join("ambient-redirect"))
}
