//! The decision for every combination of what it looks at, against a table that people can read.
#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use redirect_agent::{
    enablement::{self, Selectors},
    membership::{
        ANNOTATION_SIDECAR_STATUS, Config, LABEL_DATAPLANE_MODE, Namespace, Phase, Pod, PodKey,
        decide,
    },
};

const MODES: [Option<&str>; 6] =
    [None, Some("ambient"), Some("none"), Some(""), Some("Ambient"), Some("sidecar")];

fn labels(mode: Option<&str>) -> BTreeMap<String, String> {
    mode.map(|mode| (LABEL_DATAPLANE_MODE.to_owned(), mode.to_owned())).into_iter().collect()
}

fn describe(mode: Option<&str>) -> String {
    mode.map_or("absent".to_owned(), |mode| format!("{mode:?}"))
}

/// One block per combination of what keeps a pod out for certain; in it, one row per label of the
/// namespace, one column per label of the pod.
fn table() -> String {
    let mut table = String::from(
        "rows: the namespace's label istio.io/dataplane-mode; columns: the pod's; + is enrolled\n",
    );
    for excluded in [false, true] {
        for host_network in [false, true] {
            for phase in
                [Phase::Pending, Phase::Running, Phase::Succeeded, Phase::Failed, Phase::Unknown]
            {
                for sidecar in [None, Some(""), Some("{}")] {
                    block(&mut table, excluded, host_network, phase, sidecar, None);
                }
            }
        }
    }
    for (name, selectors) in SELECTORS {
        for sidecar in [None, Some("{}")] {
            write!(table, "\nenablement selectors: {name}").unwrap();
            let selectors = Some(selectors.parse().unwrap());
            block(&mut table, false, false, Phase::Running, sidecar, selectors);
        }
    }
    table
}

/// Beside those that mean the same as the label.
const SELECTORS: [(&str, &str); 3] = [
    ("istio-cni's own", enablement::DEFAULT),
    (
        "namespaces with a mode, pods that do not opt out with an empty one",
        "- namespaceSelector: {matchExpressions: [{key: istio.io/dataplane-mode, operator: Exists}]}
  podSelector: {matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: ['']}]}",
    ),
    ("none", "[]"),
];

#[test]
fn istio_cnis_own_selectors_mean_what_the_label_means() {
    let selectors: Selectors = enablement::DEFAULT.parse().unwrap();
    let config = Config { selectors: Some(selectors), ..Config::default() };
    for namespace in MODES {
        for pod in MODES {
            let (namespace, pod) = (in_namespace(namespace), pod_with(pod));
            let by_label = decide(Some(&namespace), &pod, &Config::default());
            let by_selectors = decide(Some(&namespace), &pod, &config);
            assert_eq!(by_selectors.enrolled, by_label.enrolled, "{namespace:?} {pod:?}");
        }
    }
}

fn in_namespace(mode: Option<&str>) -> Namespace {
    Namespace { name: "shop".to_owned(), labels: labels(mode) }
}

fn pod_with(mode: Option<&str>) -> Pod {
    Pod {
        key: PodKey::new("shop", "cart").unwrap(),
        uid: "u-1".to_owned(),
        service_account: "default".to_owned(),
        node_name: None,
        labels: labels(mode),
        annotations: BTreeMap::new(),
        host_network: false,
        host_users: true,
        phase: Phase::Running,
        ips: Vec::new(),
        deleting: false,
    }
}

fn block(
    table: &mut String,
    excluded: bool,
    host_network: bool,
    phase: Phase,
    sidecar: Option<&str>,
    selectors: Option<Selectors>,
) {
    writeln!(
        table,
        "\nnamespace excluded: {excluded}, host network: {host_network}, phase: {phase:?}, \
         sidecar annotation: {}",
        describe(sidecar)
    )
    .unwrap();
    let mut rows = vec![("no namespace".to_owned(), None)];
    rows.extend(MODES.map(|mode| (describe(mode), Some(in_namespace(mode)))));
    let header: String = MODES.iter().map(|mode| format!("{:<26}", describe(*mode))).collect();
    writeln!(table, "{:<14}{}", "", header.trim_end()).unwrap();
    let mut config = Config { selectors, ..Config::default() };
    if excluded {
        config.excluded_namespaces.insert("shop".to_owned());
    }
    for (name, namespace) in rows {
        let mut row = format!("{name:<14}");
        for mode in MODES {
            let pod = Pod {
                annotations: sidecar
                    .map(|value| (ANNOTATION_SIDECAR_STATUS.to_owned(), value.to_owned()))
                    .into_iter()
                    .collect(),
                host_network,
                phase,
                ..pod_with(mode)
            };
            let decision = decide(namespace.as_ref(), &pod, &config);
            let sign = if decision.enrolled { '+' } else { '-' };
            write!(row, "{:<26}", format!("{sign} {}", decision.reason)).unwrap();
        }
        writeln!(table, "{}", row.trim_end()).unwrap();
    }
}

#[test]
fn every_combination_is_decided_as_in_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/membership.txt");
    let actual = table();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &actual).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    for (number, (actual, expected)) in actual.lines().zip(expected.lines()).enumerate() {
        assert_eq!(actual, expected, "{} line {}", path.display(), number + 1);
    }
    assert_eq!(actual.lines().count(), expected.lines().count(), "{}", path.display());
}
