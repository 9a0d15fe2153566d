//! A container runtime's end of CNI, as libcni does it: runs the plugins of the node's first network.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::netns::Netns;
use crate::topology::Pod;

/// Where Debian's containernetworking-plugins are.
pub const PLUGINS: &str = "/usr/lib/cni";

/// A runtime on a node.
#[derive(Debug)]
pub struct Runtime<'a> {
    node: &'a Netns,
    conf_dir: PathBuf,
    bin_dir: PathBuf,
}

/// What a plugin has failed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The plugin.
    pub plugin: String,
    /// Its code.
    pub code: u64,
    /// What it says.
    pub message: String,
}

/// A pod's sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// The pod: its addresses are those that ADD has given it.
    pub pod: Pod,
    /// What each plugin has answered to ADD, in their order.
    pub results: Vec<Value>,
    id: String,
    uid: String,
}

impl Sandbox {
    /// The sandbox of a pod on a node, with an empty network namespace that is somewhere in `dir`.
    pub fn new(dir: &Path, node: usize, namespace: &str, name: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let pod = Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node,
            v4: Ipv4Addr::UNSPECIFIED,
            v6: Ipv6Addr::UNSPECIFIED,
            host_interface: String::new(),
            netns: Netns::new(dir, &format!("cni-{id}"))?,
        };
        let uid = format!("uid-of-{namespace}-{name}");
        Ok(Self { pod, results: Vec::new(), id, uid })
    }

    fn result(&self) -> Value {
        self.results.last().cloned().unwrap_or_default()
    }

    fn take_addresses(&mut self) -> Result<()> {
        let result = self.result();
        for ip in result["ips"].as_array().context("no addresses in the result")? {
            let address = ip["address"].as_str().and_then(|address| address.split('/').next());
            match address.context("an address is missing")?.parse()? {
                IpAddr::V4(v4) => self.pod.v4 = v4,
                IpAddr::V6(v6) => self.pod.v6 = v6,
            }
        }
        Ok(())
    }
}

impl<'a> Runtime<'a> {
    /// A runtime on the network `node`, with its configuration in `conf_dir`. Plugins are looked for in
    /// `bin_dir`, then in [`PLUGINS`].
    pub fn new(node: &'a Netns, conf_dir: &Path, bin_dir: &Path) -> Self {
        Self { node, conf_dir: conf_dir.to_owned(), bin_dir: bin_dir.to_owned() }
    }

    /// The first network: its file, and its configuration as a list.
    /// Source: containerd/go-cni `opts.go`, `loadFromConfDir`.
    pub fn network(&self) -> Result<(PathBuf, Value)> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.conf_dir).context("list the CNI configuration")? {
            let path = entry?.path();
            let end = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
            if ["conf", "conflist", "json"].contains(&end) {
                files.push(path);
            }
        }
        files.sort();
        let file = files.into_iter().next().context("the node has no network")?;
        let text = fs::read_to_string(&file).context("read a CNI configuration")?;
        let conf: Value = serde_json::from_str(&text).context("read a CNI configuration")?;
        let list = match file.extension().is_some_and(|end| end == "conflist") {
            true => conf,
            false => {
                let (name, version) = (&conf["name"], &conf["cniVersion"]);
                json!({"name": name, "cniVersion": version, "plugins": [conf]})
            }
        };
        Ok((file, list))
    }

    /// ADD: gives the sandbox a network. Where a plugin fails, all that was done is undone.
    pub fn add(&self, sandbox: &mut Sandbox) -> Result<Result<(), Failure>> {
        let (_, list) = self.network()?;
        for plugin in plugins(&list)? {
            match self.execute("ADD", &list, plugin, sandbox)? {
                Ok(answer) => {
                    sandbox.results.push(serde_json::from_str(&answer).context("read a result")?);
                }
                Err(failure) => {
                    self.del(sandbox)?;
                    return Ok(Err(failure));
                }
            }
        }
        sandbox.take_addresses()?;
        Ok(Ok(()))
    }

    /// DEL: takes the sandbox's network away again.
    pub fn del(&self, sandbox: &mut Sandbox) -> Result<()> {
        let (_, list) = self.network()?;
        for plugin in plugins(&list)?.iter().rev() {
            if let Err(failure) = self.execute("DEL", &list, plugin, sandbox)? {
                bail!("DEL: {failure:?}");
            }
        }
        sandbox.results.clear();
        Ok(())
    }

    /// CHECK
    pub fn check(&self, sandbox: &Sandbox) -> Result<Result<(), Failure>> {
        let (_, list) = self.network()?;
        for plugin in plugins(&list)? {
            if let Err(failure) = self.execute("CHECK", &list, plugin, sandbox)? {
                return Ok(Err(failure));
            }
        }
        Ok(Ok(()))
    }

    /// Runs one plugin of the list, in the node's namespace.
    pub fn execute(
        &self,
        command: &str,
        list: &Value,
        plugin: &Value,
        sandbox: &Sandbox,
    ) -> Result<Result<String, Failure>> {
        let name = plugin["type"].as_str().context("a plugin has no type")?;
        let mut conf = plugin.clone();
        conf["name"] = list["name"].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        if !sandbox.results.is_empty() {
            conf["prevResult"] = sandbox.result();
        }
        let program = [self.bin_dir.as_path(), Path::new(PLUGINS)]
            .into_iter()
            .map(|dir| dir.join(name))
            .find(|program| program.is_file());
        let Some(program) = program else {
            let message = format!("failed to find plugin {name:?}");
            return Ok(Err(Failure { plugin: name.to_owned(), code: 0, message }));
        };
        let Sandbox { id, uid, pod, .. } = sandbox;
        let (namespace, pod, netns) = (&pod.namespace, &pod.name, &pod.netns);
        let mut call = Command::new(program);
        call.env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", format!("{}:{PLUGINS}", self.bin_dir.display()))
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod};\
                     K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID={uid}"
                ),
            );
        let input = conf.to_string();
        self.node.run(|| call_plugin(&mut call, name, &input))
    }
}

/// The plugins of a list.
pub fn plugins(list: &Value) -> Result<&Vec<Value>> {
    list["plugins"].as_array().context("a network has no plugins")
}

fn call_plugin(call: &mut Command, name: &str, input: &str) -> Result<Result<String, Failure>> {
    let mut child = call
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run the plugin {name}"))?;
    let mut stdin = child.stdin.take().context("write to a plugin")?;
    stdin.write_all(input.as_bytes()).context("write to a plugin")?;
    drop(stdin);
    let output = child.wait_with_output().context("wait for a plugin")?;
    let said = String::from_utf8(output.stdout).context("read what a plugin says")?;
    if output.status.success() {
        return Ok(Ok(said));
    }
    let error: Value = serde_json::from_str(&said).with_context(|| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        format!("plugin {name} ended with {}: {said}{stderr}", output.status)
    })?;
    ensure!(error["msg"].is_string() && error["code"].is_u64(), "{name} failed with {error}");
    Ok(Err(Failure {
        plugin: name.to_owned(),
        code: error["code"].as_u64().unwrap_or_default(),
        message: error["msg"].as_str().unwrap_or_default().to_owned(),
    }))
}
