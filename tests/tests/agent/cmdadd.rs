//! A pod's start, as the CNI plugin asks for it: `POST /cmdadd`. No process runs in the pods yet, and
//! nothing tells where they are but what is asked.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_agent::output::PodState;
use redirect_tests::apiserver::{ApiServer, Kind};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::hbone::zds::{Connection, Request};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::{Value, json};

use crate::api_server::Managed;
use crate::cluster::{Cluster, Manifest, Node, SOON, echo};
use crate::health::{assert_has, free_address};

both_families! {
    pod_is_redirected_from_its_first_connection_and_the_next_agent_adopts_it_by_the_record,
    plugin_of_istio_cni_asks_and_names_no_uid,
    api_server_tells_of_the_pod_only_after_the_plugin_has_asked,
    pod_that_bypasses_starts_at_once_untouched_and_may_enter_the_mesh_later,
    api_server_is_away_and_pods_wait_for_it,
    proxy_is_away_or_refuses_and_no_pod_starts_without_it,
    sandbox_is_made_anew_and_the_former_one_is_forgotten,
    address_is_used_again_while_its_former_owner_is_still_known,
    label_is_removed_while_the_pod_starts,
    second_sandbox_is_told_of_while_the_first_one_waits,
    cleanup_puts_back_what_only_the_records_tell_of,
}

const HASH: &str = "0123456789abcdef0123456789abcdef";

/// For what is to fail: nobody waits for long.
const IMPATIENT: &[&str] = &["--cni-timeout", "3s"];

/// A cluster on an API server, whose agent finds no pod by itself.
fn managed(flags: &[&str]) -> Result<Managed> {
    let mut managed = Managed::without_agent()?;
    managed.cluster.node.set_flags(flags);
    managed.cluster.node.hide_netns()?;
    Ok(managed)
}

/// The same, with an agent and a proxy, and a client that is called by pods.
pub fn running(flags: &[&str]) -> Result<Managed> {
    let mut managed = managed(flags)?;
    managed.cluster.node.start_agent()?;
    managed.cluster.node.start_proxy()?;
    Ok(managed)
}

/// A pod as it is before kubelet has written anything to its status.
fn starting(pod: &Pod) -> Manifest {
    Manifest::of(pod).with("", "status", json!({"phase": "Pending"}))
}

/// What our plugin asks.
pub fn request(pod: &Pod) -> Value {
    let mut request = request_of_istio_cni(pod);
    request["PodUID"] = uid(pod).into();
    request
}

pub fn uid(pod: &Pod) -> String {
    format!("uid-of-{}-{}", pod.namespace, pod.name)
}

/// What istio-cni's plugin asks.
fn request_of_istio_cni(pod: &Pod) -> Value {
    json!({
        "Netns": pod.netns_path(),
        "PodName": pod.name,
        "PodNamespace": pod.namespace,
        "IPs": [
            {"Interface": 2, "Address": {"IP": pod.v4, "Mask": "////AA=="}, "Gateway": "169.254.1.1"},
            {"Interface": 2, "Address": {"IP": pod.v6, "Mask": "//////////8AAAAAAAAAAA=="}, "Gateway": ""},
        ],
    })
}

fn add(node: &Node, request: &Value) -> Result<(u16, String)> {
    ask(&node.cni_socket(), "POST /cmdadd", &request.to_string())
}

fn ask(socket: &Path, what: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket).context("connect to the CNI socket")?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(
        stream,
        "{what} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("read an HTTP answer")?;
    let status = head.split(' ').nth(1).context("read a status line")?.parse()?;
    Ok((status, body.to_owned()))
}

pub fn assert_granted(node: &Node, request: &Value) -> Result<()> {
    let (status, why) = add(node, request)?;
    ensure!(status == 200, "{status} {why}; status: {:#?}", node.status());
    Ok(())
}

/// Asks as often as kubelet does, which makes a new sandbox each time.
fn wait_until_granted(node: &Node, request: &Value) -> Result<()> {
    let mut last = None;
    wait_for("a pod to be let start", SOON, || {
        last = Some(add(node, request)?);
        Ok(matches!(last, Some((200, _))).then_some(()))
    })
    .with_context(|| format!("the last answer: {last:?}"))
}

fn assert_refused(node: &Node, request: &Value, with: u16, because: &str) -> Result<()> {
    let (status, why) = add(node, request)?;
    ensure!(status == with && why.contains(because), "{status} {why}");
    Ok(())
}

