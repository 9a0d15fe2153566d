//! What cannot be used is named in `status`, and nothing else is affected.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::cluster::{Cluster, Manifest, SOON, echo};
use crate::load::Load;

both_families! {
    manifests_that_cannot_be_used_are_named_and_harm_nobody,
    pods_that_cannot_be_enrolled_are_named_and_harm_nobody,
    proxy_that_talks_nonsense_is_disconnected_and_another_works_on,
}

fn manifests_that_cannot_be_used_are_named_and_harm_nobody(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);

    Load::between(client, server, &[family]).keeping_old().during(|| {
        for (file, content, complaint) in [
            ("broken.yaml", "kind: [Pod", "parse it"),
            ("broken.json", "{\"kind\": \"Pod\"", "parse it"),
            ("empty.yaml", "", "it is empty"),
            ("binary.yaml", "\u{0}\u{1}\u{2}", "parse it"),
            ("strange.yaml", "a: b", "it is no Kubernetes object"),
            ("nameless.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop}", "name"),
            (
                "no-uid.yaml",
                "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: no-uid}",
                "uid",
            ),
            (
                "no-address.yaml",
                "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: p, uid: u}\n\
                 status: {podIPs: [{ip: 10.0.0.300}]}",
                "10.0.0.300",
            ),
        ] {
            let path = node.manifests().join(file);
            fs::write(&path, content).context("write a manifest")?;
            let problem = wait_for(file, SOON, || {
                let problems = node.status()?.problems;
                Ok(problems.into_iter().find(|p| p.object.contains(file)))
            })?;
            assert!(problem.message.contains(complaint), "{problem}");
            let table = node.tell("status", &[])?;
            assert!(table.contains(file), "{table}");
            node.assert_inbound(client, server, family)?;
            fs::remove_file(&path).context("remove a manifest")?;
        }
        // A slip in a good manifest leaves its pod where it is.
        let path = node.manifests().join("shop_server.json");
        let good = fs::read_to_string(&path).context("read a manifest")?;
        fs::write(&path, &good[..good.len() / 2]).context("write a manifest")?;
        wait_for("the slip in status", SOON, || {
            let problems = node.status()?.problems;
            let named = problems.iter().find(|p| p.object.contains("shop_server.json"));
            Ok(named.map(|p| assert!(p.message.contains("stays in force"), "{p}")))
        })?;
        assert_eq!(node.pod(server)?.map(|p| p.state), Some(PodState::Enrolled));
        node.assert_outbound(server, client, family)?;
        node.assert_inbound(client, server, family)?;
        fs::write(&path, &good).context("write a manifest")?;
        wait_for("all problems to be gone", SOON, || {
            Ok(node.status()?.problems.is_empty().then_some(()))
        })
    })?;
    Ok(())
}

