//! The directory source, on real files.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use notify::{
    Watcher as _,
    event::{AccessKind, AccessMode, EventKind},
};
use redirect_agent::{
    membership::PodKey,
    source::{
        Inventory, Problem, Redirection, Source as _, Whom,
        dir::{self, DirSource},
    },
};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};

const NODE: &str = "n1";
const OPENED: EventKind = EventKind::Access(AccessKind::Open(AccessMode::Any));

/// A directory of manifests that an agent follows.
struct Fixture {
    dir: TempDir,
    source: DirSource,
    inventory: watch::Receiver<Arc<Inventory>>,
    _watcher: JoinHandle<anyhow::Result<()>>,
    _stop: DropGuard,
}

impl Fixture {
    async fn new(files: &[(&str, &str)]) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(dir.path().join(name), content).unwrap();
        }
        Fixture::open(dir).await
    }

    async fn open(dir: TempDir) -> Fixture {
        let (source, watcher) = dir::open(dir.path(), NODE).await.unwrap();
        let stop = CancellationToken::new();
        let inventory = source.inventory();
        let watcher = tokio::spawn(watcher.run(stop.clone()));
        Fixture { dir, source, inventory, _watcher: watcher, _stop: stop.drop_guard() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    fn now(&mut self) -> Arc<Inventory> {
        Arc::clone(&self.inventory.borrow_and_update())
    }

    /// The inventory as soon as it is as wanted, which is within a second.
    async fn within_a_second(&mut self, wanted: impl Fn(&Inventory) -> bool) -> Arc<Inventory> {
        let mut inventory = self.inventory.clone();
        let wait = inventory.wait_for(|inventory| wanted(inventory));
        match tokio::time::timeout(Duration::from_secs(1), wait).await {
            Ok(inventory) => Arc::clone(&inventory.unwrap()),
            Err(_) => panic!("not so within a second: {:#?}", self.inventory.borrow()),
        }
    }
}

fn pod(name: &str, uid: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: shop, name: {name}, uid: {uid}}}\n\
         spec: {{nodeName: {NODE}}}\nstatus: {{phase: Running, podIPs: [{{ip: '{ip}'}}]}}\n"
    )
}

fn labeled(name: &str, mode: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  namespace: shop\n  name: {name}\n  uid: u-{name}\n  \
         labels: {{istio.io/dataplane-mode: '{mode}'}}\n"
    )
}

fn key(name: &str) -> PodKey {
    PodKey::new("shop", name).unwrap()
}

fn names(inventory: &Inventory) -> Vec<&str> {
    inventory.pods.keys().map(|key| key.name.as_str()).collect()
}

fn mode<'a>(inventory: &'a Inventory, name: &str) -> Option<&'a str> {
    inventory.pods.get(&key(name))?.labels.get("istio.io/dataplane-mode").map(String::as_str)
}

fn problem_with(inventory: &Inventory, object: &str) -> Problem {
    inventory
        .problems
        .iter()
        .find(|p| p.object == object)
        .unwrap_or_else(|| panic!("no problem with {object}: {:#?}", inventory.problems))
        .clone()
}

#[tokio::test]
async fn manifests_of_every_form_are_read_and_other_kinds_and_nodes_ignored() {
    let mut fixture = Fixture::new(&[
        (
            "a.yaml",
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  \
             labels: {istio.io/dataplane-mode: ambient}\n---\n---\n# nothing\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {name: web}\n---\n\
             apiVersion: metrics.k8s.io/v1beta1\nkind: Pod\nmetadata: {name: no}\n",
        ),
        ("b.yml", &format!("%YAML 1.2\n---\n{}...\n", pod("b", "u-b", "fd00::b"))),
        (
            "c.json",
            r#"{"apiVersion": "v1", "kind": "List", "items": [
                {"apiVersion": "v1", "kind": "Pod",
                 "metadata": {"namespace": "shop", "name": "c", "uid": "u-c"},
                 "status": {"podIPs": [{"ip": "10.0.0.3"}, {"ip": "fd00::3"}]}},
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}]}
               {"apiVersion": "v1", "kind": "PodList", "items": [
                {"metadata": {"namespace": "shop", "name": "d", "uid": "u-d"}},
                {"metadata": {"namespace": "shop", "name": "e", "uid": "u-e"},
                 "spec": {"nodeName": "another", "containers": []}}]}"#,
        ),
        (".hidden.yaml", "] not yaml ["),
        ("README.txt", "] not yaml ["),
    ])
    .await;
    fs::create_dir(fixture.path("subdirectory")).unwrap();
    fs::write(fixture.path("subdirectory/f.yaml"), pod("f", "u-f", "10.0.0.9")).unwrap();
    let inventory = fixture.now();
    assert_eq!(inventory.problems, []);
    assert_eq!(names(&inventory), ["b", "c", "d"]);
    assert_eq!(inventory.namespaces["shop"].labels["istio.io/dataplane-mode"], "ambient");
    assert_eq!(inventory.pods[&key("b")].node_name.as_deref(), Some(NODE));
    assert_eq!(inventory.pods[&key("c")].ips.len(), 2);
}

