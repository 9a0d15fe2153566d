//! The commands, each a function of its arguments.

mod bundle;
mod cluster;
mod control;
mod maps;
mod verify;

use std::{
    collections::BTreeSet,
    io::{self, Write as _},
    os::fd::AsFd as _,
    panic::resume_unwind,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{geteuid, gethostname},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    control::{auto, explain, log_level, observe, pause, put_override, resume, status},
    verify::verify,
};
use crate::{
    agent,
    cli::{
        AttachArgs, BpffsDir, CheckArgs, Command, DetachArgs, NodeDirs, PodDirs, RunArgs,
        TakeoverArgs,
    },
    cni::{
        entry::Entry,
        install,
        records::{self, Records},
    },
    control::{Client, PauseRequest},
    dataplane::{self, DEFAULT_PROXY_GRACE, Dataplane, PodNetns},
    finder::{self, Finder},
    membership,
    netns::Netns,
    output::{self, Format},
    overrides::{self, Mode},
    preflight,
    reconcile::Settings,
    source::kube,
    takeover,
    traffic::{self, Traffic},
};

/// What only the API server can take back.
const ANNOTATED: &str = "\
in a cluster, the pods may still be annotated, and then their peers call port 15008, where nothing listens. To remove it:
  kubectl annotate pods --all-namespaces --field-selector spec.nodeName=NODE ambient.istio.io/redirection-
";

/// How long an agent that is uninstalled lets pods leave the mesh in order. kubelet kills it 60 s after it has
/// told it to end (`terminationGracePeriodSeconds`).
const LEAVING: Duration = Duration::from_secs(10);
/// How long the kernel may take to remove the network namespaces of pods that have ended: it does so one
/// after another, later.
const DYING: Duration = Duration::from_secs(10);
/// How often to look whether either is over.
const LOOK: Duration = Duration::from_millis(100);
/// After how long without a pod that can still leave in order nobody waits any more: when the API server
/// answers 401, the agent's rights are gone for good.
const STUCK: Duration = Duration::from_secs(1);
/// How often a command that may have nothing to print checks whether anybody reads.
const LOOK_FOR_READER: Duration = Duration::from_millis(500);

/// Carries out a command. Returns the exit status.
///
/// # Errors
///
/// What the command says when it fails.
pub async fn execute(command: Command) -> Result<ExitCode> {
    let of_kernel = matches!(
        command,
        Command::Run(_)
            | Command::Attach(_)
            | Command::Detach(_)
            | Command::Cleanup(_)
            | Command::Takeover(_)
            | Command::Maps(_)
            | Command::Bundle(_)
    );
    ensure!(!of_kernel || geteuid().is_root(), "run the command as root");
    let done = match command {
        Command::Cluster(args) => return cluster::cluster(*args).await,
        Command::Bundle(args) => return bundle::bundle(*args).await,
        Command::Run(args) => run(*args).await,
        Command::Attach(args) => attach(&args),
        Command::Detach(args) => detach(&args),
        Command::Enroll(args) => put_override(args, Mode::Enroll).await,
        Command::Unenroll(args) => put_override(args, Mode::Unenroll).await,
        Command::Auto(args) => auto(args).await,
        Command::Pause(args) => pause(args).await,
        Command::Resume(args) => resume(args).await,
        Command::Status(args) => status(args).await,
        Command::Explain(args) => explain(args).await,
        Command::Observe(args) => observe(args).await,
        Command::Verify(args) => verify(args).await,
        Command::LogLevel(args) => log_level(args).await,
        Command::Check(args) => check(&args),
        Command::Maps(args) => maps::maps(&args),
        Command::Cleanup(args) => put_back(&args.dirs, args.force.force),
        Command::Takeover(args) => take_over(args).await,
        Command::Completions(args) => print(&args.generate()),
    };
    done.map(|()| ExitCode::SUCCESS)
}

