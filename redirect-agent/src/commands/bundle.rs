//! `bundle`: one archive for a bug report.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::gethostname;

use crate::{
    bundle::{self, Bundle, Options, Output},
    cli::BundleArgs,
};

/// How many parts that the archive lacks are named; errors.txt names all.
const NAMED: usize = 20;
/// Standard output, as `-o` names it.
const STDOUT: &str = "-";

/// 1 if something is missing from the archive.
pub(super) async fn bundle(args: BundleArgs) -> Result<ExitCode> {
    let to_stdout = args.output.as_deref() == Some(Path::new(STDOUT));
    ensure!(
        !to_stdout || !io::stdout().is_terminal(),
        "standard output is a terminal: redirect it to a file, or give one with -o"
    );
    // Before anything is collected: it says at once what it cannot write.
    let named = args.output.clone().filter(|_| !to_stdout);
    let anywhere = Path::new(bundle::ANY_NAME);
    let output = match to_stdout {
        true => None,
        false => Some(Output::open(named.as_deref().unwrap_or(anywhere), args.overwrite)?),
    };
    let bundle = bundle::collect(&options(args)?, |line| eprintln!("{line}")).await?;
    let said = match output {
        None => {
            let mut out = Vec::new();
            bundle.write(&mut out)?;
            io::stdout().write_all(&out).context("write to standard output")?;
            summary(&bundle, Path::new("standard output"), out.len() as u64)
        }
        Some(output) => {
            let path = named.unwrap_or_else(|| bundle::default_path(&bundle));
            summary(&bundle, &path, output.finish(&bundle, &path)?)
        }
    };
    eprintln!("{said}");
    Ok(if bundle.missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn options(args: BundleArgs) -> Result<Options> {
    let node = match args.node_name {
        Some(node) => node,
        None => gethostname().context("read the host's name")?.to_string_lossy().into_owned(),
    };
    Ok(Options {
        control_socket: args.control.control_socket,
        bpffs_dir: args.dirs.bpffs.bpffs_dir,
        netns_dir: args.dirs.pods.netns_dir,
        state_dir: args.dirs.pods.state_dir,
        cni: args.dirs.cni.into(),
        node,
        redact: args.redact,
        timeout: args.timeout,
        command_line: env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
    })
}

fn summary(bundle: &Bundle, path: &Path, size: u64) -> String {
    let written =
        format!("wrote {}: {}, {} files", path.display(), size_text(size), bundle.files.len());
    if bundle.missing.is_empty() {
        return written;
    }
    let mut names: Vec<&str> = bundle.missing.iter().map(|missing| missing.part.as_str()).collect();
    names.dedup();
    let more = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    format!("{written}; not collected, see errors.txt in it: {}{more}", names.join(", "))
}

fn size_text(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} bytes"),
        10_000..10_000_000 => format!("{} kB", bytes / 1000),
        _ => format!("{} MB", bytes / 1_000_000),
    }
}