#[tokio::test]
async fn a_label_that_is_edited_takes_effect_within_a_second() {
    let mut fixture = Fixture::new(&[("cart.yaml", &labeled("cart", "none"))]).await;
    assert_eq!(mode(&fixture.now(), "cart"), Some("none"));

    fixture.write("cart.yaml", &labeled("cart", "ambient"));
    fixture.within_a_second(|i| mode(i, "cart") == Some("ambient")).await;

    // As editors do it: a new file beside, then renamed over the old one.
    fixture.write(".cart.yaml.swp", &labeled("cart", "none"));
    fs::rename(fixture.path(".cart.yaml.swp"), fixture.path("cart.yaml")).unwrap();
    fixture.within_a_second(|i| mode(i, "cart") == Some("none")).await;

    fs::remove_file(fixture.path("cart.yaml")).unwrap();
    fixture.within_a_second(|i| i.pods.is_empty()).await;
    assert_eq!(fixture.now().problems, []);
}

#[tokio::test]
async fn an_editor_that_moves_the_file_away_first_does_not_take_the_pod_away() {
    let mut fixture = Fixture::new(&[("cart.yaml", &labeled("cart", "none"))]).await;
    let mut seen = fixture.source.inventory();
    for (number, mode_) in ["ambient", "none", "ambient"].into_iter().enumerate() {
        fs::rename(fixture.path("cart.yaml"), fixture.path(&format!("cart.yaml~{number}")))
            .unwrap();
        fixture.write("cart.yaml", &labeled("cart", mode_));
        let wait =
            seen.wait_for(|i| !i.pods.contains_key(&key("cart")) || mode(i, "cart") == Some(mode_));
        let now =
            tokio::time::timeout(Duration::from_secs(1), wait).await.unwrap().unwrap().clone();
        assert_eq!(mode(&now, "cart"), Some(mode_));
    }
    assert_eq!(fixture.now().problems, []);
}

#[tokio::test]
async fn a_file_that_does_not_parse_or_is_empty_keeps_its_last_good_content() {
    let mut fixture =
        Fixture::new(&[("a.yaml", &labeled("a", "ambient")), ("b.yaml", &labeled("b", "ambient"))])
            .await;
    for broken in ["apiVersion: v1\nkind: [Pod\n", "", "\n# all gone\n", "\u{0}\u{1}"] {
        fixture.write("a.yaml", broken);
        let inventory = fixture.within_a_second(|i| !i.problems.is_empty()).await;
        assert_eq!(names(&inventory), ["a", "b"]);
        let problem = problem_with(&inventory, "a.yaml");
        assert!(problem.message.contains("its last good content stays in force"), "{problem}");
        assert!(!problem.message.contains('\n'), "{problem}");

        fixture.write("a.yaml", &labeled("a", "none"));
        let inventory = fixture.within_a_second(|i| i.problems.is_empty()).await;
        assert_eq!(mode(&inventory, "a"), Some("none"));
    }
}

#[tokio::test]
async fn one_bad_document_affects_only_its_own_object() {
    let good = format!("{}---\n{}", labeled("a", "none"), labeled("b", "none"));
    let mut fixture = Fixture::new(&[("pods.yaml", &good)]).await;
    let bad_label = labeled("a", "none").replace("'none'", "[none]");
    fixture.write("pods.yaml", &format!("{bad_label}---\n{}", labeled("b", "ambient")));
    let inventory = fixture.within_a_second(|i| mode(i, "b") == Some("ambient")).await;
    assert_eq!(mode(&inventory, "a"), Some("none"));
    let problem = problem_with(&inventory, "pods.yaml, document 1 (pod shop/a)");
    assert!(problem.message.contains("its last good version stays in force"), "{problem}");
}

#[tokio::test]
async fn what_is_wrong_with_a_document_is_said_by_file_and_document() {
    let file = [
        "apiVersion: v1\nkind: Pod\nmetadata: {namespace: shop, name: no-uid}\n".to_owned(),
        pod("bad-ip", "u-1", "10.0.0.300"),
        pod("loopback", "u-2", "127.0.0.1"),
        pod("../../etc", "u-3", "10.0.0.3"),
        "just text\n".to_owned(),
        "kind: Pod\n".to_owned(),
        pod("good", "u-4", "10.0.0.4"),
    ]
    .join("---\n");
    let mut fixture = Fixture::new(&[("pods.yaml", &file)]).await;
    let inventory = fixture.now();
    assert_eq!(names(&inventory), ["good"]);
    for (object, message) in [
        ("pods.yaml, document 1 (pod shop/no-uid)", "metadata.uid"),
        ("pods.yaml, document 2 (pod shop/bad-ip)", "\"10.0.0.300\" is not an IP address"),
        ("pods.yaml, document 3 (pod shop/loopback)", "not an address that a pod can have"),
        ("pods.yaml, document 4", "../../etc"),
        ("pods.yaml, document 5", "no Kubernetes object"),
        ("pods.yaml, document 6", "no Kubernetes object"),
    ] {
        let problem = problem_with(&inventory, object);
        assert!(problem.message.contains(message), "{problem}");
    }
    assert_eq!(inventory.problems.len(), 6);
}