async fn run(args: RunArgs) -> Result<()> {
    preflight::require(&preflight::Options {
        bpffs_dir: args.bpffs.bpffs_dir.clone(),
        cni: args.cni.clone().into(),
    })?;
    // Until this process ends, and not just while the agent runs: what it puts back in the end must not be
    // what the next one has set up by then.
    let _owner = dataplane::own(&args.bpffs.bpffs_dir)?;
    let node = match args.node_name {
        Some(node) => node,
        None => gethostname()
            .context("read the host's name")?
            .into_string()
            .ok()
            .context("use the host's name: it is not UTF-8; give --node-name")?,
    };
    let records = Arc::new(Records::open(&args.pods.state_dir)?);
    let entry = Entry {
        socket: std::path::absolute(&args.cni_socket).context("use --cni-socket")?,
        exclude_namespaces: args.excluded_namespaces.clone(),
        daemon_set: args.daemonset.clone(),
        ..Entry::for_an_agent_that_waits(args.cni_timeout)
    };
    let owner = match args.daemonset {
        Some(daemon_set) => {
            let config = kube::config(args.kubeconfig.as_deref()).await?;
            Some(Arc::new(kube::Owner::new(config, daemon_set)?))
        }
        None => None,
    };
    let dirs =
        NodeDirs { pods: args.pods.clone(), cni: args.cni.clone(), bpffs: args.bpffs.clone() };
    let control_socket = args.control.control_socket.clone();
    let options = agent::Options {
        source: args.source,
        kubeconfig: args.kubeconfig,
        node,
        settings: Settings {
            membership: membership::Config {
                excluded_namespaces: args.excluded_namespaces.into_iter().collect(),
                selectors: args.enablement_selectors,
            },
            traffic: traffic::Settings {
                defaults: args.traffic.selections()?,
                sidecar_annotations: args.sidecar_annotations,
                dns_capture: args.traffic.dns_capture,
            },
            finder: Arc::new(Finder::new(records, args.pods.netns_dir)),
            drain: args.drain,
            verify_interval: args.verify_interval,
            beside_istio_cni: args.beside_istio_cni,
        },
        dataplane: dataplane::Options {
            hooks: args.bpffs.hooks(),
            bpffs_dir: args.bpffs.bpffs_dir,
            proxy_grace: args.proxy_grace,
            // It is owned.
            force: true,
        },
        state_dir: args.pods.state_dir,
        control_socket: args.control.control_socket,
        zds_socket: args.zds_socket,
        cni_socket: args.cni_socket,
        cni_timeout: args.cni_timeout,
        install_cni: args.install_cni.then_some((args.cni.into(), entry)),
        probes: args.probes.settings(),
        health: args.health_address,
        page: args.page,
        flags: args.flags,
    };
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    if let Some(owner) = owner.clone() {
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(owner.look()).await });
    }
    let stop = shutdown.clone();
    let ending = tokio::spawn(async move {
        let terminated = tokio::select! {
            _ = terminate.recv() => true,
            _ = interrupt.recv() => false,
            () = stop.cancelled() => false,
        };
        let for_good = match owner {
            Some(owner) if terminated => owner.is_deleted().await,
            _ => false,
        };
        if for_good {
            info!("the agent is uninstalled: every pod leaves the mesh");
            leave(&Client::new(control_socket)).await;
        }
        stop.cancel();
        for_good
    });
    let ended = agent::run(options, shutdown.clone()).await;
    shutdown.cancel();
    if ending.await.context("wait for the end")? {
        // This process owns it all along.
        put_back(&dirs, true)?;
    }
    ended
}

/// Lets every pod leave the mesh in order, so that its peers hear of it. That may take a while, or not
/// be possible: what is still there after it is put back all the same.
async fn leave(agent: &Client) {
    let leaving = async {
        // Not for ever: whoever is killed before the end leaves it to the next agent.
        let reason = Some("the agent is uninstalled".to_owned());
        let for_seconds = Some(LEAVING.as_secs() * 2);
        agent.pause(&PauseRequest { for_seconds, reason }).await?;
        let mut stuck_since = Instant::now();
        loop {
            let remaining = agent.remaining().await?;
            if remaining.pods == 0 {
                break;
            }
            if remaining.pods > remaining.failed {
                stuck_since = Instant::now();
            }
            if stuck_since.elapsed() > STUCK {
                let why = remaining.why.as_deref().unwrap_or("unknown");
                bail!("{} of them cannot: {why}", remaining.pods);
            }
            sleep(LOOK).await;
        }
        Ok(())
    };
    match timeout(LEAVING, leaving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            warn!("pods cannot leave the mesh in order: {error:#}; restoring them anyway");
        }
        Err(_) => warn!("pods did not leave the mesh within {LEAVING:?}; restoring them anyway"),
    }
}

