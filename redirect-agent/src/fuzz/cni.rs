//! What a container runtime, and the node's CNI configuration, hand us.

use serde::de::IgnoredAny;
use serde_json::Value;

use super::{fuzz, same_again, text};
use crate::cni::{
    entry::{Entry, VERSIONS},
    network::Network,
    plugin::{Environment, run},
    request::AddRequest,
};

const CONFIGURATIONS: [&str; 6] = [
    r#"{"cniVersion":"0.3.1","name":"n","plugins":[{"type":"ptp","mtu":1e3}]}"#,
    "{ \"plugins\" : [\n\n\t{\"type\":\"bridge\", \"x\": 123456789012345678901234567890.10},\n\n\t{\"type\":\"portmap\",\"capabilities\":{\"portMappings\":true}}  ] ,\r\n  \"zzz\": [\"plugins\"],\"name\":\"\u{e4}\",\"cniVersion\":\"1.0.0\"}\n\n",
    r#"{"name":"n","cniVersion":"1.1.0","plugins":[ {"type":"redirect-cni","socket":"/old"} , {"type":"a"} , {"type":"redirect-cni"} ]}"#,
    "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"k8s-pod-network\",\n  \"plugins\": [\n    {\n      \"type\": \"calico\",\n      \"ipam\": { \"type\": \"calico-ipam\" }\n    },\n    { \"type\": \"istio-cni\", \"log_level\": \"info\" },\n    {\n      \"type\": \"redirect-cni\",\n      \"socket\": \"/var/run/istio-cni/pluginevent.sock\",\n      \"excludeNamespaces\": [\"kube-system\"],\n      \"daemonSet\": \"istio-system/redirect-agent\",\n      \"timeoutSeconds\": 30,\n      \"replaces\": \"10-net.conf\"\n    }\n  ]\n}\n",
    "{\"type\": \"ptp\",\n \"name\": \"a \\\"net\\\"\", \"cniVersion\": \"0.4.0\"}\n",
    r#"{"cniVersion":"1.0.0","cniVersions":["1.0.0","1.1.0"],"name":"cilium","plugins":[{"type":"cilium-cni","enable-debug":false}]}"#,
];

