//! What cannot be enrolled: a clear error that names the object, and nothing else is affected.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::{Attached, binary};

use crate::{PORT, Pair, assert_relayed, echo};

both_families! {
    namespaces_that_cannot_be_enrolled_are_named,
    address_of_another_pod_is_refused,
}

/// Runs `attach`, which has to fail, and gives what it says.
fn attach_error(bpffs: &Path, netns: &Path, addresses: &[&str]) -> Result<String> {
    let mut command = Command::new(binary("redirect-agent")?);
    command.arg("attach").arg("--bpffs-dir").arg(bpffs).arg("--netns").arg(netns);
    for address in addresses {
        command.args(["--address", address]);
    }
    let output = command.output().context("run redirect-agent")?;
    assert!(!output.status.success(), "attach {} succeeded", netns.display());
    assert_eq!(output.status.signal(), None);
    String::from_utf8(output.stderr).context("read the error")
}

fn namespaces_that_cannot_be_enrolled_are_named(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&client.netns)?;
    let attached = Attached::new(topology, client)?;
    let dir = topology.dir().subdir("bad")?;
    let file = dir.join("file");
    fs::write(&file, "no namespace").context("write a file")?;
    let missing = dir.join("missing");
    let empty = Netns::new(&dir, "no-address")?;

    for (netns, addresses) in [
        (file.as_path(), &[][..]),
        (missing.as_path(), &[]),
        (Path::new("/proc/self/ns/mnt"), &[]),
        (empty.path(), &[]),
        (empty.path(), &["10.64.0.99"]),
    ] {
        let error = attach_error(attached.bpffs(), netns, addresses)?;
        let name = netns.display().to_string();
        assert!(error.contains(&name), "{name} is not named in: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }

    let to = server.addr(family, PORT);
    let conversation = Call::to(to).open(&client.netns)?;
    assert_eq!(conversation.answer().by, "server");
    assert_relayed(&proxy, Via::Outbound, &conversation, to)
}

/// A second pod cannot take over the address of one that is enrolled.
fn address_of_another_pod_is_refused(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let attached = Attached::new(topology, server)?;
    let thief = Netns::new(&topology.dir().subdir("bad")?, "thief")?;
    let ip = server.ip(family);
    let length = if ip.is_ipv4() { 32 } else { 128 };
    thief.ip(&format!("addr add {ip}/{length} dev lo"))?;

    let error = attach_error(attached.bpffs(), thief.path(), &[&ip.to_string()])?;

    assert!(error.contains(&ip.to_string()), "{ip} is not named in: {error}");
    let to = server.addr(family, PORT);
    let conversation = Call::to(to).open(&client.netns)?;
    assert_eq!(conversation.answer().by, "server");
    assert_relayed(&proxy, Via::Inbound, &conversation, to)
}