fn joined<T>(handle: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    handle.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// Adds a pod to a node, and tells the API server and the proxies of it.
pub fn new_pod(managed: &mut Managed, name: &str, mode: &str) -> Result<Pod> {
    let pod = managed.cluster.topology.add_pod(0, "shop", name)?;
    managed.cluster.node.write(&Manifest::of(&pod))?;
    managed.put(&starting(&pod).mode(mode));
    Ok(pod)
}

/// As kubelet does when the sandbox is there.
pub fn write_status(api: &ApiServer, pod: &Pod) {
    api.edit(Kind::Pod, &pod.namespace, &pod.name, |object| {
        object["status"] = Manifest::of(pod).object()["status"].clone();
    });
}

pub fn assert_redirected(cluster: &Cluster, pod: &Pod, family: Family) -> Result<()> {
    cluster.node.assert_outbound(pod, &cluster.client, family)?;
    cluster.node.assert_inbound(&cluster.client, pod, family)
}

fn records(node: &Node) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(node.state_dir().join("sandboxes")).context("list the records")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn pod_is_redirected_from_its_first_connection_and_the_next_agent_adopts_it_by_the_record(
    family: Family,
) -> Result<()> {
    let mut managed = running(&[])?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let untouched = footprint(&cart.netns)?;
    let Managed { cluster, api } = &mut managed;
    let _apps = (echo(&cart)?, echo(&cluster.client)?);
    assert_granted(&cluster.node, &request(&cart))?;
    assert_redirected(cluster, &cart, family)?;
    let redirection = api.annotation("shop", "cart", "ambient.istio.io/redirection");
    assert_eq!(redirection.as_deref(), Some("enabled"));

    // The next agent knows it although it has no address in its status, and no process.
    cluster.node.kill_agent()?;
    cluster.node.start_agent()?;
    cluster.node.wait_for_state(&cart, PodState::Enrolled)?;
    assert_redirected(cluster, &cart, family)?;

    // Asked again, as by a plugin that did not get the answer.
    assert_granted(&cluster.node, &request(&cart))?;
    // At last kubelet writes its status.
    write_status(api, &cart);
    cluster.node.wait_until_complete(&cart)?;
    assert_redirected(cluster, &cart, family)?;

    // It leaves no more than any other.
    api.put(Kind::Pod, Manifest::of(&cart).object());
    cluster.node.wait_for_state(&cart, PodState::Bypassing)?;
    assert_unchanged(&cart.netns, &untouched)?;
    assert_eq!(records(&cluster.node)?, [format!("{}.json", uid(&cart))]);
    api.delete(Kind::Pod, "shop", "cart");
    wait_for("the record to be gone", SOON, || Ok(records(&cluster.node)?.is_empty().then_some(())))
}

fn plugin_of_istio_cni_asks_and_names_no_uid(family: Family) -> Result<()> {
    let mut managed = running(&[])?;
    let cart = managed.cluster.topology.add_pod(0, "shop", "cart")?;
    managed.cluster.node.write(&Manifest::of(&cart))?;
    // A former pod of its name is still ending.
    let ending = json!("2026-01-01T00:00:00Z");
    let former = Manifest::of(&cart).uid("former").mode("none");
    managed.put(&former.with("/metadata", "deletionTimestamp", ending));
    let Cluster { node, client, .. } = &managed.cluster;
    node.wait_for_state(&cart, PodState::Bypassing)?;
    let _apps = (echo(&cart)?, echo(client)?);
    let (status, why) = asked_too_early(node, &request_of_istio_cni(&cart), || {
        managed.put(&starting(&cart).mode("ambient"));
    })?;
    assert_eq!(status, 200, "{why}");
    assert_redirected(&managed.cluster, &cart, family)
}

fn api_server_tells_of_the_pod_only_after_the_plugin_has_asked(family: Family) -> Result<()> {
    let mut managed = running(&[])?;
    let cart = managed.cluster.topology.add_pod(0, "shop", "cart")?;
    managed.cluster.node.write(&Manifest::of(&cart))?;
    let Cluster { node, client, .. } = &managed.cluster;
    let _apps = (echo(&cart)?, echo(client)?);
    // A static pod: kubelet knows it by another uid.
    let manifest = starting(&cart).mode("ambient");
    let manifest =
        manifest.with("/metadata/annotations", "kubernetes.io/config.mirror", HASH.into());
    let manifest = manifest.with("/metadata/annotations", "kubernetes.io/config.hash", HASH.into());
    let mut request = request(&cart);
    request["PodUID"] = HASH.into();
    let (status, why) = asked_too_early(node, &request, || managed.put(&manifest))?;
    assert_eq!(status, 200, "{why}");
    assert_redirected(&managed.cluster, &cart, family)
}

/// Asks for a pod that the agent does not know yet, and lets it know; what is answered.
fn asked_too_early(node: &Node, request: &Value, tell: impl FnOnce()) -> Result<(u16, String)> {
    thread::scope(|scope| {
        let asking = scope.spawn(|| add(node, request));
        wait_for("the agent to wait", SOON, || {
            Ok(node.agent_log()?.contains("waits to start").then_some(()))
        })?;
        ensure!(!asking.is_finished(), "it was answered before the pod was known");
        tell();
        joined(asking)
    })
}

fn pod_that_bypasses_starts_at_once_untouched_and_may_enter_the_mesh_later(
    family: Family,
) -> Result<()> {
    let mut managed = running(IMPATIENT)?;
    let cart = new_pod(&mut managed, "cart", "none")?;
    let unknown = managed.cluster.topology.add_pod(0, "excluded", "unknown")?;
    let untouched = (footprint(&cart.netns)?, footprint(&unknown.netns)?);
    let Managed { cluster, .. } = &managed;
    let node = &cluster.node;
    let _apps = (echo(&cart)?, echo(&cluster.client)?);
    assert_granted(node, &request(&cart))?;
    // What cannot be recorded of it does not matter.
    let mut odd = request(&cart);
    odd["Netns"] = "/nonexistent".into();
    assert_granted(node, &odd)?;
    assert_granted(node, &request(&cart))?;
    // The source need not know it.
    assert_granted(node, &request(&unknown))?;
    node.wait_for_state(&cart, PodState::Bypassing)?;
    assert_unchanged(&cart.netns, &untouched.0)?;
    assert_unchanged(&unknown.netns, &untouched.1)?;
    node.assert_direct(&cart, &cluster.client, family)?;
    node.assert_direct(&cluster.client, &cart, family)?;

    managed.put(&starting(&cart).mode("ambient"));
    node.wait_until_complete(&cart)?;
    assert_redirected(cluster, &cart, family)
}

fn api_server_is_away_and_pods_wait_for_it(family: Family) -> Result<()> {
    let mut managed = running(IMPATIENT)?;
    let cart = managed.cluster.topology.add_pod(0, "shop", "cart")?;
    managed.cluster.node.write(&Manifest::of(&cart))?;
    let untouched = footprint(&cart.netns)?;
    managed.api.go_away()?;
    managed.api.put(Kind::Pod, starting(&cart).mode("ambient").object());
    assert_refused(&managed.cluster.node, &request(&cart), 404, "does not know it")?;
    assert_unchanged(&cart.netns, &untouched)?;

    // An agent that starts meanwhile knows nobody, and says so; what is never in the mesh passes.
    managed.cluster.node.stop_agent()?;
    let mut agent = managed.cluster.node.spawn_agent()?;
    agent.wait_for_log("waiting for the pods of this node", SOON)?;
    assert_refused(&managed.cluster.node, &request(&cart), 503, "is starting")?;
    let mut excluded = request(&cart);
    excluded["PodNamespace"] = "kube-system".into();
    assert_granted(&managed.cluster.node, &excluded)?;
    ensure!(agent.terminate(SOON)?.success(), "an agent that waits cannot be stopped");
    assert_unchanged(&cart.netns, &untouched)?;

    managed.api.come_back()?;
    managed.cluster.node.start_agent()?;
    let Cluster { node, client, .. } = &managed.cluster;
    let _apps = (echo(&cart)?, echo(client)?);
    wait_until_granted(node, &request(&cart))?;
    assert_redirected(&managed.cluster, &cart, family)
}

fn proxy_is_away_or_refuses_and_no_pod_starts_without_it(family: Family) -> Result<()> {
    let mut managed = managed(IMPATIENT)?;
    managed.cluster.node.start_agent()?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let Managed { cluster, .. } = &mut managed;
    let _apps = (echo(&cart)?, echo(&cluster.client)?);
    assert_refused(&cluster.node, &request(&cart), 504, "no proxy is connected")?;

    let refusing = Refusing::start(&cluster.node)?;
    assert_refused(&cluster.node, &request(&cart), 504, "not today")?;
    drop(refusing);

    cluster.node.start_proxy()?;
    wait_until_granted(&cluster.node, &request(&cart))?;
    assert_redirected(cluster, &cart, family)
}

/// A proxy that refuses every workload, until it is dropped.
struct Refusing {
    _runtime: tokio::runtime::Runtime,
}

impl Refusing {
    fn start(node: &Node) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start a runtime")?;
        let socket = node.zds_socket();
        let connection = runtime.block_on(async {
            let connection = Connection::connect(&socket).await?;
            connection.send_hello().await?;
            anyhow::Ok(connection)
        })?;
        runtime.spawn(async move {
            while let Some(request) = connection.recv().await? {
                let error = if let Request::Add { .. } = request { "not today" } else { "" };
                connection.send_ack(error).await?;
            }
            anyhow::Ok(())
        });
        Ok(Self { _runtime: runtime })
    }
}

