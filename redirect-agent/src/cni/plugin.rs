//! The CNI plugin: this program, called as `redirect-cni` by the node's container runtime.
//!
//! It is the last plugin in the chain. On ADD, it asks the agent to bring the pod to its desired state, and
//! no container starts before the agent says that this is done. It passes on the result of the plugins before
//! it. Source: the CNI specification, <https://www.cni.dev/docs/spec/>.

use std::{
    env,
    ffi::OsStr,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use axum::http::{Method, StatusCode};
use ipnet::IpNet;
use nix::unistd::alarm;
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout_at},
};

use super::{
    entry::{Entry, LONGEST_TIMEOUT, PLUGIN, VERSIONS},
    request::{ADD_PATH, AddRequest, Address, IpConfig},
};
use crate::{control::exchange, netns::Netns, text::present};

/// The kernel kills the plugin after this time, whatever it hangs in. No runtime waits that long.
const LAST_RESORT: u32 = 300;
/// How long the runtime may take to write the configuration.
const INPUT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest configuration, previous result included.
const LONGEST_INPUT: u64 = 8 << 20;
/// How long the agent may take to say that it is there.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before the agent is asked again: the first one and the longest one.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The longest message from the agent that is passed on.
const LONGEST_MESSAGE: usize = 2000;

/// What the runtime says in the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_COMMAND`: what to do.
    pub command: Option<String>,
    /// `CNI_CONTAINERID`
    pub container: Option<String>,
    /// `CNI_NETNS`: path of the sandbox's network namespace.
    pub netns: Option<String>,
    /// `CNI_IFNAME`
    pub interface: Option<String>,
    /// `CNI_ARGS`: `KEY=VALUE;…`
    pub args: Option<String>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let read = |name| {
            env::var_os(name)
                .map(|value| value.to_string_lossy().into_owned())
                .filter(|v| !v.is_empty())
        };
        Self {
            command: read("CNI_COMMAND"),
            container: read("CNI_CONTAINERID"),
            netns: read("CNI_NETNS"),
            interface: read("CNI_IFNAME"),
            args: read("CNI_ARGS"),
        }
    }

    /// The agent notices by itself that a pod is gone, and nothing may keep a pod from being deleted.
    fn always_succeeds(&self) -> bool {
        matches!(self.command.as_deref(), Some("DEL" | "GC"))
    }
}

/// What the plugin fails with, as the runtime reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    cni_version: String,
    /// One of the specification's codes, or [`code::REFUSED`].
    pub code: u32,
    /// What went wrong, and what to do about it.
    pub msg: String,
}

/// The codes of failures. Source: the CNI specification, section "Error".
pub mod code {
    /// The configuration has a version that we do not support.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The network namespace does not exist.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// Something in the environment is missing, or cannot be used.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// The configuration could not be read, or the answer could not be written.
    pub const IO: u32 = 5;
    /// The configuration is not of the form that it should be.
    pub const DECODE: u32 = 6;
    /// The configuration says something that cannot be used.
    pub const INVALID_CONFIGURATION: u32 = 7;
    /// The agent is not there, or not ready: the runtime should try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// ADD would not work at the moment.
    pub const UNAVAILABLE: u32 = 50;
    /// The agent cannot bring the pod to its desired state. Codes from 100 on are a plugin's own.
    pub const REFUSED: u32 = 100;
}

impl Failure {
    fn new(code: u32, msg: impl Into<String>) -> Self {
        Failure { cni_version: String::new(), code, msg: msg.into() }
    }
}

/// What the plugin reads of its configuration beside its own [`Entry`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration<'a> {
    cni_version: Option<String>,
    #[serde(borrow)]
    prev_result: Option<&'a RawValue>,
}

/// What the plugin reads of the result of the one before it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreviousResult<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    cni_version: Option<&'a RawValue>,
    ips: Option<Vec<PreviousIp>>,
}

#[derive(Deserialize)]
struct PreviousIp {
    address: IpNet,
}

/// Whether this program was called as the plugin. A runtime gives no arguments; `redirect-cni cleanup` is what
/// a person types where the agent is not installed.
pub fn is_called() -> bool {
    let mut arguments = env::args_os();
    let by_name = arguments
        .next()
        .is_some_and(|path| Path::new(&path).file_name() == Some(OsStr::new(PLUGIN)));
    by_name && (arguments.next().is_none() || env::var_os("CNI_COMMAND").is_some())
}

