//! `explain` names what keeps one pod from another, whatever it is: thirteen causes, each set up as it happens.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use redirect_agent::explain::{Area, Cause, Explanation};
use redirect_agent::output::{PodState, PodStatus};
use redirect_agent::source::EventKind;
use redirect_tests::app::{App, Behaviour, Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::process::{finish, wait_for};
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, echo};
use crate::drift::{detach, index};

both_families! {
    deleted_rule_is_named,
    application_that_listens_on_loopback_only_is_named,
    missing_address_is_named,
}

/// How the agent is kept from repairing what a test breaks, other than at once.
const SELDOM: [&str; 2] = ["--verify-interval", "1h"];

/// What `explain` says, as JSON.
fn explain(node: &Node, args: &[&str]) -> Result<Explanation> {
    let output = node.command("explain")?.args(args).args(["-o", "json"]).output()?;
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!("explain {args:?} said: {}", String::from_utf8_lossy(&output.stderr))
    })
}

/// What it says as text.
fn text(node: &Node, args: &[&str]) -> Result<String> {
    let output = node.command("explain")?.args(args).output()?;
    String::from_utf8(output.stdout).context("read what explain prints")
}

/// Checks the verdict, and one line of the text.
fn assert_verdict(
    node: &Node,
    args: &[&str],
    (area, cause): (Area, Cause),
    line: &str,
) -> Result<Explanation> {
    let explanation = wait_for(&format!("explain {args:?} to say {cause:?}"), SOON, || {
        let explanation = explain(node, args)?;
        Ok((explanation.verdict.cause == cause).then_some(explanation))
    })
    .with_context(|| text(node, args).unwrap_or_default())?;
    ensure!(explanation.verdict.area == area, "{:#?}", explanation.verdict);
    let text = text(node, args)?;
    ensure!(text.lines().any(|l| l.contains(line)), "no line has {line:?}:\n{text}");
    Ok(explanation)
}

/// The call that is explained.
fn call(from: &Pod, to: &Pod) -> [String; 2] {
    [from.to_string(), format!("{to}:{PORT}")]
}

fn both(call: &[String; 2]) -> [&str; 2] {
    call.each_ref().map(String::as_str)
}

#[test]
fn pod_in_the_mesh_is_explained_and_nothing_is_wrong_with_it() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(&second)?);
    let shop = Manifest::of_namespace("shop").mode("ambient");
    node.write(&shop.with("/metadata/labels", "istio.io/use-waypoint", json!("gw")))?;
    node.write(&Manifest::of(server).with(
        "/metadata/annotations",
        "traffic.redirect-agent/excludeOutboundPorts",
        json!("3306"),
    ))?;
    node.write(&Manifest::of(&second))?;
    for pod in [server, &second] {
        node.wait_until_enrolled(pod)?;
    }

    let nothing = (Area::None, Cause::NothingFound);
    let name = server.to_string();
    let alone = assert_verdict(node, &[&name], nothing, "  application  listens at [::]:8080")?;
    assert_eq!(
        (alone.api_version.as_str(), alone.kind.as_str()),
        ("redirect-agent/v1", "Explanation")
    );
    let decision = alone.pod.decision.context("no decision")?;
    assert!(decision.enrolled);
    let last = decision.rules.last().context("no rule")?;
    assert_eq!(
        (last.object.as_str(), last.asks.as_str()),
        ("namespace shop", "label istio.io/dataplane-mode")
    );
    assert_eq!((last.found.as_deref(), last.decides.as_deref()), (Some("ambient"), Some("in")));
    let origin = alone.pod.settings.first().context("no setting")?;
    assert_eq!(origin.annotation, "traffic.redirect-agent/excludeOutboundPorts");
    let waypoint = alone.pod.waypoint.context("no waypoint")?;
    assert_eq!(
        (waypoint.gateway.as_deref(), waypoint.object.as_str()),
        (Some("shop/gw"), "namespace shop")
    );
    let kernel = alone.pod.kernel.context("nothing in the kernel")?;
    assert!(kernel.captured && kernel.missing.is_empty(), "{kernel:?}");
    assert_eq!(kernel.netns, u32::try_from(server.netns.inode()?)?);

    // Both ends speak HBONE; a call that settings exclude does not.
    let called = call(server, &second);
    let explained = assert_verdict(node, &both(&called), nothing, "redirection=enabled: HBONE")?;
    let path = explained.path.context("no path")?;
    assert_eq!(
        (path.protocol.as_str(), path.by_callers_proxy, path.to_proxy_port),
        ("HBONE", true, Some(15008))
    );
    let excluded = format!("{second}:3306");
    let path = explain(node, &[&name, &excluded])?.path.context("no path")?;
    assert_eq!(
        (path.protocol.as_str(), path.by_callers_proxy, path.to_proxy_port),
        ("plaintext", false, Some(15006))
    );

    // The other end by its address, on another node, and nowhere.
    let at = SocketAddr::new(second.ip(Family::V6), PORT).to_string();
    let by_address = explain(node, &[&name, &at])?.to.and_then(|to| to.pod).context("no pod")?;
    assert_eq!(by_address.name, second.to_string());
    let elsewhere = call(server, client);
    assert_verdict(node, &both(&elsewhere), (Area::None, Cause::OtherNode), "is on node1")?;
    let nowhere = explain(node, &[&name, "203.0.113.7:443"])?;
    assert!(nowhere.to.is_some_and(|to| to.pod.is_none()));

    // It changes nothing, and an exit status says whether something is wrong.
    for (args, done) in [(&[name.as_str()][..], true), (&["shop/nobody"], false)] {
        let (ok, said) = finish(node.command("explain")?.args(args).arg("--exit-code"))?;
        assert_eq!(ok, done, "{said}");
    }
    node.assert_outbound(server, &second, Family::V4)
}

