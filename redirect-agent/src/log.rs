//! The log of this process: what is written, and how that changes while the agent runs.

use std::{
    env,
    io::{IsTerminal as _, stderr},
    sync::{Mutex, OnceLock, PoisonError},
    time::SystemTime,
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    EnvFilter, Registry, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use crate::overrides::Moment;

/// What is logged unless RUST_LOG says otherwise. What goes wrong with the API server is said by the
/// source, once; kube says it each time.
pub const DEFAULT: &str = "info,kube_client::client::builder=off,kube_runtime::watcher=off";
/// The same for a command that says itself what goes wrong.
pub const QUIET: &str = "warn,kube_client=off,kube_runtime=off";

/// A process has one log.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    /// Puts another filter in force.
    handle: reload::Handle<EnvFilter, Registry>,
    /// What RUST_LOG says.
    configured: String,
    now: Mutex<Level>,
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Level {
    /// As in RUST_LOG: a level, or `module=level`, several of them separated by commas.
    pub filter: String,
    /// Until when; then RUST_LOG counts again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Moment>,
    /// Whether it is what RUST_LOG says.
    pub configured: bool,
}

/// Begins to log to stderr, as RUST_LOG says, or else `default`.
///
/// # Errors
///
/// When RUST_LOG is invalid, or the process logs already.
pub fn start(json: bool, default: &str) -> Result<()> {
    let configured = env::var(EnvFilter::DEFAULT_ENV).ok().filter(|filter| !filter.is_empty());
    let configured = configured.unwrap_or_else(|| default.to_owned());
    let filter = read(&configured).context("RUST_LOG is invalid")?;
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let layer = fmt::layer().with_ansi(stderr().is_terminal()).with_writer(stderr);
    if json {
        registry.with(layer.json()).init();
    } else {
        registry.with(layer).init();
    }
    let now = Mutex::new(Level { filter: configured.clone(), until: None, configured: true });
    LOG.set(Log { handle, configured, now }).ok().context("this process logs already")
}

/// The target of what an auditor reads, which is written whatever the filter.
pub const AUDITED: &str = "audit";

fn read(filter: &str) -> Result<EnvFilter> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!("{error}; give a level, such as debug, or module=level, such as kube=debug")
    })?;
    Ok(filter.add_directive(format!("{AUDITED}=info").parse()?))
}

/// A word alone is a level. To the library it may also be a module, and a misspelled level would silence the log.
fn check_words(filter: &str) -> Result<()> {
    for word in filter.split(',').map(str::trim).filter(|word| !word.contains('=')) {
        ensure!(
            word.parse::<LevelFilter>().is_ok(),
            "{word:?} is no level: give error, warn, info, debug, trace or off, or module=level, such as kube=debug"
        );
    }
    Ok(())
}

/// What is logged now.
///
/// # Errors
///
/// When the process does not log.
pub fn level() -> Result<Level> {
    Ok(log()?.now.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

/// Logs as `filter` says, for good or until then; without one, as RUST_LOG says.
///
/// # Errors
///
/// When the filter is invalid, or the process does not log.
pub fn set(filter: Option<String>, until: Option<Moment>) -> Result<Level> {
    let log = log()?;
    let level = match filter {
        Some(filter) => {
            check_words(&filter)?;
            Level { filter, until, configured: false }
        }
        None => Level { filter: log.configured.clone(), until: None, configured: true },
    };
    let filter = read(&level.filter)?;
    let mut now = log.now.lock().unwrap_or_else(PoisonError::into_inner);
    log.handle.reload(filter)?;
    *now = level.clone();
    if let Some(until) = until {
        tokio::spawn(end(level.clone(), until));
    }
    Ok(level)
}

/// Ends what has not been replaced by then.
async fn end(level: Level, until: Moment) {
    tokio::time::sleep(until.from(SystemTime::now())).await;
    if self::level().is_ok_and(|now| now == level)
        && let Err(error) = set(None, None)
    {
        tracing::warn!("cannot set the log's level back: {error:#}");
    }
}

fn log() -> Result<&'static Log> {
    LOG.get().context("this process does not log")
}