/// The whole program, when it is called as the plugin.
pub fn main() -> ExitCode {
    alarm::set(LAST_RESORT);
    let (answer, exit) = match on_a_thread(&Environment::of_process()) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(failure) => (to_json(&failure), ExitCode::FAILURE),
    };
    let mut stdout = io::stdout();
    match stdout.write_all(answer.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => exit,
        Err(_) => ExitCode::FAILURE,
    }
}

fn to_json(failure: &Failure) -> String {
    // Its fields have nothing that JSON lacks.
    let text = serde_json::to_string_pretty(failure);
    text.unwrap_or_else(|_| format!(r#"{{"code": {}, "msg": "?"}}"#, failure.code)) + "\n"
}

/// Reads the configuration. Does not wait for whoever keeps the pipe open.
fn read_input(input: impl io::Read + Send + 'static) -> Result<Vec<u8>, Failure> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = input.take(LONGEST_INPUT + 1).read_to_end(&mut bytes);
        // After the timeout, nobody is listening anymore.
        let _late = sender.send(read.map(|_| bytes));
    });
    let complain = |why: &dyn std::fmt::Display| {
        Err(Failure::new(code::IO, format!("read the configuration from standard input: {why}")))
    };
    match receiver.recv_timeout(INPUT_TIMEOUT) {
        Ok(Ok(bytes)) if bytes.len() as u64 > LONGEST_INPUT => {
            complain(&format_args!("it is longer than {LONGEST_INPUT} bytes"))
        }
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => complain(&error),
        Err(_) => complain(&format_args!("it did not end within {INPUT_TIMEOUT:?}")),
    }
}

/// A panic, which is a defect, is a failure that the runtime understands.
fn on_a_thread(environment: &Environment) -> Result<String, Failure> {
    thread::scope(|scope| {
        let running =
            thread::Builder::new().spawn_scoped(scope, || match read_input(io::stdin()) {
                Err(failure) if !environment.always_succeeds() => Err(failure),
                input => run(environment, &input.unwrap_or_default()),
            });
        match running.map(thread::ScopedJoinHandle::join) {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Failure::new(code::REFUSED, "redirect-cni panicked: see its stderr")),
            Err(error) => Err(Failure::new(code::TRY_AGAIN, format!("start a thread: {error}"))),
        }
    })
}

/// Carries out the runtime's command. Returns what goes to standard output.
///
/// # Errors
///
/// What the runtime is told.
pub fn run(environment: &Environment, input: &[u8]) -> Result<String, Failure> {
    match environment.command.as_deref() {
        _ if environment.always_succeeds() => Ok(String::new()),
        Some("VERSION") => Ok(version(input)),
        Some(command @ ("ADD" | "CHECK" | "STATUS")) => {
            let mut version = String::new();
            carry_out(command, environment, input, &mut version)
                .map_err(|failure| Failure { cni_version: version, ..failure })
        }
        Some(other) => {
            Err(Failure::new(code::INVALID_ENVIRONMENT, format!("unknown CNI_COMMAND {other:?}")))
        }
        None => Err(Failure::new(
            code::INVALID_ENVIRONMENT,
            "CNI_COMMAND is not set: this is a CNI plugin, and a container runtime calls it; \
             `redirect-cni --help` shows the commands of redirect-agent, which is the same program",
        )),
    }
}

fn version(input: &[u8]) -> String {
    let asked = text(input).ok().and_then(|text| serde_json::from_str::<Configuration>(text).ok());
    let newest = VERSIONS[VERSIONS.len() - 1].to_owned();
    let version = asked.and_then(|configuration| configuration.cni_version).unwrap_or(newest);
    json!({"cniVersion": version, "supportedVersions": VERSIONS}).to_string() + "\n"
}

fn text(input: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(input)
        .map_err(|error| Failure::new(code::DECODE, format!("read the configuration: {error}")))
}

/// Reads an object: serde would take an array for one, too.
fn decode<'a, T: Deserialize<'a>>(what: &str, text: &'a str) -> Result<T, Failure> {
    match serde_json::from_str(text) {
        Ok(object) if text.trim_start().starts_with('{') => Ok(object),
        Ok(_) => Err(Failure::new(code::DECODE, format!("read the {what}: it is no object"))),
        Err(error) => Err(Failure::new(code::DECODE, format!("read the {what}: {error}"))),
    }
}

