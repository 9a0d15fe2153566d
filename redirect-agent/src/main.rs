//! `redirect-agent`: wiring only.

use std::process::ExitCode;

use redirect_agent::{
    cli::{Command, LogFormat},
    cni::plugin,
    commands, log,
    output::printable,
};

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
    let default = if matches!(command, Command::Cluster(_)) { log::QUIET } else { log::DEFAULT };
    if let Err(e) = log::start(json, default) {
        eprintln!("error: {e:#}");
        return ExitCode::FAILURE;
    }
    let failure = command.failure();
    match commands::execute(command).await {
        Ok(exit) => exit,
        Err(e) => {
            let message = format!("{e:#}");
            // It may quote a pod or the API server.
            let lines: Vec<String> = message.lines().map(printable).collect();
            eprintln!("error: {}", lines.join("\n  "));
            ExitCode::from(failure)
        }
    }
}