/// Puts the node back to how it was before the agent, which must not run any more. With `force`, although the
/// directory on bpffs has an owner: another one, or this process.
fn put_back(dirs: &NodeDirs, force: bool) -> Result<()> {
    let NodeDirs { pods: PodDirs { netns_dir, state_dir }, cni, bpffs } = dirs;
    let bpffs_dir = &bpffs.bpffs_dir;
    let there = bpffs_dir
        .try_exists()
        .with_context(|| format!("look for {}; run the command as root", bpffs_dir.display()))?;
    let dataplane = if there { Some(open(bpffs, force)?) } else { None };
    // First of all: with the entry there, and nobody to ask, no pod can start.
    for dirs in cni.everywhere() {
        for done in install::remove(&dirs)? {
            print(format!("{done}\n").as_bytes())?;
        }
    }
    let (mut annotated, mut others) = (false, dataplane::redirected_pods());
    if let Some(dataplane) = &dataplane {
        let records = Records::open(state_dir)?;
        let linked = dataplane.linked_pods()?;
        annotated = !linked.is_empty();
        others = others.saturating_sub(linked.len());
        restore_all(dataplane, finder::alive(netns_dir, &records, &linked)?)?;
        let nobody = BTreeSet::new();
        let mut unknown = dataplane.sweep(&nobody, &nobody, &nobody)?;
        let started = Instant::now();
        let left = loop {
            unknown = dataplane.sweep(&nobody, &nobody, &unknown)?;
            let left = dataplane.linked_pods()?;
            if left.is_empty() || started.elapsed() > DYING {
                break left;
            }
            thread::sleep(LOOK);
        };
        if !left.is_empty() {
            let inodes: Vec<String> = left.iter().map(ToString::to_string).collect();
            bail!(
                "cannot find the network namespaces with inode numbers {} in {} or of any process; give --netns-dir, or `redirect-agent detach --netns PATH`",
                inodes.join(", "),
                netns_dir.display()
            );
        }
    }
    records::remove_state(state_dir)?;
    overrides::remove_state(state_dir)?;
    // Last: from then on the directory may be another agent's.
    if let Some(dataplane) = dataplane {
        dataplane.unpin_if_unused()?;
    }
    if annotated {
        print(ANNOTATED.as_bytes())?;
    }
    if others > 0 {
        let line = format!(
            "another redirect-agent, with another --bpffs-dir, redirects {others} pods of this node: they stay as they are\n\
             nothing else of redirect-agent is left on this node\n"
        );
        return print(line.as_bytes());
    }
    print(b"nothing of redirect-agent is left on this node\n")
}

fn attach(args: &AttachArgs) -> Result<()> {
    let pod = PodNetns::new(open_pod(&args.netns)?, &args.address)?;
    let dataplane = open(&args.bpffs, args.force.force)?;
    let traffic = Traffic {
        dns_capture: args.traffic.dns_capture,
        selections: args.traffic.selections()?,
        ..Traffic::default()
    };
    dataplane.prepare(&pod, 0, &traffic)?;
    let missing: Vec<String> =
        dataplane.proxy_listens(&pod)?.iter().map(ToString::to_string).collect();
    dataplane.capture(&pod, &traffic)?;
    dataplane.settle_wholly(&pod)?;
    if !missing.is_empty() {
        warn!(
            "the proxy does not listen on port {} in {}: what would go there is refused until it does",
            missing.join(", "),
            args.netns.display()
        );
    }
    print(format!("{} is attached\n", args.netns.display()).as_bytes())
}

fn detach(args: &DetachArgs) -> Result<()> {
    let netns = open_pod(&args.netns)?;
    let dataplane = open(&args.bpffs, args.force.force)?;
    let state = if dataplane.is_linked(netns.inode()) {
        restore(&dataplane, netns)?;
        "is detached"
    } else {
        "was not attached"
    };
    print(format!("{} {state}\n", args.netns.display()).as_bytes())?;
    dataplane.unpin_if_unused()
}

/// Opens the network namespace of a pod, and not the node's own, whose connections are all of the node's.
fn open_pod(path: &Path) -> Result<Netns> {
    let netns = Netns::open(path)?;
    ensure!(
        !netns.is_nodes()?,
        "{} is the network namespace of the node itself; give that of a pod",
        path.display()
    );
    Ok(netns)
}

/// Puts namespaces back to how they were found, many at once: first the traffic of all, then what takes
/// long and harms nobody who has to wait for it. One that fails keeps none from being put back. What another agent
/// redirects stays.
fn restore_all(dataplane: &Dataplane, found: Vec<Netns>) -> Result<()> {
    let (mut pods, mut failed) = (Vec::new(), Vec::new());
    for netns in found {
        let path = netns.path().to_owned();
        let pod = PodNetns::existing(netns).and_then(|pod| Ok((dataplane.is_anothers(&pod)?, pod)));
        match pod {
            Ok((true, _)) => {}
            Ok((false, pod)) => pods.push(pod),
            Err(e) => failed.push(format!("{}: {e:#}", path.display())),
        }
    }
    let let_pass_and_tell = |pod: &PodNetns| {
        let_pass(dataplane, pod)?;
        print(format!("restored {}\n", pod.netns.path().display()).as_bytes())
    };
    let all: Vec<_> = pods.iter().collect();
    // Of one that still redirects, the programs and the record stay: it has to be found again.
    let passing = at_once(&all, &mut failed, let_pass_and_tell);
    at_once(&passing, &mut failed, |pod| dataplane.forget(pod.netns.inode()));
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Does something for each pod, and returns those it was done for; what went wrong is added to `failed`.
fn at_once<'a>(
    pods: &[&'a PodNetns],
    failed: &mut Vec<String>,
    what: impl Fn(&PodNetns) -> Result<()> + Sync,
) -> Vec<&'a PodNetns> {
    // They mostly wait for the kernel.
    const AT_ONCE: usize = 128;
    let next = AtomicUsize::new(0);
    let mut done = Vec::new();
    thread::scope(|scope| {
        let work = || {
            let mut results = Vec::new();
            while let Some(&pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                results.push((pod, what(pod)));
            }
            results
        };
        let workers: Vec<_> = (0..AT_ONCE.min(pods.len())).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            for (pod, result) in worker.join().unwrap_or_else(|panic| resume_unwind(panic)) {
                match result {
                    Ok(()) => done.push(pod),
                    Err(e) => failed.push(format!("{}: {e:#}", pod.netns.path().display())),
                }
            }
        }
    });
    done
}

