//! What Kubernetes' objects say: pods, namespaces, annotations.

use std::collections::BTreeMap;

use super::{fuzz, text};
use crate::{
    membership::{can_be_a_pods, check_namespace_name},
    source::dir::Manifests,
    traffic::{
        ANNOTATION_BYPASS_INBOUND, ANNOTATION_DNS_CAPTURE, ANNOTATION_VIRTUAL_INTERFACES, PREFIX,
        SELECTIONS, SIDECAR_PREFIX, Selection, Settings, Traffic,
    },
};

/// Each annotation that matters has a line. The key is its place.
const ANNOTATIONS: [&str; 6] = [
    "true\nfalse\ntap0, veth1\n10.0.0.0/8,fd00::/8\n10.0.0.1\n80,8000-8010\n443\n8080\n15090\n192.0.2.0/24\n2001:db8::1",
    "T\n0\n\n*\n\n*\n65535\n*\n1-65535\n*\n::/0",
    "maybe\n\neth0\n::ffff:10.0.0.0/104\n10.0.0.0/33\n0\n8010-8000\n1,2,3,4,5,6\n\n10.1.2.3/8,10.0.0.0/8\nfe80::1",
    "\n\na/b\n0.0.0.0/0\n::\n1024-2047\n1-65534\n\n\n\n",
    "f\nTrue\n0123456789abcdef\n::ffff:10.0.0.1\n\n80-80\n 80 - 90 \n\n\n\n",
    "1\n1\n.,..\n10.0.0.0/8,10.0.0.0/8\n,,\n,\n1,1\n\n\n\n",
];

fn annotations(bytes: &[u8], prefix: &str) -> BTreeMap<String, String> {
    let named = [ANNOTATION_BYPASS_INBOUND, ANNOTATION_DNS_CAPTURE, ANNOTATION_VIRTUAL_INTERFACES];
    let names = named.map(str::to_owned).into_iter();
    let names = names.chain(SELECTIONS.map(|name| format!("{prefix}{name}")));
    let text = text(bytes);
    names.zip(text.split('\n').map(str::to_owned)).collect()
}

/// The annotations that ask for it.
fn written(traffic: &Traffic) -> BTreeMap<String, String> {
    fn both<T: ToString>(selection: &Selection<T>) -> [String; 2] {
        let list = |of: &[T]| of.iter().map(T::to_string).collect::<Vec<_>>().join(",");
        let only = selection.only.as_deref().map_or_else(|| "*".to_owned(), list);
        [only, list(&selection.except)]
    }
    let Traffic { bypass_inbound, dns_capture, virtual_interfaces, selections } = traffic;
    let named = [bypass_inbound.to_string(), dns_capture.to_string(), virtual_interfaces.join(",")];
    let selections = [
        both(&selections.outbound_ranges),
        both(&selections.outbound_ports),
        both(&selections.inbound_ports),
        both(&selections.inbound_sources),
    ];
    let lines: Vec<String> = named.into_iter().chain(selections.into_iter().flatten()).collect();
    annotations(lines.join("\n").as_bytes(), PREFIX)
}

#[test]
fn annotations_have_a_meaning_that_can_be_written_and_applied() {
    fuzz!(&ANNOTATIONS, |bytes| {
        let settings = Settings { sidecar_annotations: true, ..Settings::default() };
        for prefix in [PREFIX, SIDECAR_PREFIX] {
            let annotations = annotations(bytes, prefix);
            let (traffic, problems) = settings.read(&annotations, None);
            assert!(problems.iter().all(|problem| problem.starts_with("annotation ")));
            assert_eq!(traffic.selections.check(), Ok(()), "the programs have room for it");
            assert!(traffic.virtual_interfaces.iter().all(|name| (1..=15).contains(&name.len())));
            let again = settings.read(&written(&traffic), None);
            assert_eq!(again, (traffic.clone(), Vec::new()), "{traffic}");
            let stored = serde_json::to_string(&traffic).unwrap();
            assert_eq!(serde_json::from_str::<Traffic>(&stored).unwrap(), traffic);
            // What cannot be read leaves in force what was.
            let (kept, _) = settings.read(&annotations, Some(&traffic));
            assert_eq!(kept, traffic);
            let (traced, origins) = settings.trace(&annotations, Some(&traffic));
            assert_eq!(traced, traffic);
            assert_eq!(
                origins.iter().filter(|origin| origin.problem.is_some()).count(),
                problems.len()
            );
        }
    });
}

const MANIFESTS: [&str; 8] = [
    "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {istio.io/dataplane-mode: ambient}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: cart, namespace: shop, uid: u-1, annotations: {a: b}}\nspec: {serviceAccountName: s, hostNetwork: false, hostUsers: false, nodeName: n1}\nstatus: {phase: Running, podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}, {ip: 'fd00::2'}]}\n",
    "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\nspec:\n  template:\n    metadata: {labels: {app: web}}\n    spec: {containers: [{name: c}]}\n",
    r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"status":{"podIP":"::ffff:10.0.0.2"}},{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"shop"},"spec":{"clusterIP":"10.96.0.1","ports":[{"port":80,"targetPort":"http"}],"selector":{"app":"web"}}}]}"#,
    r#"{"kind":"PodList","apiVersion":"v1","items":[{"metadata":{"name":"b","namespace":"shop"}},{"metadata":{"name":"c"}}]}"#,
    r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","annotations":{"kubernetes.io/config.mirror":"x","kubernetes.io/config.hash":"h"},"deletionTimestamp":"2026-11-30T16:30:00Z"},"spec":{"hostNetwork":true},"status":{"podIP":"127.0.0.1","phase":"Odd"}}"#,
    "a: &a [x]\nb: *a\nc: !!int '3'\n? [d]\n: |\n  e\n",
    r#"{"apiVersion":"apps/v1","kind":"DaemonSet","metadata":{"name":"d"},"spec":{"template":{"metadata":"x"}}}"#,
    r#"{"apiVersion":"batch/v1","kind":"Job","metadata":{"name":"j"},"spec":{"template":{"metadata":{"name":"x"}}}}"#,
];

#[test]
fn manifests_are_read_or_refused_with_a_reason() {
    fuzz!(&MANIFESTS, |bytes| {
        for is_json in [false, true] {
            let mut manifests = Manifests::default();
            if let Err(error) = manifests.take(bytes, is_json) {
                assert!(!error.is_empty());
            }
            for (key, pod) in &manifests.pods {
                assert_eq!(key.to_string().parse().as_ref(), Ok(&pod.key));
                assert!(!pod.uid.is_empty() && !pod.kubelet_uid().is_empty());
                assert!(!pod.service_account.is_empty());
                assert!(pod.host_network || pod.ips.iter().all(|ip| can_be_a_pods(*ip)));
                assert!(pod.ips.iter().all(|ip| ip.to_canonical() == *ip));
            }
            for name in manifests.namespaces.keys().chain(&manifests.mesh_namespaces()) {
                assert!(check_namespace_name(name).is_ok(), "{name}");
            }
        }
    });
}
