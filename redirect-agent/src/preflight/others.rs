//! Who else is on the node: other redirectors, and what CNI runs.

use std::{fs, io, path::Path};

use anyhow::Result;
use aya::programs::{ProgramError, loaded_programs};

use super::Check;
use crate::cni::install;

/// Others that redirect pods or handle their packets before we see them; whether they do it for a
/// given pod is only seen in that pod.
pub(super) fn other_redirectors(cni_conf_dir: &Path) -> Vec<Check> {
    let istio = "no istio-cni beside us";
    let cilium = "no Cilium settings to mind";
    let dir = cni_conf_dir.display();
    let found = match cni_configurations(cni_conf_dir) {
        Ok(found) => found,
        Err(error) => {
            let unknown =
                |name| Check::cannot_tell(name, format!("read {dir}: {error}")).optional();
            return vec![unknown(istio), unknown(cilium)];
        }
    };
    let naming = |plugin: &str| {
        found.iter().find(|(_, content)| content.contains(plugin)).map(|(name, _)| name)
    };
    let istio = match naming("\"istio-cni\"") {
        Some(file) => Check::no(
            istio,
            format!(
                "{dir}/{file} names it: uninstall istio-cni, and take its pods over: run the agent with \
                 --beside-istio-cni, then `redirect-agent takeover`"
            ),
        ),
        None => Check::yes(istio, format!("nothing in {dir} names it")),
    };
    let cilium = match naming("\"cilium-cni\"") {
        Some(file) => Check::no(
            cilium,
            format!(
                "{dir}/{file} names it: it must run with cni.exclusive=false and \
                 socketLB.hostNamespaceOnly=true"
            ),
        ),
        None => Check::yes(cilium, format!("nothing in {dir} names it")),
    };
    vec![istio.optional(), cilium.optional()]
}

/// Whether pods wait for us before they start.
pub(super) fn cni_plugin(dirs: &install::Dirs) -> Check {
    let name = "our CNI plugin";
    let check = match install::find(dirs) {
        Ok(file) => Check::yes(name, format!("in {}", file.display())),
        Err(error) => Check::no(
            name,
            format!(
                "{error:#}; pods start before they are in the mesh: `run --install-cni` brings it"
            ),
        ),
    };
    check.optional()
}

/// Calico's eBPF dataplane replaces a service's address when the application connects, so that the proxy
/// never sees it. Source: Calico `felix/bpf-gpl`,
/// `calico_connect_v4`.
pub(super) fn calico() -> Check {
    let name = "no connect-time load balancing of Calico's";
    let names: Result<Vec<String>, ProgramError> = loaded_programs()
        .map(|program| Ok(program?.name_as_str().unwrap_or_default().to_owned()))
        .collect();
    let check = match names {
        Ok(names) if names.iter().any(|name| name.starts_with("calico_connect")) => Check::no(
            name,
            "its programs are loaded: set bpfConnectTimeLoadBalancing=Disabled and \
             bpfHostNetworkedNATWithoutCTLB=Enabled",
        ),
        Ok(_) => Check::yes(name, "no program of it is loaded"),
        Err(error) => Check::cannot_tell(name, format!("list BPF programs: {error}")),
    };
    check.optional()
}

/// The configuration files, by name; a node without the directory has none.
fn cni_configurations(dir: &Path) -> io::Result<Vec<(String, String)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if install::CONFIGURATIONS.iter().any(|end| name.ends_with(end)) {
            let content = fs::read(entry.path())?;
            found.push((name, String::from_utf8_lossy(&content).into_owned()));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{super::Answer, *};

    #[test]
    fn others_on_the_node_are_told_by_its_cni_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let answers = || other_redirectors(dir.path()).iter().map(|c| c.answer).collect::<Vec<_>>();
        assert_eq!(answers(), [Answer::Yes, Answer::Yes]);
        let conf = r#"{"plugins": [{"type": "ptp"}, {"type": "istio-cni"}]}"#;
        fs::write(dir.path().join("10-net.conflist"), conf).unwrap();
        assert_eq!(answers(), [Answer::No, Answer::Yes]);
        fs::write(dir.path().join("05-cilium.conf"), r#"{"type": "cilium-cni"}"#).unwrap();
        assert_eq!(answers(), [Answer::No, Answer::No]);
        assert!(other_redirectors(dir.path()).iter().all(|check| !check.required));
        let missing = other_redirectors(&dir.path().join("missing"));
        assert!(missing.iter().all(|check| check.answer == Answer::Yes));
    }
}