fn sandbox_is_made_anew_and_the_former_one_is_forgotten(family: Family) -> Result<()> {
    // While the API server is away, what is known of the pod is good enough.
    for (former_lives, is_away) in [(true, true), (false, false)] {
        let mut managed = running(&[])?;
        let former = new_pod(&mut managed, "cart", "ambient")?;
        let mut anew = managed.cluster.topology.add_pod(0, "shop", "cart-anew")?;
        anew.name = "cart".to_owned();
        let Managed { cluster, api } = &mut managed;
        assert_granted(&cluster.node, &request(&former))?;
        let mut former = Some(former);
        if let Some(former) = &former {
            // What kubelet knows is the former one's.
            write_status(api, former);
        }
        cluster.node.wait_until_complete(&anew)?;
        if !former_lives {
            former = None;
        }
        if is_away {
            api.go_away()?;
        }
        let _apps = (echo(&anew)?, echo(&cluster.client)?);
        assert_granted(&cluster.node, &request(&anew))?;
        assert_redirected(cluster, &anew, family)?;
        let status = cluster.node.pod(&anew)?.context("the pod is not in status")?;
        assert_eq!(status.netns.map(u64::from), Some(anew.netns.inode()?));
        assert_eq!(status.ips, [anew.ip(Family::V4), anew.ip(Family::V6)]);
        drop(former);
        if is_away {
            api.come_back()?;
        }
        write_status(api, &anew);
        cluster.node.wait_until_complete(&anew)?;
        assert_redirected(cluster, &anew, family)?;
    }
    Ok(())
}

