//! The control socket, with a real server, a real store and real clients.
#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::{
    env,
    ffi::OsString,
    fs,
    io::{Read as _, Write as _},
    ops::ControlFlow,
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::UnixStream,
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::{Stream, stream};
use redirect_agent::{
    cli::{self, Flag, Flags, Origin},
    control::{
        Agent, Answer, Author, Client, OverrideRequest, PauseRequest, Remaining, ResumeRequest,
        Server, StatusRequest,
    },
    explain::{self, Explanation},
    health, journal,
    membership::{Decision, PodKey, Reason},
    output::Status,
    overrides::{Change, Mode, Store, Target},
    probes::InForce,
    verdicts,
    verify::{self, Verification},
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Everything of an agent but the pods.
struct Overridden {
    store: Store,
    /// Who asked for the last change.
    author: Mutex<Author>,
}

impl health::Agent for Overridden {
    fn conditions(&self) -> Vec<health::Condition> {
        Vec::new()
    }

    async fn metrics(&self) -> anyhow::Result<String> {
        Ok("# EOF\n".to_owned())
    }
}

impl Agent for Overridden {
    async fn status(&self, of: StatusRequest) -> anyhow::Result<Status> {
        Ok(Status {
            node: "n1".to_owned(),
            version: "0.0.0".to_owned(),
            started: None,
            // What was asked for, for whoever looks whether it has arrived.
            source: serde_json::to_string(&of)?,
            waiting: None,
            proxies: 0,
            proxy_since: None,
            no_proxy_since: None,
            mark_alone: None,
            pause: self.store.current().pause(SystemTime::now()).cloned(),
            overrides: Vec::new(),
            probes: InForce::default(),
            problems: Vec::new(),
            pods: Vec::new(),
        })
    }

    async fn explain(&self, request: explain::Request) -> anyhow::Result<Explanation> {
        anyhow::bail!("asked for {} and {:?}", request.pod, request.to.map(String::from))
    }

    async fn verify(&self, request: verify::Request, by: Author) -> anyhow::Result<Verification> {
        anyhow::bail!("uid {:?} asked for {} and {:?}", by.peer.uid, request.pod, request.to)
    }

    fn observe(
        self: Arc<Self>,
        request: verdicts::Request,
    ) -> anyhow::Result<impl Stream<Item = Vec<verdicts::Line>> + Send + 'static> {
        let lines = request.port.into_iter().flat_map(|port| 0..u64::from(port));
        let lines = lines.map(|dropped| vec![verdicts::Line::Dropped { dropped }]);
        Ok(stream::iter(lines.collect::<Vec<_>>()))
    }

    fn journal(&self) -> anyhow::Result<Vec<journal::Note>> {
        Ok(Vec::new())
    }

    fn settings(&self) -> Flags {
        let line = ["redirect-agent", "run", "--drain", "9s"].map(OsString::from);
        let cli::Command::Run(args) = cli::Command::read(line).unwrap() else { unreachable!() };
        args.flags
    }

    fn remaining(&self) -> anyhow::Result<Remaining> {
        Ok(Remaining { pods: 3, failed: 1, why: Some("no proxy".to_owned()) })
    }

    async fn change(&self, change: Change, by: Author) -> anyhow::Result<Answer> {
        let now = SystemTime::now();
        let changed = self.store.change(change.clone(), now)?;
        let pod: PodKey = "shop/host".parse()?;
        let decided = [(&pod, Decision::bypass(Reason::HostNetwork))];
        let notes = self.store.current().notes(&change, decided, now);
        *self.author.lock().unwrap() = by;
        Ok(Answer { changed, notes, ..Answer::default() })
    }
}

struct Fixture {
    dir: TempDir,
    agent: Arc<Overridden>,
    stop: CancellationToken,
    server: JoinHandle<anyhow::Result<()>>,
}

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("state")).unwrap();
        let agent = Arc::new(Overridden { store, author: Mutex::default() });
        let server = Server::bind(&socket(&dir)).unwrap();
        let stop = CancellationToken::new();
        let server = tokio::spawn(server.run(Arc::clone(&agent), stop.clone()));
        Fixture { dir, agent, stop, server }
    }

    fn client(&self) -> Client {
        Client::new(socket(&self.dir))
    }
}

fn socket(dir: &TempDir) -> PathBuf {
    dir.path().join("run/control.sock")
}