/// Puts one namespace back to how it was found.
fn restore(dataplane: &Dataplane, netns: Netns) -> Result<()> {
    let pod = PodNetns::existing(netns)?;
    let_pass(dataplane, &pod)?;
    dataplane.forget(pod.netns.inode())
}

/// Nothing of the pod's traffic is redirected any more.
fn let_pass(dataplane: &Dataplane, pod: &PodNetns) -> Result<()> {
    dataplane.release(pod)?;
    dataplane.settle_wholly(pod)?;
    dataplane.let_pass(pod)?;
    takeover::forget(&pod.netns)
}

fn open(bpffs: &BpffsDir, force: bool) -> Result<Dataplane> {
    Dataplane::open(&dataplane::Options {
        bpffs_dir: bpffs.bpffs_dir.clone(),
        proxy_grace: DEFAULT_PROXY_GRACE,
        force,
        hooks: bpffs.hooks(),
    })
}

fn check(args: &CheckArgs) -> Result<()> {
    let report = preflight::check(&preflight::Options {
        bpffs_dir: args.bpffs.bpffs_dir.clone(),
        cni: args.cni.clone().into(),
    });
    print(report.print(args.output)?.as_bytes())?;
    if report.ok { Ok(()) } else { bail!("{}", report.verdict()) }
}

/// Goes on with the next pod where one fails.
async fn take_over(args: TakeoverArgs) -> Result<()> {
    let mut status = Client::new(args.control.control_socket).status().await?;
    status.pods.sort_by_key(|pod| (pod.namespace.clone(), pod.name.clone()));
    let inodes = status.pods.iter().filter_map(|pod| pod.netns).collect();
    let records = Records::open(&args.pods.state_dir)?;
    let found = finder::alive(&args.pods.netns_dir, &records, &inodes)?;
    let mut rows = Vec::new();
    let (mut failed, mut unfinished) = (Vec::new(), 0);
    for pod in &status.pods {
        let Some(netns) = found.iter().find(|netns| pod.netns == Some(netns.inode())) else {
            continue;
        };
        match takeover::take_over(pod, netns, args.dry_run) {
            Ok(None) => {}
            Ok(Some(answer)) => {
                unfinished += usize::from(answer.is_unfinished());
                rows.push(takeover::Row::new(pod, answer));
            }
            Err(e) => failed.push(format!("{}/{}: {e:#}", pod.namespace, pod.name)),
        }
    }
    print(taken_over(&rows, args.output)?.as_bytes())?;
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    ensure!(unfinished == 0, "{unfinished} pods are left alone");
    Ok(())
}

fn taken_over(pods: &[takeover::Row], format: Format) -> Result<String> {
    if format == Format::Json {
        return output::json(&takeover::document(pods));
    }
    if pods.is_empty() {
        return Ok("nothing of istio-cni's is in any pod of this node\n".to_owned());
    }
    let rows = pods.iter().map(|pod| {
        let answer = pod.answer.as_str().to_owned();
        vec![pod.namespace.clone(), pod.name.clone(), answer, pod.detail.to_owned()]
    });
    Ok(output::table(&["NAMESPACE", "NAME", "ANSWER", "DETAIL"], rows))
}

/// Writes to standard output; a reader that has gone away is no error.
fn print(text: &[u8]) -> Result<()> {
    print_to_reader(text).map(drop)
}

/// The same. Returns whether somebody still reads.
fn print_to_reader(text: &[u8]) -> Result<bool> {
    match io::stdout().write_all(text).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("write to standard output"),
    }
}

/// Waits until nobody reads standard output anymore, if it is a pipe or a socket.
async fn reader_leaves() {
    let stdout = io::stdout();
    loop {
        // POLLERR and POLLHUP are always reported.
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            return;
        }
        sleep(LOOK_FOR_READER).await;
    }
}