/// The network gives an address away as soon as a sandbox is gone; the API server may tell of its
/// former owner for longer.
fn address_is_used_again_while_its_former_owner_is_still_known(family: Family) -> Result<()> {
    let mut managed = running(&["--verify-interval", "1h"])?;
    let cart = managed.cluster.topology.add_pod(0, "shop", "cart")?;
    managed.cluster.node.write(&Manifest::of(&cart))?;
    let former = |mode: &str| {
        let former = Manifest::of(&cart).with("/metadata", "name", json!("former"));
        former.uid("former").mode(mode)
    };
    managed.put(&former("none"));
    let node = &managed.cluster.node;
    wait_for("the former owner", SOON, || {
        let pods = node.status()?.pods;
        Ok(pods.iter().any(|pod| pod.name == "former" && pod.ips.len() == 2).then_some(()))
    })?;
    managed.put(&starting(&cart).mode("ambient"));
    let _apps = (echo(&cart)?, echo(&managed.cluster.client)?);
    assert_granted(node, &request(&cart))?;
    assert_redirected(&managed.cluster, &cart, family)?;
    managed.api.delete(Kind::Pod, "shop", "former");
    wait_for("the former owner to be gone", SOON, || {
        Ok((!node.status()?.pods.iter().any(|pod| pod.name == "former")).then_some(()))
    })?;
    managed.put(&Manifest::of(&cart).mode("ambient"));
    node.wait_until_complete(&cart)?;
    assert_redirected(&managed.cluster, &cart, family)
}

fn label_is_removed_while_the_pod_starts(family: Family) -> Result<()> {
    let mut managed = managed(&[])?;
    managed.cluster.node.start_agent()?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let untouched = footprint(&cart.netns)?;
    let Cluster { node, client, .. } = &managed.cluster;
    let _apps = (echo(&cart)?, echo(client)?);
    let (status, why) = while_it_starts(node, &cart, || {
        managed.put(&starting(&cart));
        Ok(())
    })?;
    assert_eq!(status, 200, "{why}");
    assert_unchanged(&cart.netns, &untouched)?;
    node.assert_direct(&cart, client, family)?;
    node.assert_direct(client, &cart, family)
}