#[test]
fn proxy_that_went_away_and_one_that_never_came_are_told_apart() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.start_agent()?;
    let Cluster { node, server, .. } = &mut cluster;
    let _app = echo(server)?;
    node.write(&Manifest::of(server).mode("ambient"))?;
    node.wait_for_state(server, PodState::Enrolling)?;
    let name = server.to_string();
    let never = (Area::Proxy, Cause::ProxyNeverConnected);
    assert_verdict(node, &[&name], never, "no proxy has connected to the ZDS socket since")?;

    node.start_proxy()?;
    node.wait_until_enrolled(server)?;
    node.kill_proxy()?;
    let away = (Area::Proxy, Cause::ProxyAway);
    let explained =
        assert_verdict(node, &[&name], away, "new connections of pods in the mesh are refused")?;
    assert!(explained.verdict.next.iter().any(|next| next.contains("app=ztunnel")));
    let call = call(&cluster.client, &cluster.server);
    assert_verdict(&cluster.node, &both(&call), away, "is ztunnel running on this node?").map(drop)
}

/// Whether STRICT holds is the proxy's to know: `explain` says that the call comes there in plaintext.
#[test]
fn call_that_strict_refuses_is_handed_to_the_proxy() -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(server)?;
    let strict = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": "shop"}, "spec": {"mtls": {"mode": "STRICT"}},
    });
    std::fs::write(node.manifests().join("strict.json"), strict.to_string())?;
    wait_for("STRICT", SOON, || {
        let outcome = Call::to(server.addr(Family::V4, PORT)).make(&client.netns)?;
        Ok(matches!(outcome, Outcome::Closed { bytes: 0 }).then_some(()))
    })?;
    let cause = (Area::Proxy, Cause::PlaintextToProxy);
    let explained =
        assert_verdict(node, &both(&call(client, server)), cause, "says STRICT; look there")?;
    assert!(
        explained.findings.iter().any(|found| found.cause == Cause::NotLabeled),
        "{explained:#?}"
    );
    assert!(explained.verdict.next.iter().any(|next| next.contains("peerauthentication")));
    let called = explained.to.and_then(|to| to.pod).context("no pod")?;
    assert!(
        called.counters.get("redirected_inbound").is_some_and(|n| *n > 0),
        "{:?}",
        called.counters
    );
    Ok(())
}