fn pods_that_cannot_be_enrolled_are_named_and_harm_nobody(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let wrong = cluster.topology.add_pod(0, "shop", "wrong")?;
    let homeless = cluster.topology.add_pod(0, "shop", "homeless")?;
    let twin = cluster.topology.add_pod(0, "shop", "twin")?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&wrong)?, echo(&twin)?);
    let before = (footprint(&wrong.netns)?, footprint(&twin.netns)?);
    let pod = |name: &str, ip: &str| {
        let (namespace, uid) = ("shop", format!("uid-of-{name}"));
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name, "namespace": namespace, "uid": uid,
                "labels": {"istio.io/dataplane-mode": "ambient"},
            },
            "spec": {"nodeName": "node0"},
            "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
        })
        .to_string()
    };
    let write = |name: &str, ip: &str| {
        let file = node.manifests().join(format!("{name}.json"));
        fs::write(file, pod(name, ip)).context("write a manifest")
    };
    let at = |name: &str| node.netns_dir().join(format!("shop_{name}"));
    fs::write(at("file"), "no namespace").context("write a file")?;
    let other = at("other");
    let _other = Bound::new(Path::new("/proc/self/ns/uts"), &other)?;

    Load::between(client, server, &[family]).keeping_old().during(|| {
        write("missing", "10.99.0.1")?;
        write("file", "10.99.0.2")?;
        write("other", "10.99.0.3")?;
        // Its manifest has an address that the namespace lacks.
        write("wrong", "10.99.0.4")?;
        // Not by any fault: it is starting.
        node.write(&Manifest::of(&homeless).mode("ambient").with("/status", "podIPs", json!([])))?;
        for (name, state, complaints) in [
            ("missing", PodState::Failed, &["shop_missing", "no process has a cgroup"][..]),
            ("file", PodState::Failed, &["shop_file", "is not a network namespace"]),
            ("other", PodState::Failed, &["shop_other", "is not a network namespace"]),
            ("wrong", PodState::Failed, &["shop_wrong", "does not carry address 10.99.0.4"]),
            ("homeless", PodState::Enrolling, &["shop/homeless", "no address yet"]),
        ] {
            let status = wait_for(name, SOON, || {
                let found = node.status()?.pods.into_iter().find(|p| p.name == name);
                Ok(found.filter(|p| p.state == state))
            })
            .with_context(|| format!("status: {:#?}", node.status()))?;
            let message = status.message.unwrap_or_default();
            for complaint in complaints {
                assert!(message.contains(complaint), "{name}: {message:?}");
            }
            assert_eq!(status.kernel, None);
        }
        // The address of a pod that is there already.
        let own = Manifest::of(&twin).mode("ambient");
        node.write(&own.clone().with("/status", "podIPs", json!([{"ip": server.ip(family)}])))?;
        let problem = wait_for("the twin in status", SOON, || {
            Ok(node.status()?.problems.into_iter().find(|p| p.object == "pod shop/twin"))
        })?;
        let ip = server.ip(family).to_string();
        assert!(problem.message.contains(&ip), "{problem}");
        assert!(problem.message.contains("shop/server"), "{problem}");

        node.assert_outbound(server, client, family)?;
        node.assert_inbound(client, server, family)?;
        node.assert_direct(client, &wrong, family)?;
        node.assert_direct(&twin, client, family)?;
        assert_unchanged(&wrong.netns, &before.0)?;
        assert_unchanged(&twin.netns, &before.1)?;

        // What is put right is taken up by itself.
        node.write(&own)?;
        node.write(&Manifest::of(&homeless).mode("ambient"))?;
        fs::remove_file(node.manifests().join("wrong.json")).context("remove a manifest")?;
        node.write(&Manifest::of(&wrong).mode("ambient"))?;
        for pod in [&twin, &homeless, &wrong] {
            node.wait_until_enrolled(pod)?;
        }
        node.assert_inbound(client, &twin, family)?;
        node.assert_inbound(client, &wrong, family)?;
        Ok(())
    })?;
    Ok(())
}

/// A file over which something else is mounted; unmounted when dropped.
struct Bound<'a>(&'a Path);

impl<'a> Bound<'a> {
    fn new(what: &Path, at: &'a Path) -> Result<Self> {
        fs::write(at, "").context("make a file")?;
        mount(Some(what), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mount over {}", at.display()))?;
        Ok(Self(at))
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

fn proxy_that_talks_nonsense_is_disconnected_and_another_works_on(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);

    Load::between(client, server, &[family]).keeping_old().during(|| {
        let long = vec![b'x'; 100_000];
        // What is no hello; a good hello (version 1) and then something unasked, or too long.
        for packets in [
            &[&b"GET / HTTP/1.1\r\n\r\n"[..]][..],
            &[b"\xff\xff\xff\xff"],
            &[b"\x08\x63"],
            &[&long],
            &[b"\x08\x01", b"nonsense"],
            &[b"\x08\x01", &long],
        ] {
            let stranger = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
            stranger.set_read_timeout(Some(Duration::from_secs(10)))?;
            stranger.connect(&SockAddr::unix(node.zds_socket())?).context("connect to ZDS")?;
            for packet in packets {
                stranger.send(packet).context("talk nonsense")?;
            }
            ensure!(is_disconnected(&stranger), "nobody minds {packets:?}");
            node.wait_until_enrolled(server)?;
            node.assert_outbound(server, client, family)?;
            node.assert_inbound(client, server, family)?;
        }
        wait_for("the only proxy in status", SOON, || {
            Ok((node.status()?.proxies == 1).then_some(()))
        })
    })?;
    // The agent still serves: the next proxy gets everything.
    node.kill_proxy()?;
    node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(family)
}

/// Reads what the agent sends until it has closed the connection.
fn is_disconnected(socket: &Socket) -> bool {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 2048];
    loop {
        match socket.recv(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
