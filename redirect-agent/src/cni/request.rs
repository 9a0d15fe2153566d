//! The plugin's request to the agent: `POST /cmdadd` on a Unix socket, with JSON.
//!
//! The form is istio-cni's, so that its plugin can call this agent, too; `PodUID` is ours. Source:
//! Istio `cni/pkg/nodeagent/cni-watcher.go`, `CNIPluginAddEvent` and `IPConfig`.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};

/// Where the agent listens for the plugin. Source: Istio `cni/pkg/pluginlistener` and
/// `cni/pkg/constants`, `CNIEventSocketName` below `CNIAgentRunDir`.
pub const DEFAULT_SOCKET: &str = "/var/run/istio-cni/pluginevent.sock";

/// The path of the request.
pub const ADD_PATH: &str = "/cmdadd";

/// A pod's sandbox has a network, and its containers are about to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AddRequest {
    /// Path of the sandbox's network namespace, as the node sees it.
    pub netns: String,
    /// The pod's name.
    pub pod_name: String,
    /// The pod's namespace.
    pub pod_namespace: String,
    /// The uid by which kubelet knows the pod. For a static pod, it is not that of the API object.
    /// istio-cni's plugin does not send it.
    #[serde(rename = "PodUID", default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// The sandbox's addresses.
    #[serde(rename = "IPs", default, deserialize_with = "none_if_null")]
    pub ips: Vec<IpConfig>,
}

/// Go's JSON of an empty list is `null`.
fn none_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpConfig>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// One address of a sandbox. The other fields that istio-cni's plugin sends are not needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IpConfig {
    /// The address.
    pub address: Address,
}

/// An address, without its mask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address itself.
    #[serde(rename = "IP")]
    pub ip: IpAddr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_of_istio_cni_is_understood() {
        let json = r#"{"Netns":"/var/run/netns/cni-1","PodName":"cart","PodNamespace":"shop",
            "IPs":[{"Interface":2,"Address":{"IP":"10.0.0.2","Mask":"////AA=="},"Gateway":"10.0.0.1"},
                   {"Interface":null,"Address":{"IP":"fd00::2","Mask":"//////////8AAAAAAAAAAA=="},"Gateway":""}]}"#;
        let request: AddRequest = serde_json::from_str(json).unwrap();
        let ips = ["10.0.0.2", "fd00::2"]
            .map(|ip| IpConfig { address: Address { ip: ip.parse().unwrap() } });
        let expected = AddRequest {
            netns: "/var/run/netns/cni-1".to_owned(),
            pod_name: "cart".to_owned(),
            pod_namespace: "shop".to_owned(),
            pod_uid: None,
            ips: ips.to_vec(),
        };
        assert_eq!(request, expected);
        let again: AddRequest =
            serde_json::from_str(&serde_json::to_string(&expected).unwrap()).unwrap();
        assert_eq!(again, expected);
        let json =
            r#"{"Netns":"/var/run/netns/cni-1","PodName":"cart","PodNamespace":"shop","IPs":null}"#;
        let request: AddRequest = serde_json::from_str(json).unwrap();
        assert_eq!(request, AddRequest { ips: Vec::new(), ..expected });
    }
}