#[test]
fn pod_that_nobody_labeled_and_one_of_another_namespace_are_named() -> Result<()> {
    let cluster = Cluster::start()?;
    let Cluster { node, server, .. } = &cluster;
    let name = server.to_string();
    let not_labeled = (Area::Configuration, Cause::NotLabeled);
    let explained = assert_verdict(node, &[&name], not_labeled, "shop/server is not in the mesh")?;
    assert_eq!(
        explained.verdict.next,
        ["kubectl label namespace shop istio.io/dataplane-mode=ambient"]
    );

    // The label is there, on a namespace that is called almost the same; then the pod is asked for in one.
    node.write(&Manifest::of_namespace("shop-prod").mode("ambient"))?;
    let wrong = (Area::Configuration, Cause::WrongNamespace);
    assert_verdict(node, &[&name], wrong, "namespace shop-prod has it: was shop meant?")?;
    assert_verdict(node, &["bank/server"], wrong, "but there is shop/server")?;
    assert_verdict(
        node,
        &["bank/nobody"],
        (Area::Configuration, Cause::NoSuchPod),
        "there is no pod",
    )
    .map(drop)
}

#[test]
fn annotation_with_a_wrong_value_is_named() -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, .. } = &cluster;
    let annotation = ("traffic.redirect-agent/excludeOutboundPorts", json!("3306,http"));
    let manifest = Manifest::of(server).mode("ambient");
    node.write(&manifest.with("/metadata/annotations", annotation.0, annotation.1))?;
    let cause = (Area::Configuration, Cause::AnnotationValue);
    let line =
        "annotation traffic.redirect-agent/excludeOutboundPorts of pod shop/server cannot be used";
    let explained = assert_verdict(node, &[&server.to_string()], cause, line)?;
    let problem = explained.pod.settings.into_iter().find_map(|origin| origin.problem);
    assert!(problem.is_some_and(|problem| problem.contains("\"http\" is not a port")));
    Ok(())
}

#[test]
fn misspelled_keys_and_values_are_named() -> Result<()> {
    let cluster = Cluster::start()?;
    let Cluster { node, server, .. } = &cluster;
    let name = server.to_string();
    let explain = |manifest: &Manifest, cause, line: &str| {
        node.write(manifest)?;
        assert_verdict(node, &[&name], (Area::Configuration, cause), line)
    };
    let plain = || Manifest::of(server);
    let label = |key: &str| plain().with("/metadata/labels", key, json!("ambient"));
    explain(
        &label("istio.io/dataplane-mod"),
        Cause::MisspelledLabelKey,
        "is istio.io/dataplane-mode meant?",
    )?;
    explain(
        &plain().mode("ambeint"),
        Cause::MisspelledLabelValue,
        "neither ambient nor none; is ambient meant?",
    )?;
    // `status` has it, too, and the log once.
    let note = "label istio.io/dataplane-mode=\"ambeint\" of pod shop/server says nothing";
    let is_noted = |p: &PodStatus| p.message.as_ref().is_some_and(|m| m.contains(note));
    node.wait_for_pod("to have a note", server, is_noted)?;
    let log = node.agent_log()?;
    let warned = log.lines().filter(|line| line.contains(note) && line.contains("WARN"));
    assert_eq!(warned.count(), 1);
    let typo = "traffic.redirect-agent/excludeOutboundPort";
    let annotated = plain().mode("ambient").with("/metadata/annotations", typo, json!("3306"));
    node.write(&annotated)?;
    node.wait_until_enrolled(server)?;
    let meant = "is traffic.redirect-agent/excludeOutboundPorts meant?";
    explain(&annotated, Cause::UnknownAnnotation, meant)?;

    // On the namespace, which `explain` names.
    node.write(&plain())?;
    node.write(&Manifest::of_namespace("shop").mode("Ambient"))?;
    let value = (Area::Configuration, Cause::MisspelledLabelValue);
    let explained = assert_verdict(node, &[&name], value, "of namespace shop says nothing")?;
    assert_eq!(
        explained.verdict.next,
        ["kubectl label namespace shop --overwrite istio.io/dataplane-mode=ambient"]
    );
    Ok(())
}

fn application_that_listens_on_loopback_only_is_named(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let loopback: IpAddr = match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    let at = SocketAddr::new(loopback, PORT);
    let app = App::start(&server.netns, "server", at, Behaviour::Echo)?;
    let cause = (Area::Application, Cause::ListensOnLoopback);
    let line = format!("listens on loopback only ({at})");
    assert_verdict(node, &both(&call(client, server)), cause, &line)?;
    assert_verdict(node, &[&server.to_string()], cause, &line)?;
    drop(app);
    let nobody = (Area::Application, Cause::NobodyListens);
    assert_verdict(
        node,
        &both(&call(client, server)),
        nobody,
        "nothing listens in shop/server on port 8080",
    )?;
    let _app = echo(server)?;
    let explained = explain(node, &both(&call(client, server)))?;
    assert_eq!(explained.verdict.cause, Cause::PlaintextToProxy);
    Ok(())
}