fn carry_out(
    command: &str,
    environment: &Environment,
    input: &[u8],
    version: &mut String,
) -> Result<String, Failure> {
    let input = text(input)?;
    let configuration: Configuration = decode("configuration", input)?;
    *version = configuration.cni_version.unwrap_or_default();
    if !VERSIONS.contains(&version.as_str()) {
        return Err(Failure::new(
            code::INCOMPATIBLE_VERSION,
            format!("cniVersion {version:?} of the network is none of {}", VERSIONS.join(", ")),
        ));
    }
    let entry: Entry = decode("configuration", input)?;
    if command == "STATUS" {
        return status(&entry).map(|()| String::new());
    }
    let Some(previous) = configuration.prev_result else {
        return Err(Failure::new(
            code::INVALID_CONFIGURATION,
            format!(
                "there is no prevResult: {PLUGIN} makes no network, and has to stand after the plugin \
                 that does, in a .conflist"
            ),
        ));
    };
    let netns = required("CNI_NETNS", environment.netns.as_ref())?;
    required("CNI_CONTAINERID", environment.container.as_ref())?;
    required("CNI_IFNAME", environment.interface.as_ref())?;
    if command == "CHECK" {
        // The agent itself checks all the time that the pod is in its desired state.
        Netns::open(Path::new(netns))
            .map_err(|error| Failure::new(code::UNKNOWN_CONTAINER, format!("{error:#}")))?;
        return Ok(String::new());
    }
    let result: PreviousResult = decode("prevResult", previous.get())?;
    let pod = Pod::named_by(environment.args.as_deref().unwrap_or_default())?;
    if let Some(pod) = pod.filter(|pod| !entry.passes(&pod.namespace, &pod.name)) {
        let addresses = result.ips.iter().flatten().map(|ip| ip.address.addr());
        let request = AddRequest {
            netns: netns.to_owned(),
            pod_name: pod.name,
            pod_namespace: pod.namespace,
            pod_uid: pod.uid,
            ips: addresses.map(|ip| IpConfig { address: Address { ip } }).collect(),
        };
        add(&entry, &request)?;
    }
    Ok(in_version(previous.get(), result.cni_version, version))
}

fn required<'a>(name: &str, value: Option<&'a String>) -> Result<&'a str, Failure> {
    match value {
        Some(value) => Ok(value),
        None => Err(Failure::new(code::INVALID_ENVIRONMENT, format!("{name} is not set"))),
    }
}

/// The pod as `CNI_ARGS` names it.
struct Pod {
    namespace: String,
    name: String,
    uid: Option<String>,
}

impl Pod {
    /// `None` for a sandbox that is not a Kubernetes pod.
    fn named_by(args: &str) -> Result<Option<Self>, Failure> {
        let complain = |why: String| Err(Failure::new(code::INVALID_ENVIRONMENT, why));
        let (mut namespace, mut name, mut uid) = (None, None, None);
        for pair in args.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return complain(format!("CNI_ARGS has {pair:?}, which is no KEY=VALUE"));
            };
            let value = Some(value.to_owned()).filter(|value| !value.is_empty());
            match key {
                "K8S_POD_NAMESPACE" => namespace = value,
                "K8S_POD_NAME" => name = value,
                "K8S_POD_UID" => uid = value,
                _ => {}
            }
        }
        match (namespace, name) {
            (Some(namespace), Some(name)) => Ok(Some(Pod { namespace, name, uid })),
            (None, None) => Ok(None),
            _ => complain(format!("CNI_ARGS {args:?} has K8S_POD_NAMESPACE or K8S_POD_NAME alone")),
        }
    }
}

/// The result as it was, in the network's version.
fn in_version(result: &str, version: Option<&RawValue>, wanted: &str) -> String {
    let quoted = format!("\"{wanted}\"");
    match version {
        Some(version) if version.get() == quoted => format!("{result}\n"),
        Some(version) => {
            // The result was borrowed from this text.
            let start = version.get().as_ptr().addr() - result.as_ptr().addr();
            let (before, after) = (&result[..start], &result[start + version.get().len()..]);
            format!("{before}{quoted}{after}\n")
        }
        None => {
            let rest = result.strip_prefix('{').unwrap_or(result);
            let comma = if rest.trim_start().starts_with('}') { "" } else { "," };
            format!("{{\"cniVersion\":{quoted}{comma}{rest}\n")
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Failure::new(code::TRY_AGAIN, format!("prepare to call the agent: {error}"))
    })
}