#[test]
fn entry_goes_into_any_configuration_and_out_without_a_trace() {
    fuzz!(&CONFIGURATIONS, |bytes| {
        let text = &*text(bytes);
        let entry = Entry::default();
        match Network::read("10-net.conflist", text) {
            Ok(Network::List(list)) => {
                let Ok(without) = list.without() else { return assert!(list.has_ours()) };
                if !list.has_ours() {
                    assert_eq!(without, text);
                }
                let with = list.with(&entry).unwrap();
                assert!(serde_json::from_str::<IgnoredAny>(&with).is_ok(), "{with}");
                let Ok(Network::List(list)) = Network::read("10-net.conflist", &with) else {
                    panic!("{with}");
                };
                assert!(list.has(&entry), "{with}");
                assert_eq!(list.with(&entry).unwrap(), with);
                assert_eq!(list.without().unwrap(), without);
            }
            Ok(Network::Single(_)) => panic!("a list is no single network"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        if let Ok(network @ Network::Single(_)) = Network::read("10-net.conf", text) {
            let unfit = network.unfit();
            let Network::Single(single) = network else { return };
            let made = single.to_list(&entry);
            let Ok(Network::List(list)) = Network::read("10-net.conflist", &made) else {
                panic!("{made}");
            };
            assert!(list.has(&entry), "{made}");
            // It may have been the newer ones of `cniVersions` that made it fit.
            if unfit.is_some() {
                assert!(Network::List(list).unfit().is_some(), "{made}");
            }
        }
    });
}

/// The arguments, a line feed, and the configuration.
const CALLS: [&str; 5] = [
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns;K8S_POD_UID=u-1\n{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"type\":\"redirect-cni\",\"prevResult\":{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"/run/netns/a\"}],\"ips\":[{\"address\":\"10.0.0.2/24\",\"interface\":0},{\"address\":\"fd00::2/64\"}],\"dns\":{}}}",
    "\n{\"cniVersion\":\"0.4.0\",\"name\":\"n\",\"excludeNamespaces\":[\"a\"],\"timeoutSeconds\":1,\"prevResult\":{\"ips\":[]}}",
    "K8S_POD_NAMESPACE=a\n{\"cniVersion\":\"0.3.1\",\"name\":\"n\",\"prevResult\":{ \"ips\":null,\"cniVersion\" : \"0.3.0\" , \"x\":1e400 } }",
    "K8S_POD_INFRA_CONTAINER_ID=c\n{\"cniVersion\":\"1.1.0\",\"daemonSet\":\"istio-system/redirect-agent\",\"prevResult\":{\"cniVersion\":null}}",
    "a=b\n{\"cniVersion\":\"1.0.0\",\"prevResult\":{}}",
];

#[test]
fn plugin_passes_any_result_on_or_fails_with_a_clear_error() {
    fuzz!(&CALLS, |bytes| {
        let split = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
        let (args, configuration) = bytes.split_at(split);
        // Only excluded pods: no agent is asked.
        let args =
            text(args).replace("K8S_POD_NAME=", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=");
        let excludes = || {
            let entry = serde_json::from_slice::<Entry>(configuration);
            entry.is_ok_and(|e| e.exclude_namespaces.iter().any(|name| name == "kube-system"))
        };
        let args = if excludes() { args } else { args.replace("K8S_POD_NAME", "X") };
        for command in ["ADD", "CHECK", "VERSION", "DEL", "GC"] {
            let environment = Environment {
                command: Some(command.to_owned()),
                container: Some("c".to_owned()),
                netns: Some("/proc/self/ns/net".to_owned()),
                interface: Some("eth0".to_owned()),
                args: Some(args.clone()),
            };
            match run(&environment, configuration) {
                Ok(answer) if command == "ADD" => is_passed_on(configuration, &answer),
                Ok(answer) if command == "VERSION" => {
                    let answer: Value = serde_json::from_str(&answer).unwrap();
                    assert_eq!(answer["supportedVersions"], serde_json::json!(VERSIONS));
                }
                Ok(answer) => assert_eq!(answer, ""),
                Err(failure) => {
                    assert!(!matches!(command, "DEL" | "GC" | "VERSION"));
                    assert!(failure.code > 0 && !failure.msg.is_empty());
                }
            }
        }
    });
}

/// The answer to ADD is the previous result, in the configuration's version.
fn is_passed_on(configuration: &[u8], answer: &str) {
    // A number may be too large for a `Value`.
    let Ok(configuration) = serde_json::from_slice::<Value>(configuration) else { return };
    let mut expected = configuration["prevResult"].clone();
    expected["cniVersion"] = configuration["cniVersion"].clone();
    assert_eq!(serde_json::from_str::<Value>(answer).unwrap(), expected, "{answer}");
}

const REQUESTS: [&str; 3] = [
    r#"{"Netns":"/var/run/netns/cni-1","PodName":"cart","PodNamespace":"shop","IPs":[{"Interface":2,"Address":{"IP":"10.0.0.2","Mask":"////AA=="},"Gateway":"10.0.0.1"},{"Interface":null,"Address":{"IP":"fd00::2","Mask":"//////////8AAAAAAAAAAA=="},"Gateway":""}]}"#,
    r#"{"Netns":"/var/run/netns/cni-1","PodName":"cart","PodNamespace":"shop","PodUID":"u-1","IPs":null}"#,
    r#"{"Netns":"","PodName":"","PodNamespace":"","IPs":[{"Address":{"IP":"::ffff:10.0.0.2"}}]}"#,
];

#[test]
fn request_to_add_a_pod_is_read_as_it_was_written() {
    fuzz!(&REQUESTS, same_again::<AddRequest>);
}
