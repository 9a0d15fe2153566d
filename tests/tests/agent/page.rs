//! The status page, as a browser shows it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::app::Call;
use redirect_tests::browser::{Browser, Screen};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cgroup::{Cgroup, unified};
use crate::cluster::{Cluster, Manifest, PORT, SOON};

const HEALTH: u16 = 15014;
const URL: &str = "http://127.0.0.1:15014/";
/// What a user who may write manifests could put into a page.
const HOSTILE: &str = "\"><script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(2)>";
/// A word that no line of a phone has room for.
const LONG: &str =
    "an-annotation-value-of-a-single-word-that-is-much-longer-than-any-line-of-a-phone-can-be";

const DESKTOP: Screen = Screen { width: 780, height: 800, dark: false };
const PHONE: Screen = Screen { width: 390, height: 844, dark: true };

/// A node whose agent serves its health to everybody, with these flags.
fn start(flags: &[&str]) -> Result<Cluster> {
    let mut cluster = Cluster::without_agent(flags)?;
    cluster.node.use_node_network(cluster.topology.node(0));
    cluster.node.serve_health(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), HEALTH));
    cluster.node.start_agent()?;
    Ok(cluster)
}

/// The whole answer to a request from a namespace.
fn ask(from: &Netns, to: SocketAddr, method: &str, headers: &str) -> Result<String> {
    from.run(|| {
        let mut stream = TcpStream::connect(to).context("connect to the agent")?;
        write!(stream, "{method} / HTTP/1.1\r\n{headers}\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

#[test]
fn page_is_served_when_asked_for_and_to_whom_it_is_for() -> Result<()> {
    let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), HEALTH);
    let ok = "HTTP/1.1 200 OK\r\n";
    let absent = "HTTP/1.1 404 Not Found\r\n";
    for (flags, local, others) in
        [(&[] as &[&str], absent, absent), (&["--page"], ok, absent), (&["--page=all"], ok, ok)]
    {
        let cluster = start(flags)?;
        let [node, other] = [0, 1].map(|n| cluster.topology.node(n));
        let host = "Host: localhost:8080\r\n";
        let answer = ask(node, loopback, "GET", host)?;
        ensure!(answer.starts_with(local), "{flags:?}: {answer}");
        for family in [Family::V4, Family::V6] {
            let address = SocketAddr::new(cluster.topology.node_ip(0, family), HEALTH);
            let answer = ask(other, address, "GET", &format!("Host: {address}\r\n"))?;
            ensure!(answer.starts_with(others), "{flags:?}, {family:?}: {answer}");
        }
        if local == absent {
            ensure!(answer.ends_with("not found; there are /healthz, /readyz and /metrics\n"));
            continue;
        }
        for header in [
            "content-type: text/html; charset=utf-8",
            "content-security-policy: default-src 'none'; style-src 'sha256-",
            "cache-control: no-store",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
        ] {
            ensure!(answer.contains(&format!("\r\n{header}")), "no {header} in {answer}");
        }
        ensure!(!answer.to_lowercase().contains("set-cookie"), "{answer}");
        let head = ask(node, loopback, "HEAD", host)?;
        ensure!(head.starts_with(ok) && head.ends_with("\r\n\r\n"), "{head}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let answer = ask(node, loopback, method, host)?;
            ensure!(answer.starts_with("HTTP/1.1 405 "), "{method}: {answer}");
        }
        // A name of others that leads here.
        let answer = ask(node, loopback, "GET", "Host: evil.example:15014\r\n")?;
        ensure!(answer.starts_with("HTTP/1.1 421 ") && !answer.contains("server"), "{answer}");
    }
    Ok(())
}

/// See [`troubled`].
struct Troubled {
    // Dropped in this order: processes, pods, and the proxy's cgroup.
    cluster: Cluster,
    payments: Pod,
    _web: Pod,
    _cgroup: Cgroup,
}

/// A node with pods in several states, of which somebody has chosen the worst words.
fn troubled() -> Result<Troubled> {
    let cgroup = Cgroup::new(&unified()?, "ztunnel")?;
    let mut cluster = start(&["--page", "--proxy-grace", "100ms"])?;
    let payments = cluster.topology.add_pod(0, "bank", "payments")?;
    let web = cluster.topology.add_pod(0, "shop", "web")?;
    let Cluster { node, server, client, topology } = &mut cluster;
    node.start_proxy_in(&cgroup)?;
    node.enroll(server)?;
    let annotation = |name: &str| format!("traffic.redirect-agent/{name}");
    let ports = annotation("excludeOutboundPorts");
    let web_manifest =
        Manifest::of(&web).mode("ambient").with("/metadata/annotations", &ports, json!("3306"));
    node.write(&web_manifest)?;
    node.wait_for_state(&web, PodState::Enrolled)?;

    // A first look, without a proxy, and what is refused after it.
    node.kill_proxy()?;
    node.wait_for_state(server, PodState::Degraded)?;
    let page = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), HEALTH);
    let before = ask(topology.node(0), page, "GET", "Host: localhost\r\n")?;
    ensure!(before.contains("<title>no proxy"), "{before}");
    let call = || Call::to(client.addr(Family::V4, PORT)).open(&server.netns);
    wait_for("a call to be refused", SOON, || {
        let _in_vain = call().is_err();
        let pod = node.pod(server)?.context("no pod")?;
        let refused = pod.counters.get("refused_proxy_away").is_some_and(|count| *count > 0);
        Ok(refused.then_some(()))
    })?;
    node.start_proxy_in(&cgroup)?;
    node.wait_for_state(server, PodState::Enrolled)?;

    // It has an address that no interface has.
    let ips = json!([{"ip": web.v4}, {"ip": web.v6}, {"ip": "10.64.0.99"}]);
    node.write(&web_manifest.with("/status", "podIPs", ips))?;
    node.wait_for_state(&web, PodState::Degraded)?;
    let dns = "ambient.istio.io/dns-capture";
    let hostile = Manifest::of(&payments)
        .mode("ambient")
        .with("/metadata/annotations", dns, json!(HOSTILE))
        .with("/metadata/annotations", &annotation("excludeInboundPorts"), json!(LONG));
    node.write(&hostile)?;
    let said = format!("load test {HOSTILE}");
    node.tell("unenroll", &["bank", "--for", "20m", "--reason", &said])?;
    node.wait_for_state(&payments, PodState::Bypassing)?;
    Ok(Troubled { cluster, payments, _web: web, _cgroup: cgroup })
}

