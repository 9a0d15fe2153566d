//! `redirect-agent`: wiring only.

use std::{
    env,
    io::{IsTerminal as _, stderr},
    process::ExitCode,
};

use redirect_agent::{
    cli::{Command, LogFormat},
    cni::plugin,
    commands,
};
use tracing_subscriber::EnvFilter;

/// What is logged unless RUST_LOG says otherwise. What goes wrong with the API server is said by the
/// source, once; kube says it each time.
const LOG: &str = "info,kube_client::client::builder=off,kube_runtime::watcher=off";

/// The same for a command that says itself what goes wrong.
const QUIET: &str = "warn,kube_client=off,kube_runtime=off";

/// As many on a large node as on a small one: the agent has little to compute.
const WORKERS: usize = 2;
/// How many pods are set up at once. The kernel changes one network interface of the node at a time.
const BLOCKING: usize = 16;

fn main() -> ExitCode {
    // The same program is the CNI plugin, by another name, and kubectl's (`Command::of_process`).
    if plugin::is_called() {
        return plugin::main();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(agent()),
        Err(e) => {
            eprintln!("error: start the runtime: {e}");
            ExitCode::FAILURE
        }
    }
}

async fn agent() -> ExitCode {
    let command = Command::of_process();
    let json = matches!(&command, Command::Run(args) if args.log_format == LogFormat::Json);
    let filter = match env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) if !directives.is_empty() => match EnvFilter::try_new(directives) {
            Ok(filter) => filter,
            Err(e) => {
                eprintln!(
                    "error: RUST_LOG is invalid: {e}; give a level, such as debug, or module=level"
                );
                return ExitCode::FAILURE;
            }
        },
        _ if matches!(command, Command::Cluster(_)) => EnvFilter::new(QUIET),
        _ => EnvFilter::new(LOG),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr);
    if json {
        log.json().init();
    } else {
        log.init();
    }
    let failure = command.failure();
    match commands::execute(command).await {
        Ok(exit) => exit,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(failure)
        }
    }
}