/// Does something while the pod's start waits for a proxy; what the plugin is told.
fn while_it_starts(
    node: &Node,
    pod: &Pod,
    act: impl FnOnce() -> Result<()>,
) -> Result<(u16, String)> {
    thread::scope(|scope| {
        let asking = scope.spawn(|| add(node, &request(pod)));
        node.wait_for_pod("to wait for a proxy", pod, |p| {
            p.message.as_ref().is_some_and(|message| message.contains("no proxy is connected"))
        })?;
        ensure!(!asking.is_finished(), "it was answered before there was a proxy");
        act()?;
        joined(asking)
    })
}

fn second_sandbox_is_told_of_while_the_first_one_waits(family: Family) -> Result<()> {
    let mut managed = managed(&[])?;
    managed.cluster.node.start_agent()?;
    let first = new_pod(&mut managed, "cart", "ambient")?;
    let mut second = managed.cluster.topology.add_pod(0, "shop", "cart-anew")?;
    second.name = "cart".to_owned();
    let Cluster { node, client, .. } = &mut managed.cluster;
    let _apps = (echo(&second)?, echo(client)?);
    let socket = node.cni_socket();
    let anew = request(&second).to_string();
    let mut asking = None;
    let (status, why) = while_it_starts(node, &first, || {
        asking = Some(thread::spawn(move || ask(&socket, "POST /cmdadd", &anew)));
        Ok(())
    })?;
    assert!(status == 409 && why.contains("another one has taken its place"), "{status} {why}");
    node.start_proxy()?;
    let asking = asking.context("nobody asks")?;
    let (status, why) = asking.join().map_err(|_| anyhow!("a thread panicked"))??;
    assert_eq!(status, 200, "{why}");
    assert_redirected(&managed.cluster, &second, family)
}

fn cleanup_puts_back_what_only_the_records_tell_of(family: Family) -> Result<()> {
    let mut managed = running(&[])?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let untouched = footprint(&cart.netns)?;
    let Cluster { node, client, .. } = &mut managed.cluster;
    let _apps = (echo(&cart)?, echo(client)?);
    assert_granted(node, &request(&cart))?;
    node.assert_outbound(&cart, client, family)?;
    node.stop_agent()?;
    let (done, said) = node.cleanup()?;
    assert!(done, "{said}");
    assert_unchanged(&cart.netns, &untouched)?;
    assert!(!node.state_dir().exists());
    node.assert_direct(&cart, client, family)?;
    node.assert_direct(client, &cart, family)
}

#[test]
fn pod_is_deleted_while_it_starts() -> Result<()> {
    let mut managed = managed(&[])?;
    managed.cluster.node.start_agent()?;
    for (name, deleted_at_once) in [("gone", true), ("ending", false)] {
        let pod = new_pod(&mut managed, name, "ambient")?;
        let Managed { cluster, api } = &managed;
        let since = Instant::now();
        let (status, why) = while_it_starts(&cluster.node, &pod, || {
            if deleted_at_once {
                api.delete(Kind::Pod, "shop", name);
            } else {
                api.edit(Kind::Pod, "shop", name, |pod| {
                    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
                    pod["metadata"]["deletionGracePeriodSeconds"] = 30.into();
                });
            }
            Ok(())
        })?;
        assert!(status == 409 && why.contains("deleted"), "{status} {why}");
        assert!(since.elapsed() < SOON, "it waited to the end");
    }
    Ok(())
}

#[test]
fn agent_is_stopped_while_a_pod_starts_and_the_plugin_is_told_to_try_again() -> Result<()> {
    let mut managed = managed(&[])?;
    managed.cluster.node.start_agent()?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let node = &mut managed.cluster.node;
    let socket = node.cni_socket();
    let asking = {
        let request = request(&cart).to_string();
        thread::spawn(move || ask(&socket, "POST /cmdadd", &request))
    };
    node.wait_for_pod("to wait for a proxy", &cart, |p| p.message.is_some())?;
    node.stop_agent()?;
    let (status, why) = asking.join().map_err(|_| anyhow!("a thread panicked"))??;
    assert!(status == 503 && why.contains("is stopping"), "{status} {why}");
    assert!(!node.cni_socket().exists());
    Ok(())
}