/// A Service of the pods that have the label `app: NAME`.
fn service(name: &str, ips: &[&str], port: u16) -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "labels": {"istio.io/use-waypoint": "gw"}},
        "spec": {
            "selector": {"app": name}, "clusterIPs": ips,
            "ports": [{"name": "http", "port": port, "targetPort": PORT}],
        },
    })
}

/// A call to a Service is explained for the endpoint that is worst off.
#[test]
fn service_is_explained_by_its_worst_endpoint() -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, .. } = &cluster;
    let of = |pod: &Pod| Manifest::of(pod).with("/metadata/labels", "app", json!("cart"));
    node.write(&of(&second).mode("ambient"))?;
    node.write(&of(server).mode("ambient"))?;
    node.wait_until_enrolled(&second)?;
    let file = node.manifests().join("service.json");
    std::fs::write(&file, service("cart", &["10.96.0.7", "fd00:96::7"], 80).to_string())?;
    let _app = echo(server)?;
    let name = server.to_string();

    // By its name, as a host, and by either cluster IP.
    let nobody = (Area::Application, Cause::NobodyListens);
    let (v4, v6) = (second.addr(Family::V4, PORT), second.addr(Family::V6, PORT));
    for (asked, at) in [
        ("shop/cart:80", v4),
        ("cart.shop.svc.cluster.local:80", v4),
        ("10.96.0.7:80", v4),
        ("[fd00:96::7]:80", v6),
    ] {
        let line = format!("{second} at {at}, ready: nobody-listens, explained");
        let explained = assert_verdict(node, &[&name, asked], nobody, &line)?;
        let to = explained.to.context("nothing is called")?;
        assert_eq!(to.pod.map(|pod| pod.name), Some(second.to_string()));
        let service = to.service.context("no Service")?;
        let gateway = service.waypoint.and_then(|waypoint| waypoint.gateway);
        assert_eq!(gateway.as_deref(), Some("shop/gw"));
        assert_eq!(service.endpoints.len(), 2);
        let path = explained.path.context("no path")?;
        assert_eq!((path.protocol.as_str(), path.to_proxy_port), ("HBONE", Some(15008)));
        assert!(path.why.iter().any(|why| why.contains("has waypoint shop/gw")), "{path:?}");
    }
    let _second = echo(&second)?;
    let nothing = (Area::None, Cause::NothingFound);
    assert_verdict(node, &[&name, "shop/cart:80"], nothing, "chooses one of 2 ready endpoints")?;

    // A port that it does not have, no pod that it selects, and no Service.
    let config = |cause| (Area::Configuration, cause);
    let port = config(Cause::NoSuchServicePort);
    assert_verdict(node, &[&name, "shop/cart:81"], port, "does not have TCP port 81; it has 80")?;
    std::fs::write(&file, service("basket", &["10.96.0.8"], 80).to_string())?;
    let none = config(Cause::NoReadyEndpoint);
    assert_verdict(node, &[&name, "shop/basket:80"], none, "its selector selects no pod")?;
    let missing = config(Cause::NoSuchService);
    assert_verdict(node, &[&name, "cart.shop.svc:80"], missing, "there is no Service cart")?;
    assert_verdict(node, &[&name, "shop/cart"], config(Cause::NoSuchPod), "there is no").map(drop)
}

/// The agent puts it back at once: `explain` says that it was so.
fn deleted_rule_is_named(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&SELDOM)?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(server)?;
    let (flag, name) = if family == Family::V4 { ("-4", "ipv4") } else { ("-6", "ipv6") };
    server.netns.output("ip", &[flag, "rule", "del", "table", "15001"])?;
    let put_back = |explained: &Explanation| {
        let called = explained.to.as_ref().and_then(|to| to.pod.as_ref());
        called.is_some_and(|pod| pod.history.iter().any(|entry| entry.kind == EventKind::Repaired))
    };
    wait_for("the rule to be put back", SOON, || {
        Ok(put_back(&explain(node, &both(&call(client, server)))?).then_some(()))
    })?;
    let cause = (Area::Redirector, Cause::RuleDeleted);
    let line = format!(
        "what the agent keeps in shop/server: missing in the pod, and put back: rule {name}"
    );
    let explained = assert_verdict(node, &both(&call(client, server)), cause, &line)?;
    let called = explained.to.and_then(|to| to.pod).context("no pod")?;
    assert!(called.history.iter().any(|entry| entry.message.contains(&format!("rule {name}"))));
    node.wait_until_complete(server)
}