/// Checks what the browser made of the page, however it is shown.
fn assert_sound(browser: &mut Browser, screen: Screen) -> Result<()> {
    assert_eq!(browser.requests(), [URL], "requests of the page");
    assert_eq!(browser.complaints(), [""; 0], "complaints of the browser");
    let elements = "document.querySelectorAll('script,img,iframe,form,link,object').length";
    assert_eq!(browser.evaluate(elements)?, json!(0), "elements that the template has not");
    let wide = "document.documentElement.scrollWidth";
    assert_eq!(browser.evaluate(wide)?, json!(screen.width), "width of the page");
    // Its own stylesheet is in force.
    let ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")?;
    let expected = if screen.dark { "rgb(13, 17, 23)" } else { "rgb(244, 245, 247)" };
    assert_eq!(ground, json!(expected), "dark or light");
    Ok(())
}

/// The text of each element that a selector finds.
fn texts(browser: &mut Browser, selector: &str) -> Result<Vec<String>> {
    let all = format!("[...document.querySelectorAll({selector:?})].map(e => e.textContent)");
    let found = browser.evaluate(&all)?;
    serde_json::from_value(found).context("read texts")
}

#[test]
fn browser_shows_the_page_on_a_desktop_and_on_a_phone() -> Result<()> {
    let troubled = troubled()?;
    let Troubled { cluster, .. } = &troubled;
    let mut browser = Browser::start(cluster.topology.node(0), cluster.topology.dir())?;
    browser.open(URL, DESKTOP)?;
    assert_sound(&mut browser, DESKTOP)?;
    assert_eq!(texts(&mut browser, "title")?, ["1 not ready · node0"]);
    assert_eq!(
        texts(&mut browser, "#pods tbody .name")?,
        ["bank/payments", "shop/server", "shop/web"]
    );
    let states = texts(&mut browser, "#pods tbody .badge")?;
    assert_eq!(states, ["bypassing", "enrolled", "degraded"]);
    let wrong = texts(&mut browser, "#wrong .card")?;
    ensure!(wrong.len() == 2, "{wrong:?}");
    ensure!(wrong[0].contains("shop/web") && wrong[0].contains("10.64.0.99"), "{wrong:?}");
    ensure!(wrong[1].contains("bank/payments") && wrong[1].contains(HOSTILE), "{wrong:?}");
    let next = texts(&mut browser, "#wrong .next")?;
    assert_eq!(next[0], "redirect-agent explain shop/web");
    let overrides = texts(&mut browser, "#overrides .card")?.join("\n");
    ensure!(overrides.contains(&format!("(load test {HOSTILE}): 1 pod")), "{overrides}");
    ensure!(overrides.contains("ends in 19m"), "{overrides}");
    let refused = texts(&mut browser, "#refusals tbody tr")?.join("\n");
    ensure!(refused.contains("shop/serverrefused_proxy_away+"), "{refused}");
    let settings = texts(&mut browser, "#pods tbody tr:last-child td:last-child")?;
    ensure!(settings[0].contains("not to port 3306"), "{settings:?}");
    browser.open(URL, PHONE)?;
    assert_sound(&mut browser, PHONE)?;
    // A column would have no room.
    let beside = browser.evaluate("document.querySelector('#pods td').offsetWidth")?;
    ensure!(beside.as_u64().is_some_and(|width| width < 390), "{beside}");
    drop(browser);
    take_pictures(&troubled)
}

/// The pictures for docs/operations.md, if they are asked for: of the same node, without what no decent user
/// writes.
fn take_pictures(Troubled { cluster, payments, .. }: &Troubled) -> Result<()> {
    const VARIABLE: &str = "UPDATE_SCREENSHOTS";
    if env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    let Cluster { node, topology, .. } = cluster;
    node.tell("auto", &["bank"])?;
    node.tell("unenroll", &["bank", "--for", "20m", "--reason", "load test"])?;
    node.write(&Manifest::of(payments).mode("ambient"))?;
    wait_for("decent words", SOON, || {
        let text = node.tell("status", &[])?;
        Ok((!text.contains("alert")).then_some(()))
    })?;
    let mut browser = Browser::start(topology.node(0), topology.dir())?;
    for (name, screen) in [("page-light", DESKTOP), ("page-phone-dark", PHONE)] {
        // Not an older one.
        wait_for("a page without the former words", SOON, || {
            browser.open(URL, screen)?;
            Ok((browser.evaluate("document.body.textContent.includes('alert')")? == false)
                .then_some(()))
        })?;
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/{name}.png"));
        fs::write(&file, browser.screenshot()?).with_context(|| format!("write {file:?}"))?;
    }
    Ok(())
}