fn request(target: &str, mode: Option<Mode>, for_seconds: Option<u64>) -> OverrideRequest {
    OverrideRequest { target: target.parse().unwrap(), mode, for_seconds, reason: None }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// What comes back for a request as it goes over the wire.
fn raw(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

#[tokio::test]
async fn verdicts_come_line_by_line_until_one_of_both_ends() {
    let fixture = Fixture::new();
    let client = fixture.client();
    let mut told = Vec::new();
    let three = verdicts::Request { port: Some(3), ..verdicts::Request::default() };
    let observe = client.observe(&three).await.unwrap().each(|line| {
        told.push(line);
        Ok(ControlFlow::Continue(()))
    });
    // The agent's end is not what was asked for.
    let error = observe.await.unwrap_err().to_string();
    assert!(error.contains("has ended"), "{error}");
    assert_eq!(told, [0, 1, 2].map(|dropped| verdicts::Line::Dropped { dropped }));

    let many = verdicts::Request { port: Some(60_000), ..verdicts::Request::default() };
    let mut count = 0;
    let observe = client.observe(&many).await.unwrap().each(|_| {
        count += 1;
        Ok(if count == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    });
    observe.await.unwrap();
    assert_eq!(count, 5);
}

#[tokio::test]
async fn overrides_and_the_pause_are_set_taken_back_and_repeated_without_harm() {
    let fixture = Fixture::new();
    let client = fixture.client();
    client.healthz().await.unwrap();
    assert_eq!(client.remaining().await.unwrap(), fixture.agent.remaining().unwrap());
    assert_eq!(client.metrics().await.unwrap(), "# EOF\n");
    assert_eq!(client.journal().await.unwrap(), []);
    let Flags(flags) = client.settings().await.unwrap();
    let drain = Flag { value: vec!["9s".to_owned()], from: Origin::CommandLine };
    assert_eq!(flags.get("drain"), Some(&drain));
    assert_eq!(client.process().await.unwrap(), Some(std::process::id()));
    let cart: PodKey = "shop/cart".parse().unwrap();
    let plain = Decision::bypass(Reason::NotLabeled);
    let decided = || fixture.agent.store.current().apply(plain, &cart, SystemTime::now()).reason;

    let enroll = request("shop/cart", Some(Mode::Enroll), None);
    assert!(client.set_override(&enroll).await.unwrap().changed);
    assert!(!client.set_override(&enroll).await.unwrap().changed);
    assert_eq!(decided(), Reason::OverrideEnrolled);

    assert!(
        client.pause(&PauseRequest { for_seconds: Some(600), reason: None }).await.unwrap().changed
    );
    assert_eq!(decided(), Reason::Paused);
    let until = client.status().await.unwrap().pause.unwrap().until.unwrap();
    let left = until.from(SystemTime::now());
    assert!((590..=600).contains(&left.as_secs()), "{left:?}");

    assert!(client.resume(&ResumeRequest::default()).await.unwrap().changed);
    assert!(!client.resume(&ResumeRequest::default()).await.unwrap().changed);
    assert_eq!(client.status().await.unwrap().pause, None);

    let auto = request("shop/cart", None, None);
    assert!(client.set_override(&auto).await.unwrap().changed);
    assert!(!client.set_override(&auto).await.unwrap().changed);
    assert_eq!(decided(), Reason::NotLabeled);
}

#[tokio::test]
async fn who_changes_something_is_known_by_the_kernels_word() {
    let fixture = Fixture::new();
    let client = fixture.client();
    let reason = Some("INC-4711".to_owned());
    client.pause(&PauseRequest { for_seconds: None, reason: reason.clone() }).await.unwrap();
    let author = fixture.agent.author.lock().unwrap().clone();
    let own = fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(author.reason, reason);
    assert_eq!(author.peer.uid, Some(nix::unistd::geteuid().as_raw()));
    assert_eq!(author.peer.pid, Some(i32::try_from(std::process::id()).unwrap()));
    assert_eq!(author.peer.process.as_deref(), Some(own.trim_end()));
    // An older client sends no body.
    let socket = socket(&fixture.dir);
    let bare = "POST /resume HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n";
    let answer = tokio::task::spawn_blocking(move || raw(&socket, bare)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(fixture.agent.author.lock().unwrap().reason, None);
    let long = Some("x".repeat(501));
    let refused = client.resume(&ResumeRequest { reason: long }).await.unwrap_err().to_string();
    assert!(refused.contains("longer than 500"), "{refused}");
}

#[tokio::test]
async fn status_is_asked_for_some_pods_or_for_all() {
    let fixture = Fixture::new();
    let client = fixture.client();
    let all = client.status().await.unwrap().source;
    assert_eq!(all, client.status_of(&StatusRequest::default()).await.unwrap().source);
    let some = StatusRequest {
        targets: vec!["shop/cart".parse().unwrap(), "bank".parse().unwrap()],
        selector: Some("app in (a, b),!c".parse().unwrap()),
    };
    let asked = client.status_of(&some).await.unwrap().source;
    assert_eq!(serde_json::from_str::<StatusRequest>(&asked).unwrap(), some);
}

#[tokio::test]
async fn the_operator_is_told_that_a_hard_reason_cannot_be_overridden() {
    let fixture = Fixture::new();
    let answer = fixture
        .client()
        .set_override(&request("shop", Some(Mode::Enroll), Some(60)))
        .await
        .unwrap();
    assert!(answer.changed);
    let [note] = &answer.notes[..] else { panic!("{answer:?}") };
    assert!(note.contains("shop/host stays out of the mesh"), "{note}");
}

#[tokio::test]
async fn the_socket_is_for_root_alone_and_goes_with_the_agent() {
    let fixture = Fixture::new();
    let socket = socket(&fixture.dir);
    assert_eq!((mode(socket.parent().unwrap()), mode(&socket)), (0o700, 0o600));
    fixture.stop.cancel();
    fixture.server.await.unwrap().unwrap();
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_request_that_makes_no_sense_is_refused_and_nothing_changes() {
    let fixture = Fixture::new();
    let post = |path: &str, body: &str| {
        let socket = socket(&fixture.dir);
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        tokio::task::spawn_blocking(move || raw(&socket, &request))
    };
    for (path, body, status) in [
        ("/overrides", "{", "400"),
        ("/observe", r#"{"to":"a/b/c"}"#, "400"),
        ("/observe", r#"{"ports":[1]}"#, "400"),
        ("/overrides", r#"{"target":"../etc","mode":"enroll"}"#, "400"),
        ("/overrides", r#"{"target":"shop/a/b","mode":"enroll"}"#, "400"),
        ("/overrides", r#"{"target":"shop","mode":"both"}"#, "400"),
        ("/overrides", r#"{"target":"shop","mode":"enroll","fro_seconds":1}"#, "400"),
        (
            "/overrides",
            r#"{"target":"shop","mode":"enroll","for_seconds":18446744073709551615}"#,
            "400",
        ),
        ("/pause", r#"{"for_seconds":-1}"#, "400"),
        ("/status", r#"{"targets":["../etc"]}"#, "400"),
        ("/status", r#"{"selector":"a within (b)"}"#, "400"),
        ("/explain", r#"{"pod":"cart"}"#, "400"),
        ("/explain", r#"{"pod":"shop/cart","to":"shop"}"#, "400"),
        ("/explain", r#"{"pod":"shop/cart","to":"10.0.0.2:80"}"#, "500"),
        ("/verify", r#"{"pod":"shop/cart","to":"10.0.0.2"}"#, "400"),
        ("/verify", r#"{"pod":"shop/cart","to":"10.0.0.2:80"}"#, "500"),
        ("/remaining", "{}", "405"),
        ("/nowhere", "{}", "404"),
    ] {
        let response = post(path, body).await.unwrap();
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{path} {body}: {response}");
        assert!(response.contains(r#"{"error":""#), "{path} {body}: {response}");
    }
    let state = fixture.dir.path().join("state/overrides.json");
    assert!(!state.exists());
}

#[tokio::test]
async fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("run")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(socket(&dir)).unwrap());
    assert!(socket(&dir).exists());
    let server = Server::bind(&socket(&dir)).unwrap();
    let error = format!("{:#}", Server::bind(&socket(&dir)).unwrap_err());
    assert!(error.contains("another agent listens there"), "{error}");
    drop(server);
}

#[tokio::test]
async fn a_place_that_is_not_safe_for_the_socket_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();

    fs::write(socket(&dir), "precious").unwrap();
    let error = format!("{:#}", Server::bind(&socket(&dir)).unwrap_err());
    assert!(error.contains("something else of that name"), "{error}");
    assert_eq!(fs::read_to_string(socket(&dir)).unwrap(), "precious");

    fs::remove_file(socket(&dir)).unwrap();
    symlink("/etc/passwd", socket(&dir)).unwrap();
    assert!(Server::bind(&socket(&dir)).is_err());

    fs::remove_file(socket(&dir)).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
    let error = format!("{:#}", Server::bind(&socket(&dir)).unwrap_err());
    assert!(error.contains("others may write to the directory"), "{error}");
}

#[tokio::test]
async fn without_an_agent_the_error_says_where_it_was_looked_for_and_what_to_do() {
    let error = Client::new("/nonexistent/control.sock").status().await.unwrap_err().to_string();
    assert!(
        error.starts_with(
            "cannot reach the agent at /nonexistent/control.sock: No such file or directory"
        ),
        "{error}"
    );
    assert!(error.contains("is `redirect-agent run` running on this node?"), "{error}");
}

#[tokio::test]
async fn an_answer_that_is_none_is_an_error_that_names_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    for answer in ["", "SSH-2.0-no\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"] {
        let path = dir.path().join("nonsense.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let error = format!("{:#}", Client::new(&path).status().await.unwrap_err());
        assert!(error.contains("nonsense.sock"), "{answer:?}: {error}");
        peer.join().unwrap();
        fs::remove_file(&path).unwrap();
    }
}

const NOBODY: u32 = 65534;
/// Set in the child of the test below, which is the same test again as nobody.
const NOBODYS_SOCKET: &str = "TEST_NOBODYS_CONTROL_SOCKET";

#[tokio::test]
async fn who_is_not_root_is_refused_even_where_the_sockets_mode_would_let_them_in() {
    if let Some(socket) = env::var_os(NOBODYS_SOCKET) {
        return is_refused(&Client::new(socket)).await;
    }
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it becomes somebody else");
    let fixture = Fixture::new();
    let socket = socket(&fixture.dir);
    for (path, mode) in
        [(fixture.dir.path(), 0o755), (socket.parent().unwrap(), 0o755), (&socket, 0o666)]
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    // The test's own binary may lie where nobody can read it.
    let copy = fixture.dir.path().join("as-nobody");
    fs::copy(env::current_exe().unwrap(), &copy).unwrap();
    let name = "who_is_not_root_is_refused_even_where_the_sockets_mode_would_let_them_in";
    let call = Command::new(&copy)
        .args(["--exact", name])
        .env(NOBODYS_SOCKET, &socket)
        .current_dir("/")
        .stdout(Stdio::piped())
        .gid(NOBODY)
        .uid(NOBODY)
        .spawn()
        .unwrap();
    let output = tokio::task::spawn_blocking(move || call.wait_with_output()).await.unwrap();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert_eq!(fixture.client().status().await.unwrap().pause, None);
}

async fn is_refused(client: &Client) {
    for error in [
        client.status().await.unwrap_err(),
        client.pause(&PauseRequest::default()).await.unwrap_err(),
        client.healthz().await.unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("only root may control the agent"), "{error}");
    }
}

#[test]
fn a_target_is_a_pod_or_a_namespace() {
    assert_eq!("shop".parse(), Ok(Target::Namespace("shop".to_owned())));
    assert_eq!("shop/cart".parse(), Ok(Target::Pod("shop/cart".parse().unwrap())));
    for wrong in ["", "/", "shop/", "/cart", "Shop", "shop/a/b", "*"] {
        assert!(wrong.parse::<Target>().is_err(), "{wrong}");
    }
}

#[test]
fn flags_say_where_they_come_from() {
    const VARIABLE: &str = "EXCLUDE_NAMESPACES";
    if env::var_os(VARIABLE).is_none() {
        let test = ["--exact", "flags_say_where_they_come_from"];
        let mut again = Command::new(env::current_exe().unwrap());
        assert!(again.args(test).env(VARIABLE, "a,b").status().unwrap().success());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let selectors = dir.path().join("selectors");
    fs::write(&selectors, "- podSelector: {matchLabels: {mesh: 'on'}}\n").unwrap();
    let selectors = format!("@{}", selectors.display());
    let line = ["redirect-agent", "run", "--install-cni", "--enablement-selectors", &selectors];
    let read = cli::Command::read(line.map(OsString::from)).unwrap();
    let cli::Command::Run(args) = read else { unreachable!() };
    assert_eq!(args.excluded_namespaces, ["a", "b"]);
    let Flags(flags) = args.flags;
    for (name, value, from) in [
        ("excluded-namespaces", &["a", "b"][..], Origin::Environment),
        ("install-cni", &["true"], Origin::CommandLine),
        ("beside-istio-cni", &["false"], Origin::Default),
        ("drain", &["5s"], Origin::Default),
        (
            "enablement-selectors",
            &[&selectors, "- podSelector: {matchLabels: {mesh: 'on'}}\n"],
            Origin::CommandLine,
        ),
    ] {
        let value = value.iter().map(|value| (*value).to_owned()).collect();
        assert_eq!(flags.get(name), Some(&Flag { value, from }), "{name}");
    }
    assert!(!flags.contains_key("kubeconfig") && !flags.contains_key("help"), "{flags:?}");
}