/// Asks the agent until it says yes or no, or the time is up.
fn add(entry: &Entry, request: &AddRequest) -> Result<(), Failure> {
    if !(1..=LONGEST_TIMEOUT).contains(&entry.timeout_seconds) {
        return Err(Failure::new(
            code::INVALID_CONFIGURATION,
            format!("timeoutSeconds {} is not from 1 to {LONGEST_TIMEOUT}", entry.timeout_seconds),
        ));
    }
    let pod = format!("{}/{}", request.pod_namespace, request.pod_name);
    runtime()?.block_on(async {
        let deadline = Instant::now() + Duration::from_secs(entry.timeout_seconds.into());
        let mut pause = PAUSE;
        // From the last answer: the time may run out during a request.
        let mut why = None;
        loop {
            let asked = ask(&entry.socket, Method::POST, ADD_PATH, Some(request));
            match timeout_at(deadline, asked).await {
                Ok(Ok((StatusCode::OK, _))) => return Ok(()),
                Ok(Ok((StatusCode::SERVICE_UNAVAILABLE, said))) => {
                    why = Some(format!("it is not ready: {said}"));
                }
                Ok(Ok((status, said))) => {
                    // The agent has already waited for the pod.
                    let late = status == StatusCode::GATEWAY_TIMEOUT;
                    let code = if late { code::TRY_AGAIN } else { code::REFUSED };
                    let msg = format!("redirect-agent cannot let pod {pod} start: {said} ({status})");
                    return Err(Failure::new(code, msg));
                }
                Ok(Err(error)) => why = Some(format!("{error:#}")),
                Err(_) => {}
            }
            if Instant::now() + pause >= deadline {
                let why = why.unwrap_or_else(|| "it does not answer".to_owned());
                return Err(Failure::new(
                    code::TRY_AGAIN,
                    format!(
                        "redirect-agent did not let pod {pod} start within {} s ({}): {why}; look whether \
                         its pod runs on this node; where it is to be gone for good, \
                         `redirect-agent cleanup` takes {PLUGIN} out of the node's CNI configuration",
                        entry.timeout_seconds,
                        entry.socket.display()
                    ),
                ));
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    })
}

/// Whether the agent is there: any answer counts, except that it is not ready.
fn status(entry: &Entry) -> Result<(), Failure> {
    runtime()?.block_on(async {
        let asked = ask(&entry.socket, Method::GET, "/healthz", None);
        let why = match timeout_at(Instant::now() + STATUS_TIMEOUT, asked).await {
            Ok(Ok((StatusCode::SERVICE_UNAVAILABLE, said))) => format!("it is not ready: {said}"),
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => format!("it did not answer within {STATUS_TIMEOUT:?}"),
        };
        let socket = entry.socket.display();
        let msg = format!("redirect-agent cannot let pods start ({socket}): {why}");
        Err(Failure::new(code::UNAVAILABLE, msg))
    })
}

/// The agent's answer: its status, and what it says, in one line.
async fn ask(
    socket: &PathBuf,
    method: Method,
    path: &str,
    request: Option<&AddRequest>,
) -> anyhow::Result<(StatusCode, String)> {
    let stream = UnixStream::connect(socket).await.context("connect to it")?;
    let (status, content) = exchange(stream, method, path, request).await?;
    let said = String::from_utf8_lossy(&content);
    let said: String = said
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LONGEST_MESSAGE)
        .collect();
    Ok((status, said))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(command: &str) -> Environment {
        Environment {
            command: Some(command.to_owned()),
            container: Some("c1".to_owned()),
            netns: Some("/proc/self/ns/net".to_owned()),
            interface: Some("eth0".to_owned()),
            args: Some("IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns".to_owned()),
        }
    }

    fn failure(environment: &Environment, input: &str) -> Failure {
        run(environment, input.as_bytes()).unwrap_err()
    }

    /// The configuration with this previous result.
    fn after(result: &str) -> String {
        format!(
            r#"{{"cniVersion":"1.0.0","name":"n","type":"redirect-cni","prevResult":{result}}}"#
        )
    }

    #[test]
    fn result_is_passed_on_to_the_byte_in_the_networks_version() {
        let odd = r#"{ "x" : 1e400, "cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24","y":{}},{"address":"fd00::2/64"}], "ips2":null }"#;
        let older = odd.replace("1.0.0", "0.4.0");
        let none = r#"{"ips":null}"#;
        for (result, expected) in [
            (odd, odd),
            (&older, odd),
            (none, r#"{"cniVersion":"1.0.0","ips":null}"#),
            ("{}", r#"{"cniVersion":"1.0.0"}"#),
            (r#"{"cniVersion":null}"#, r#"{"cniVersion":"1.0.0"}"#),
        ] {
            let answer = run(&environment("ADD"), after(result).as_bytes()).unwrap();
            assert_eq!(answer, format!("{expected}\n"));
        }
    }

    #[test]
    fn what_is_no_pod_of_kubernetes_passes() {
        for args in [None, Some(""), Some(";"), Some("A=1;K8S_POD_NAME=;K8S_POD_NAMESPACE=")] {
            let environment = Environment { args: args.map(str::to_owned), ..environment("ADD") };
            assert!(run(&environment, after("{}").as_bytes()).is_ok(), "{args:?}");
        }
        for args in ["K8S_POD_NAME=a", "K8S_POD_NAMESPACE=a", "nonsense"] {
            let environment = Environment { args: Some(args.to_owned()), ..environment("ADD") };
            assert_eq!(failure(&environment, &after("{}")).code, code::INVALID_ENVIRONMENT);
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_specifications_codes() {
        let add = environment("ADD");
        for (input, code) in [
            ("", code::DECODE),
            ("[]", code::DECODE),
            (&after("[]"), code::DECODE),
            (&after("[null,null]"), code::DECODE),
            (r#"["1.0.0",{}]"#, code::DECODE),
            (&after(r#"{"ips":[{"address":"10.0.0.2"}]}"#), code::DECODE),
            (&after("{").replace("}}", "}"), code::DECODE),
            (&after("null"), code::INVALID_CONFIGURATION),
            (r#"{"cniVersion":"0.2.0","prevResult":{}}"#, code::INCOMPATIBLE_VERSION),
            (r#"{"prevResult":{}}"#, code::INCOMPATIBLE_VERSION),
            (r#"{"cniVersion":"1.0.0","excludeNamespaces":1,"prevResult":{}}"#, code::DECODE),
        ] {
            assert_eq!(failure(&add, input).code, code, "{input}");
        }
        let failed = failure(&add, &after("null"));
        assert_eq!(failed.cni_version, "1.0.0");
        assert!(failed.msg.contains("after the plugin"), "{failed:?}");
        for environment in [
            Environment { netns: None, ..add.clone() },
            Environment { container: None, ..add.clone() },
            Environment { interface: None, ..add.clone() },
            Environment { command: None, ..add.clone() },
            Environment { command: Some("add".to_owned()), ..add },
        ] {
            assert_eq!(failure(&environment, &after("{}")).code, code::INVALID_ENVIRONMENT);
        }
    }

    #[test]
    fn timeout_out_of_bounds_is_refused() {
        let args = Some("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart".to_owned());
        let environment = Environment { args, ..environment("ADD") };
        for timeout in [0, 241] {
            let input =
                after("{}").replace("\"prev", &format!("\"timeoutSeconds\":{timeout},\"prev"));
            assert_eq!(failure(&environment, &input).code, code::INVALID_CONFIGURATION);
        }
    }

    #[test]
    fn a_pod_can_go_whatever_is_wrong() {
        for command in ["DEL", "GC"] {
            let environment =
                Environment { command: Some(command.to_owned()), ..Environment::default() };
            for input in ["", "{", &after("{}")] {
                assert_eq!(run(&environment, input.as_bytes()), Ok(String::new()));
            }
        }
    }

    #[test]
    fn check_fails_without_a_result_or_a_namespace() {
        let check = environment("CHECK");
        assert_eq!(run(&check, after("{}").as_bytes()), Ok(String::new()));
        assert_eq!(failure(&check, &after("null")).code, code::INVALID_CONFIGURATION);
        for gone in ["/proc/self/ns/nothing", "/proc/self/exe"] {
            let check = Environment { netns: Some(gone.to_owned()), ..check.clone() };
            assert_eq!(failure(&check, &after("{}")).code, code::UNKNOWN_CONTAINER, "{gone}");
        }
    }

    #[test]
    fn versions_are_told_in_the_one_that_is_asked_in() {
        for (input, version) in
            [("", "1.1.0"), ("{}", "1.1.0"), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0")]
        {
            let answer = run(&environment("VERSION"), input.as_bytes()).unwrap();
            assert_eq!(
                answer,
                format!(
                    "{{\"cniVersion\":\"{version}\",\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}}\n"
                )
            );
        }
    }
}
