//! The command line of the stand-in HBONE proxy, and of an HBONE client.

use std::io::{IsTerminal as _, stderr};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use redirect_tests::hbone::{self, Config, Dns, HboneClient, Identity};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// A stand-in for ztunnel in tests and demos; it is NOT ztunnel
///
/// It opens its sockets in the pods' network namespaces exactly as ztunnel does, takes the pods from
/// the node agent over ZDS, and reads from Kubernetes manifests what ztunnel gets from istiod. Never
/// put it in front of real traffic.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy of one node, until SIGTERM or SIGINT
    Run(Run),
    /// Call an address over HBONE from the current netns, as a sidecar or a gateway would
    HboneClient(Call),
}

#[derive(Debug, Args)]
struct Run {
    /// The node's name, for logs
    #[arg(long, value_name = "NAME")]
    node: String,
    /// The agent's ZDS socket
    #[arg(long, value_name = "PATH", default_value = "/var/run/ztunnel/ztunnel.sock")]
    zds_socket: PathBuf,
    /// The directory of the mesh's CA, created if there is none
    #[arg(long, value_name = "DIR")]
    ca_dir: PathBuf,
    /// The directory of manifests (Pod, Service, PeerAuthentication), followed; what agents publish
    /// in its .status tells who speaks HBONE
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Append one JSON line per connection to this file
    #[arg(long, value_name = "FILE")]
    log_json: Option<PathBuf>,
    /// The resolver for names that are not of the mesh
    #[arg(long, value_name = "IP:PORT")]
    dns_upstream: Option<SocketAddr>,
    /// Have no DNS
    #[arg(long, conflicts_with = "dns_upstream")]
    no_dns: bool,
    /// How many seconds connections may go on after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    drain: u64,
}

#[derive(Debug, Args)]
struct Call {
    /// The directory of the mesh's CA
    #[arg(long, value_name = "DIR")]
    ca_dir: PathBuf,
    /// Who to be: a SPIFFE URI, or NAMESPACE/SERVICE-ACCOUNT
    #[arg(long)]
    identity: Identity,
    /// The proxy to ask; port 15008 of the target's address by default
    #[arg(long, value_name = "IP:PORT")]
    via: Option<SocketAddr>,
    /// Print {"ok", "peer_identity", "answer", "status", "error"} instead of the answer
    #[arg(long)]
    json: bool,
    /// Where to connect to
    #[arg(value_name = "IP:PORT")]
    target: SocketAddr,
    /// The line to send; the line that comes back is printed
    line: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr)
        .init();
    let done = match Cli::parse().command {
        Command::Run(run) => serve(run).await.map(|()| true),
        Command::HboneClient(call) => ask(call).await,
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("standin-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(run: Run) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let config = Config {
        node: run.node,
        zds_socket: run.zds_socket,
        ca_dir: run.ca_dir,
        manifests: run.manifests,
        log_json: run.log_json,
        dns: (!run.no_dns).then_some(Dns { upstream: run.dns_upstream }),
        drain: Duration::from_secs(run.drain),
    };
    hbone::run(config, shutdown).await
}

/// Whether the call was answered.
async fn ask(call: Call) -> anyhow::Result<bool> {
    let client = HboneClient::new(&call.ca_dir, &call.identity)?;
    let connected = match call.via {
        Some(proxy) => client.connect_via(proxy, call.target).await,
        None => client.connect(call.target).await,
    };
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) if call.json => {
            let status = match &error {
                hbone::HboneError::Refused(_, status) => Some(*status),
                _ => None,
            };
            println!("{}", json!({"ok": false, "status": status, "error": error.to_string()}));
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    let answer = stream.ask(&call.line).await.with_context(|| format!("ask {}", call.target))?;
    if call.json {
        let peer = stream.peer.to_string();
        let answer = json!({"ok": true, "peer_identity": peer, "answer": answer, "status": 200});
        println!("{answer}");
    } else {
        println!("{answer}");
    }
    Ok(true)
}