#[test]
fn socket_is_for_root_alone_and_what_makes_no_sense_is_refused() -> Result<()> {
    let mut managed = managed(IMPATIENT)?;
    let health = free_address()?;
    managed.cluster.node.serve_health(health);
    managed.cluster.node.start_agent()?;
    managed.cluster.node.start_proxy()?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let node = &managed.cluster.node;
    let socket = node.cni_socket();
    let mode = |path: &Path| anyhow::Ok(fs::metadata(path)?.permissions().mode() & 0o777);
    assert_eq!(mode(&socket)?, 0o600);
    assert_eq!(mode(socket.parent().context("no directory")?)?, 0o700);

    let untouched = footprint(&cart.netns)?;
    let with = |field: &str, value: Value| {
        let mut request = request(&cart);
        request[field] = value;
        request.to_string()
    };
    for (what, body, expected) in [
        ("POST /cmdadd", String::new(), 400),
        ("POST /cmdadd", "{".to_owned(), 400),
        ("POST /cmdadd", "\u{0}\u{ffff}".to_owned(), 400),
        ("POST /cmdadd", "[]".to_owned(), 400),
        ("POST /cmdadd", with("PodName", "../cart".into()), 400),
        ("POST /cmdadd", with("PodNamespace", "".into()), 400),
        ("POST /cmdadd", with("IPs", json!([{"Address": {"IP": "10.0.0"}}])), 400),
        ("GET /cmdadd", with("PodName", "cart".into()), 405),
        ("POST /elsewhere", with("PodName", "cart".into()), 404),
        ("POST /cmdadd", with("PodName", "unknown".into()), 404),
        ("POST /cmdadd", with("PodUID", "another".into()), 404),
        ("POST /cmdadd", with("Netns", "/nonexistent".into()), 422),
        ("POST /cmdadd", with("Netns", "/etc/passwd".into()), 422),
        ("POST /cmdadd", with("Netns", "/proc/1/ns/net".into()), 422),
        ("POST /cmdadd", with("Netns", "/proc/1/ns/mnt".into()), 422),
        ("POST /cmdadd", with("IPs", json!([{"Address": {"IP": "10.9.9.9"}}])), 422),
    ] {
        let (status, why) = ask(&socket, what, &body)?;
        assert!(
            status == expected && (status == 405 || !why.is_empty()),
            "{what} {body}: {status} {why}"
        );
    }
    assert_unchanged(&cart.netns, &untouched)?;
    assert_eq!(records(node)?, Vec::<String>::new());
    assert_granted(node, &request(&cart))?;
    // Neither of the two that are no such request counts.
    assert_has(health, r#"redirect_cni_requests_total{operation="add",result="success"} 1"#)?;
    assert_has(health, r#"redirect_cni_requests_total{operation="add",result="failure"} 14"#)
}

#[test]
fn many_pods_start_at_once_and_a_broken_one_delays_nobody() -> Result<()> {
    const PODS: usize = 50;
    let mut managed = running(&[])?;
    let mut pods = Vec::new();
    for n in 0..PODS + 4 {
        pods.push(new_pod(&mut managed, &format!("pod-{n}"), "ambient")?);
    }
    let broken = pods.pop().context("no pod")?;
    let Cluster { node, client, .. } = &managed.cluster;
    let (few, many) = pods.split_at(3);
    let mut alone = Vec::new();
    for pod in few {
        let since = Instant::now();
        assert_granted(node, &request(pod))?;
        alone.push(since.elapsed());
    }
    // What runs already is given longer than this to settle; what is to start has nothing to settle.
    let alone = alone.into_iter().min().context("no pod")?;
    assert!(alone < Duration::from_millis(400), "{alone:?}");

    let mut took = thread::scope(|scope| {
        let asking: Vec<_> = many
            .iter()
            .map(|pod| {
                scope.spawn(move || {
                    let since = Instant::now();
                    assert_granted(node, &request(pod))?;
                    anyhow::Ok(since.elapsed())
                })
            })
            .collect();
        let mut request = request(&broken);
        request["IPs"] = json!([{"Address": {"IP": "10.9.9.9"}}]);
        assert_refused(node, &request, 422, "does not carry address 10.9.9.9")?;
        asking.into_iter().map(joined).collect::<Result<Vec<Duration>>>()
    })?;
    took.sort();
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    eprintln!("one pod: {alone:?}; {PODS} at once: median {median:?}, longest {longest:?}");
    let _apps = (echo(client)?, pods.iter().map(echo).collect::<Result<Vec<_>>>()?);
    for pod in &pods {
        for family in [Family::V4, Family::V6] {
            assert_redirected(&managed.cluster, pod, family)?;
        }
    }
    Ok(())
}