#[test]
fn detached_link_and_changed_sysctl_are_named() -> Result<()> {
    let cluster = Cluster::enrolled(&SELDOM)?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(server)?;
    let called = call(client, server);
    server.netns.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")?;
    let sysctl = (Area::Redirector, Cause::SysctlChanged);
    assert_verdict(node, &both(&called), sysctl, "sysctl net/ipv4/tcp_fwmark_accept")?;
    server.netns.set_sysctl("net/ipv4/tcp_fwmark_accept", "1")?;
    detach(&node.links(server)?.join(format!("in_{}", index(server, "eth0")?)))?;
    let link = (Area::Redirector, Cause::LinkDetached);
    let explained = assert_verdict(node, &both(&called), link, "tcx eth0")?;
    // It is missing still, or was put back since.
    let pod = explained.to.and_then(|to| to.pod).context("no pod")?;
    let missing = pod.kernel.context("nothing in the kernel")?.missing;
    let repaired = pod.history.iter().any(|entry| entry.message.contains("tcx eth0"));
    assert!(missing == ["tcx eth0"] || repaired, "{missing:?}");
    let (ok, said) = finish(node.command("explain")?.arg(server.to_string()).arg("--exit-code"))?;
    assert!(!ok && said.contains("redirector: link-detached"), "{said}");
    Ok(())
}

#[test]
fn two_pods_with_one_address_are_named_whichever_is_asked_for() -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, .. } = &cluster;
    let same = Manifest::of(&second).mode("ambient");
    node.write(&same.with("/status", "podIPs", json!([{"ip": server.v4}])))?;
    let cause = (Area::Network, Cause::TwoPodsOneAddress);
    for (pod, other) in [(server, &second), (&second, server)] {
        let line = format!("its address {} is that of pod {other}, too", server.v4);
        assert_verdict(node, &[&pod.to_string()], cause, &line)?;
    }
    Ok(())
}

fn missing_address_is_named(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(server)?;
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    server.netns.output("ip", &[flag, "addr", "flush", "dev", "eth0"])?;
    let cause = (Area::Network, Cause::AddressMissing);
    let line = format!("no interface of shop/server has its address {}", server.ip(family));
    assert_verdict(node, &both(&call(client, server)), cause, &line).map(drop)
}

/// Without an agent, a cluster or a uid.
#[test]
fn manifests_are_explained_without_an_agent() -> Result<()> {
    let cluster = Cluster::without_agent(&[])?;
    let file = cluster.topology.dir().path().join("manifests.yaml");
    let yaml = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec: {template: {metadata: {labels: {app: cart}}, spec: {containers: []}}}
---
apiVersion: v1
kind: Pod
metadata: {name: vault, namespace: bank, labels: {istio.io/dataplane-mod: ambient}}
spec: {containers: []}
";
    std::fs::write(&file, yaml)?;
    let file = file.to_str().context("use the path")?;
    let ask = |pod: &str, more: &[&str]| {
        let mut command = cluster.node.command_without_agent("explain")?;
        finish(command.args([pod, "--file", file]).args(more))
    };
    let (ok, said) = ask("shop/cart", &[])?;
    assert!(ok && said.contains("in the mesh: its namespace's label"), "{said}");
    let (ok, said) = ask("shop/cart", &["--excluded-namespaces", "shop"])?;
    assert!(ok && said.contains("not in the mesh: its namespace is excluded"), "{said}");
    let (ok, said) = ask("bank/vault", &["--exit-code"])?;
    assert!(!ok && said.contains("misspelled-label-key"), "{said}");
    let (ok, said) = ask("bank/cart", &[])?;
    assert!(!ok && said.contains("but there is shop/cart"), "{said}");
    Ok(())
}
