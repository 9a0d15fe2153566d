//! HTTP on a Unix socket that only root can use.

use std::{
    fmt, fs,
    future::IntoFuture as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use axum::{
    Router,
    extract::{ConnectInfo, Request, State, connect_info::Connected},
    middleware::{self, Next},
    response::Response,
    serve::IncomingStream,
};
use nix::unistd::geteuid;
use tokio::{net::UnixListener, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::socket_file::{Obstacle, SocketFile, remove_stale};

/// How long requests that are in progress may take at shutdown.
const PATIENCE: Duration = Duration::from_secs(2);

/// The name of a socket, for messages.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    /// As text: `control socket`.
    pub what: &'static str,
    /// The flag that sets another path.
    pub flag: &'static str,
}

/// An open socket, for root only.
#[derive(Debug)]
pub struct RootSocket {
    // Dropped first, so that an agent that starts in the meantime finds no file, rather than a stale one.
    file: SocketFile,
    listener: UnixListener,
    name: Name,
}

impl Name {
    fn explain(self, obstacle: Obstacle) -> anyhow::Error {
        match obstacle {
            Obstacle::NotASocket => {
                anyhow!("there is something else of that name: remove it, or use {}", self.flag)
            }
            Obstacle::InUse => {
                anyhow!("another agent listens there: stop it first, or use {}", self.flag)
            }
            Obstacle::Io(error) => error.into(),
        }
    }
}

impl RootSocket {
    /// Listens at `path`. A missing directory is created, for root only; a socket that an earlier agent left
    /// behind is replaced.
    ///
    /// # Errors
    ///
    /// When another agent listens there, when others could put their own socket in its place, or
    /// when the path cannot be used.
    pub fn bind(path: &Path, name: Name) -> Result<Self> {
        let context = || format!("listen on the {} {}", name.what, path.display());
        make_directory(path, name).with_context(context)?;
        remove_stale(path).map_err(|obstacle| name.explain(obstacle)).with_context(context)?;
        let listener = UnixListener::bind(path).with_context(context)?;
        let file = SocketFile::of(path).with_context(context)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(context)?;
        Ok(Self { file, listener, name })
    }

    /// Serves `router` until `shutdown`; requests in progress are answered. Clients other than root get the
    /// response of `refuse`.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub async fn serve(
        self,
        router: Router,
        refuse: fn() -> Response,
        shutdown: CancellationToken,
    ) -> Result<()> {
        let Self { file, listener, name } = self;
        let router = router.layer(middleware::from_fn_with_state(refuse, root_only));
        let serving = axum::serve(listener, router.into_make_service_with_connect_info::<Peer>())
            .with_graceful_shutdown(shutdown.clone().cancelled_owned());
        let out_of_patience = async {
            shutdown.cancelled().await;
            sleep(PATIENCE).await;
        };
        tokio::select! {
            served = serving.into_future() => {
                served.with_context(|| format!("serve the {} {}", name.what, file.path().display()))
            }
            // A client that does not read must not keep the agent.
            () = out_of_patience => Ok(()),
        }
    }
}

fn make_directory(socket: &Path, name: Name) -> Result<()> {
    let dir = match socket.parent() {
        None => bail!("it is not the path of a file"),
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let found = fs::metadata(dir)?;
    if !may_use(Some(found.uid()), geteuid().as_raw()) {
        bail!(
            "the directory {} belongs to uid {}, who could put another socket there: `chown` it to root, or \
             name another one with {}",
            dir.display(),
            found.uid(),
            name.flag
        );
    }
    let mode = found.permissions().mode();
    if mode & 0o022 != 0 {
        bail!(
            "others may write to the directory {} (mode {:o}) and could put their own socket \
             there: `chmod 0700` it, or name another one with {}",
            dir.display(),
            mode & 0o7777,
            name.flag
        );
    }
    Ok(())
}

/// Who is at the other end of a connection, as the kernel says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The user; `None`: the kernel did not say.
    pub uid: Option<u32>,
    /// The process, if the agent's pid namespace has it.
    pub pid: Option<i32>,
    /// The name of the process when it connected.
    pub process: Option<String>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Peer {
        let Ok(cred) = stream.io().peer_cred() else { return Peer::default() };
        let pid = cred.pid().filter(|pid| *pid > 0);
        let comm = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        let process = comm.map(|comm| comm.trim_end().to_owned());
        Peer { uid: Some(cred.uid()), pid, process }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uid {
            Some(uid) => write!(f, "uid {uid}")?,
            None => f.write_str("somebody")?,
        }
        match (self.pid, &self.process) {
            (Some(pid), Some(process)) => write!(f, " ({process}, process {pid})"),
            (Some(pid), None) => write!(f, " (process {pid})"),
            (None, _) => Ok(()),
        }
    }
}

/// The socket's mode lets only root connect. This check holds even if somebody has changed the mode.
async fn root_only(
    State(refuse): State<fn() -> Response>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if !may_use(peer.uid, geteuid().as_raw()) {
        return refuse();
    }
    next.run(request).await
}

/// Root, and the user that the agent itself runs as.
fn may_use(peer: Option<u32>, own: u32) -> bool {
    peer.is_some_and(|uid| uid == 0 || uid == own)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt as _, chown},
    };

    use nix::unistd::geteuid;

    use super::{Name, make_directory, may_use};

    #[test]
    fn directory_in_which_others_can_put_their_own_socket_is_refused() {
        let name = Name { what: "socket", flag: "--socket" };
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        make_directory(&socket, name).unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o770)).unwrap();
        assert!(make_directory(&socket, name).is_err());
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        if geteuid().is_root() {
            chown(dir.path(), Some(65534), None).unwrap();
            let error = format!("{:#}", make_directory(&socket, name).unwrap_err());
            assert!(error.contains("belongs to uid 65534"), "{error}");
        }
    }

    #[test]
    fn only_root_and_the_agents_own_user_may_use_it() {
        assert!(may_use(Some(0), 0));
        assert!(may_use(Some(0), 1000));
        assert!(may_use(Some(1000), 1000));
        assert!(!may_use(Some(1000), 0));
        assert!(!may_use(None, 0));
    }
}