#[tokio::test]
async fn the_same_pod_in_two_files_is_that_of_the_first_file() {
    let mut fixture = Fixture::new(&[
        ("a.yaml", &pod("cart", "u-1", "10.0.0.1")),
        ("b.yaml", &pod("cart", "u-2", "10.0.0.2")),
    ])
    .await;
    let inventory = fixture.now();
    assert_eq!(inventory.pods[&key("cart")].uid, "u-1");
    let problem = problem_with(&inventory, "b.yaml, document 1 (pod shop/cart)");
    assert!(problem.message.contains("a.yaml, document 1"), "{problem}");

    fs::remove_file(fixture.path("a.yaml")).unwrap();
    let inventory = fixture.within_a_second(|i| i.problems.is_empty()).await;
    assert_eq!(inventory.pods[&key("cart")].uid, "u-2");
}

#[tokio::test]
async fn a_newcomer_with_the_address_or_uid_of_another_pod_is_left_alone() {
    for (uid, ip) in [("u-2", "10.0.0.1"), ("u-2", "::ffff:10.0.0.1"), ("u-1", "10.0.0.2")] {
        let mut fixture = Fixture::new(&[("cart.yaml", &pod("cart", "u-1", "10.0.0.1"))]).await;
        // Before it by name, and still it does not push the other one out.
        fixture.write("a.yaml", &pod("a", uid, ip));
        let inventory = fixture.within_a_second(|i| !i.problems.is_empty()).await;
        assert_eq!(names(&inventory), ["cart"]);
        let problem = problem_with(&inventory, "pod shop/a");
        assert!(problem.message.contains("shop/cart"), "{problem}");

        fs::remove_file(fixture.path("cart.yaml")).unwrap();
        let inventory = fixture.within_a_second(|i| i.problems.is_empty()).await;
        assert_eq!(names(&inventory), ["a"]);
    }
}

#[tokio::test]
async fn a_pod_that_changes_its_address_into_a_conflict_stays_as_it_was() {
    let mut fixture = Fixture::new(&[
        ("a.yaml", &pod("a", "u-a", "fd00::a")),
        ("b.yaml", &pod("b", "u-b", "fd00::b")),
    ])
    .await;
    fixture.write("a.yaml", &pod("a", "u-a", "fd00::b"));
    let inventory = fixture.within_a_second(|i| !i.problems.is_empty()).await;
    assert_eq!(inventory.pods[&key("a")].ips[0].to_string(), "fd00::a");
    assert_eq!(inventory.pods[&key("b")].ips[0].to_string(), "fd00::b");
}

#[tokio::test]
async fn a_finished_pod_and_one_on_the_nodes_network_claim_no_address() {
    let finished = pod("job", "u-job", "10.0.0.1").replace("Running", "Succeeded");
    let host = pod("proxy", "u-proxy", "10.0.0.1").replace("spec: {", "spec: {hostNetwork: true, ");
    let mut fixture = Fixture::new(&[
        ("a.yaml", &finished),
        ("b.yaml", &host),
        ("c.yaml", &pod("web", "u-web", "10.0.0.1")),
    ])
    .await;
    let inventory = fixture.now();
    assert_eq!(inventory.problems, []);
    assert_eq!(names(&inventory), ["job", "proxy", "web"]);
}

#[tokio::test]
async fn the_redirection_is_published_as_the_merge_patch_that_a_cluster_would_get() {
    let mut fixture = Fixture::new(&[("cart.yaml", &pod("cart", "u-1", "10.0.0.1"))]).await;
    let cart = fixture.now().pods[&key("cart")].clone();
    let status = fixture.path(".status/shop_cart.json");
    for (state, text) in [(Redirection::Pending, "pending"), (Redirection::Enabled, "enabled")] {
        for _ in 0..2 {
            fixture.source.publish(&cart, Some(state)).await.unwrap();
            assert_eq!(
                fs::read_to_string(&status).unwrap(),
                format!(
                    r#"{{"metadata":{{"annotations":{{"ambient.istio.io/redirection":"{text}"}}}}}}"#
                )
            );
        }
    }
    for _ in 0..2 {
        fixture.source.publish(&cart, None).await.unwrap();
        assert!(!status.exists());
    }
    let left: Vec<_> = fs::read_dir(fixture.path(".status")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn the_status_of_a_pod_that_is_gone_is_removed_and_that_of_others_kept() {
    let another_nodes = pod("other", "u-o", "10.0.0.7").replace(NODE, "n2");
    let dir = tempfile::tempdir().unwrap();
    let status = dir.path().join(".status");
    fs::create_dir(&status).unwrap();
    fs::write(dir.path().join("cart.yaml"), pod("cart", "u-1", "10.0.0.1")).unwrap();
    fs::write(dir.path().join("other.yaml"), another_nodes).unwrap();
    for name in ["shop_cart.json", "shop_other.json", "shop_gone.json", ".shop_gone.json.new"] {
        fs::write(status.join(name), "{}").unwrap();
    }
    fs::write(status.join("README"), "not ours").unwrap();

    let mut fixture = Fixture::open(dir).await;
    until_gone(&status.join("shop_gone.json")).await;
    until_gone(&status.join(".shop_gone.json.new")).await;
    for kept in ["shop_cart.json", "shop_other.json", "README"] {
        assert!(status.join(kept).exists(), "{kept}");
    }

    // With a file that nobody can read, only a pod that we knew is known to be gone.
    fixture.write("broken.yaml", "[");
    fixture.within_a_second(|i| !i.problems.is_empty()).await;
    fs::write(status.join("shop_unknown.json"), "{}").unwrap();
    fs::remove_file(fixture.path("cart.yaml")).unwrap();
    until_gone(&status.join("shop_cart.json")).await;
    assert!(status.join("shop_unknown.json").exists());

    fs::remove_file(fixture.path("broken.yaml")).unwrap();
    until_gone(&status.join("shop_unknown.json")).await;
    assert!(status.join("shop_other.json").exists());
}

async fn until_gone(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(2);
    while path.exists() {
        assert!(Instant::now() < deadline, "{} is still there", path.display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_directory_that_is_replaced_is_followed_all_the_same() {
    let mut fixture = Fixture::new(&[("cart.yaml", &labeled("cart", "none"))]).await;
    let old = tempfile::tempdir().unwrap();
    fs::rename(fixture.dir.path(), old.path().join("old")).unwrap();
    let inventory = fixture.within_a_second(|i| !i.problems.is_empty()).await;
    assert_eq!(names(&inventory), ["cart"], "{:?}", inventory.problems);
    fs::create_dir(fixture.dir.path()).unwrap();
    fixture.write("cart.yaml", &labeled("cart", "ambient"));
    fixture.within_a_second(|i| mode(i, "cart") == Some("ambient")).await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_refused_by_name() {
    let error = dir::open("/nonexistent/manifests", NODE).await.unwrap_err();
    assert!(format!("{error:#}").contains("/nonexistent/manifests"), "{error:#}");
}

#[tokio::test]
async fn pods_that_are_asked_for_together_are_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let manifests = (1..=100).map(|n| pod(&format!("p{n}"), &format!("u-{n}"), "10.0.0.1"));
    let manifests: Vec<String> = manifests.collect();
    fs::write(dir.path().join("pods.yaml"), manifests.join("---\n")).unwrap();
    // Nobody else reads it meanwhile: the watcher does not run.
    let (source, _watcher) = dir::open(dir.path(), NODE).await.unwrap();
    let pod = source.find(&Whom::Named(key("p7"))).await.unwrap().unwrap();
    source.publish(&pod, Some(Redirection::Enabled)).await.unwrap();
    let (sender, events) = mpsc::channel();
    let mut watcher = notify::recommended_watcher(sender).unwrap();
    watcher.watch(dir.path(), notify::RecursiveMode::NonRecursive).unwrap();

    // A dual-stack pod is an endpoint of its Service twice.
    let keys = (1..=99).map(|n| key(&format!("p{n}"))).chain([key("none"), key("p7")]);
    let keys: Vec<PodKey> = keys.collect();
    let found = source.find_all(&keys).await;
    assert_eq!(found.len(), 101);
    for (key, found) in keys.iter().zip(found) {
        let found = found.unwrap();
        assert_eq!(found.as_ref().map(|pod| &pod.key), (key.name != "none").then_some(key));
        let is_enabled = found.is_some_and(|pod| !pod.annotations.is_empty());
        assert_eq!(is_enabled, key.name == "p7", "{key}");
    }
    fs::write(dir.path().join("end"), "").unwrap();
    let is_of = |event: &notify::Event, name: &str| event.paths == [dir.path().join(name)];
    let opened = events
        .iter()
        .map(Result::unwrap)
        .take_while(|event| !is_of(event, "end"))
        .filter(|event| event.kind == OPENED && is_of(event, "pods.yaml"));
    assert_eq!(opened.count(), 1);
}
