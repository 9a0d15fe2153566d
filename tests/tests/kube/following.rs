//! What the API server says is followed, whatever happens to it and to the way there.

use std::time::Duration;

use redirect_agent::{
    membership::Config,
    metrics::Metrics,
    source::{Source as _, kube},
};
use redirect_tests::apiserver::{ApiServer, Cut, Kind};
use tokio::time::timeout;

use crate::fixture::{Fixture, NODE, SOON, config_of, key, namespace, pod};

#[tokio::test]
async fn open_has_everything_of_this_node_and_only_the_labels_that_decide() {
    let server = ApiServer::start().unwrap();
    for number in 0..1200 {
        server.put(Kind::Namespace, namespace(&format!("plain-{number}"), &[("team", "a")]));
    }
    let mesh = [("istio.io/dataplane-mode", "ambient"), ("team", "a")];
    server.put(Kind::Namespace, namespace("shop", &mesh));
    server.put(Kind::Pod, pod("cart", "10.0.0.1 fd00::1"));
    let mut elsewhere = pod("elsewhere", "10.0.1.1");
    elsewhere["spec"]["nodeName"] = "n2".into();
    server.put(Kind::Pod, elsewhere);
    let mut unbound = pod("unbound", "");
    unbound["spec"]["nodeName"] = serde_json::Value::Null;
    server.put(Kind::Pod, unbound);

    let mut fixture = Fixture::follow(server, &Config::default()).await;

    let inventory = fixture.now();
    assert_eq!(inventory.problems, []);
    assert_eq!(inventory.pods.keys().collect::<Vec<_>>(), [&key("cart")]);
    let cart = &inventory.pods[&key("cart")];
    assert_eq!(cart.ips.len(), 2);
    assert_eq!(cart.service_account, "cart");
    assert_eq!(inventory.namespaces.keys().collect::<Vec<_>>(), ["shop"]);
    assert_eq!(inventory.namespaces["shop"].labels.len(), 1);
    let pages = fixture.server.requests_of("list", "namespaces");
    assert!(pages.len() >= 3, "{pages:?}");
    assert!(fixture.source.describe().starts_with("kube:http://127.0.0.1:"));
}

#[tokio::test]
async fn selectors_say_which_labels_of_namespaces_are_kept() {
    let server = ApiServer::start().unwrap();
    server.put(Kind::Namespace, namespace("shop", &[("team", "a"), ("size", "3")]));
    server.put(Kind::Namespace, namespace("bank", &[("istio.io/dataplane-mode", "ambient")]));
    let selectors = "[{namespaceSelector: {matchLabels: {team: a}}}]".parse().unwrap();
    let config = Config { selectors: Some(selectors), ..Config::default() };
    let mut fixture = Fixture::follow(server, &config).await;
    let inventory = fixture.now();
    assert_eq!(inventory.namespaces.keys().collect::<Vec<_>>(), ["shop"]);
    assert_eq!(inventory.namespaces["shop"].labels.keys().collect::<Vec<_>>(), ["team"]);
}

#[tokio::test]
async fn api_server_that_is_away_at_the_start_is_waited_for() {
    let mut server = ApiServer::start().unwrap();
    server.put(Kind::Pod, pod("cart", "10.0.0.1"));
    let config = config_of(&server).await;
    server.go_away().unwrap();
    let membership = Config::default();
    let metrics = Metrics::default();
    let opening = kube::open(config, NODE, &membership, &metrics, |_| ());
    tokio::pin!(opening);
    assert!(timeout(Duration::from_secs(1), &mut opening).await.is_err(), "it was not there");
    server.come_back().unwrap();
    let (source, _watcher) = timeout(SOON, opening).await.unwrap().unwrap();
    assert!(source.inventory().borrow().pods.contains_key(&key("cart")));
}

#[tokio::test]
async fn labels_of_namespaces_and_pods_are_followed() {
    let mut fixture = Fixture::start().await;
    let ambient = [("istio.io/dataplane-mode", "ambient")];
    fixture.server.put(Kind::Namespace, namespace("shop", &ambient));
    fixture.until("the label", |i| i.namespaces.contains_key("shop")).await;
    fixture.label("1");
    fixture.until_labeled("1").await;
    fixture.server.put(Kind::Namespace, namespace("shop", &[]));
    fixture.until("no label", |i| i.namespaces.is_empty()).await;
    fixture.server.put(Kind::Namespace, namespace("shop", &ambient));
    fixture.until("the label again", |i| i.namespaces.contains_key("shop")).await;
    fixture.server.delete(Kind::Namespace, "", "shop");
    fixture.until("no namespace", |i| i.namespaces.is_empty()).await;
}

#[tokio::test]
async fn what_happened_while_the_api_server_was_away_is_caught_up() {
    let mut fixture = Fixture::start().await;
    fixture.server.put(Kind::Pod, pod("gone", "10.0.0.2"));
    fixture.until("both", |i| i.pods.len() == 2).await;
    for forgets in [false, true] {
        fixture.server.go_away().unwrap();
        let away = fixture.until("the trouble", |i| !i.problems.is_empty()).await;
        assert_eq!(away.pods.len(), 2, "nothing is known to be gone");
        assert!(away.problems[0].message.contains("what is known stays in force"), "{away:?}");
        fixture.label(if forgets { "2" } else { "1" });
        fixture.server.delete(Kind::Pod, "shop", "gone");
        fixture.server.put(Kind::Pod, pod("new", "10.0.0.3"));
        if forgets {
            fixture.server.elsewhere();
            fixture.server.forget(false);
        }
        fixture.server.come_back().unwrap();
        fixture.until_labeled(if forgets { "2" } else { "1" }).await;
        fixture
            .until("all of it", |i| {
                i.problems.is_empty() && i.pods.keys().eq([&key("cart"), &key("new")])
            })
            .await;
        fixture.server.delete(Kind::Pod, "shop", "new");
        fixture.server.put(Kind::Pod, pod("gone", "10.0.0.2"));
        fixture.until("both", |i| i.pods.keys().eq([&key("cart"), &key("gone")])).await;
    }
}

/// kube's watcher asks for ever for what is gone when 410 is the answer, and not an event.
#[tokio::test]
async fn history_that_is_gone_is_listed_anew_and_no_pod_vanishes_meanwhile() {
    let mut fixture = Fixture::start().await;
    fixture.server.put(Kind::Pod, pod("other", "10.0.0.2"));
    fixture.until("both", |i| i.pods.len() == 2).await;
    for (as_status, label) in [(false, "1"), (true, "2")] {
        let lists = fixture.server.requests_of("list", "pods").len();
        let mut every = fixture.inventory.clone();
        let watching = tokio::spawn(async move {
            let mut fewest = usize::MAX;
            while every.changed().await.is_ok() {
                fewest = fewest.min(every.borrow_and_update().pods.len());
                if every
                    .borrow()
                    .pods
                    .values()
                    .any(|p| p.labels.get("test").is_some_and(|l| l == label))
                {
                    break;
                }
            }
            fewest
        });
        fixture.server.elsewhere();
        fixture.server.forget(as_status);
        fixture.server.cut_watches(Cut::Cleanly);
        fixture.until_server("a new list", |s| s.requests_of("list", "pods").len() > lists).await;
        fixture.label(label);
        fixture.until_labeled(label).await;
        assert_eq!(timeout(SOON, watching).await.unwrap().unwrap(), 2, "a pod vanished");
    }
}

#[tokio::test]
async fn bookmarks_alone_keep_a_quiet_watch_up_to_date() {
    let mut fixture = Fixture::start().await;
    let watches = |s: &ApiServer, since: usize| s.requests_of("watch", "pods").len() > since;
    fixture.until_server("a watch", |s| watches(s, 0)).await;
    let lists = fixture.server.requests_of("list", "pods").len();
    // Much happens, and nothing of it here.
    fixture.server.elsewhere();
    fixture.server.bookmark();
    fixture.label("after the bookmark");
    fixture.until_labeled("after the bookmark").await;
    fixture.server.elsewhere();
    fixture.server.bookmark();
    // The bookmark goes out before the watch ends.
    let before = fixture.server.requests_of("watch", "pods").len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    fixture.server.forget(false);
    fixture.server.cut_watches(Cut::Cleanly);
    fixture.until_server("another watch", |s| watches(s, before)).await;
    fixture.label("from the bookmark on");
    fixture.until_labeled("from the bookmark on").await;
    assert_eq!(fixture.server.requests_of("list", "pods").len(), lists, "it was listed anew");
}

#[tokio::test]
async fn watch_that_breaks_goes_on() {
    let mut fixture = Fixture::start().await;
    fixture.until_server("a watch", |s| !s.requests_of("watch", "pods").is_empty()).await;
    for label in ["1", "2"] {
        fixture.server.cut_watches(Cut::Abruptly);
        fixture.label(label);
        fixture.until_labeled(label).await;
    }
    assert_eq!(fixture.server.requests_of("list", "pods").len(), 1, "it was listed anew");
}

/// kube's watcher says nothing when a watch goes on.
#[tokio::test]
async fn trouble_is_over_when_the_watch_goes_on_though_nothing_happens() {
    let mut fixture = Fixture::start().await;
    fixture.until_server("a watch", |s| !s.requests_of("watch", "pods").is_empty()).await;
    fixture.server.slow_down(Duration::from_millis(100));
    fixture.server.go_away().unwrap();
    fixture.until("the trouble", |i| !i.problems.is_empty()).await;
    fixture.server.come_back().unwrap();
    fixture.until("no trouble", |i| i.problems.is_empty()).await;
    assert_eq!(fixture.server.requests_of("list", "pods").len(), 1, "it was listed anew");
}

#[tokio::test]
async fn watches_that_end_at_once_are_not_asked_for_in_a_loop() {
    let mut fixture = Fixture::start().await;
    fixture.server.end_watches_at_once(true);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let asked = fixture.server.requests_of("watch", "pods").len();
    assert!((10..=61).contains(&asked), "{asked} watches in 3 s");
    fixture.server.end_watches_at_once(false);
    fixture.label("1");
    fixture.until_labeled("1").await;
}

#[tokio::test]
async fn refusal_is_named_with_what_is_needed_and_ends_when_it_is_granted() {
    let server = ApiServer::start().unwrap();
    server.put(Kind::Pod, pod("cart", "10.0.0.1"));
    let mut fixture = Fixture::follow(server, &Config::default()).await;
    fixture.server.forbid("watch", "pods");
    fixture.server.forbid("list", "pods");
    fixture.server.cut_watches(Cut::Cleanly);
    let refused = fixture.until("the refusal", |i| !i.problems.is_empty()).await;
    let problem = refused.problems[0].to_string();
    assert!(problem.contains("cannot watch resource") || problem.contains("cannot list resource"));
    assert!(problem.contains("list, watch on pods and namespaces"), "{problem}");
    assert!(refused.pods.contains_key(&key("cart")));
    fixture.server.allow_all();
    fixture.label("1");
    fixture.until_labeled("1").await;
    fixture.until("no problem", |i| i.problems.is_empty()).await;
}

#[tokio::test]
async fn watch_that_alone_is_refused_is_a_lasting_trouble_and_no_reason_to_list_again() {
    let mut fixture = Fixture::start().await;
    let lists = fixture.server.requests_of("list", "pods").len();
    fixture.server.forbid("watch", "pods");
    fixture.server.cut_watches(Cut::Cleanly);
    fixture.until("the refusal", |i| !i.problems.is_empty()).await;
    let watches = fixture.server.requests_of("watch", "pods").len();
    let again = |s: &ApiServer| s.requests_of("watch", "pods").len() > watches + 1;
    fixture.until_server("more attempts", again).await;
    assert_eq!(fixture.now().problems.len(), 1);
    fixture.label("1");
    fixture.server.allow_all();
    fixture.until_labeled("1").await;
    fixture.until("no problem", |i| i.problems.is_empty()).await;
    assert_eq!(fixture.server.requests_of("list", "pods").len(), lists);
}

#[tokio::test]
async fn server_that_does_not_speak_tls_is_a_trouble_and_waited_for() {
    let server = ApiServer::start().unwrap();
    let mut config = config_of(&server).await;
    config.cluster_url = server.url().replace("http:", "https:").parse().unwrap();
    let membership = Config::default();
    let metrics = Metrics::default();
    let opening = kube::open(config, NODE, &membership, &metrics, |_| ());
    let waited = timeout(Duration::from_secs(2), opening).await;
    assert!(
        waited.is_err(),
        "it was neither waited for nor refused: {:?}",
        waited.map(|r| r.err())
    );
}

#[tokio::test]
async fn slow_api_server_is_followed() {
    let mut fixture = Fixture::start().await;
    fixture.server.slow_down(Duration::from_millis(700));
    fixture.server.cut_watches(Cut::Abruptly);
    fixture.label("1");
    fixture.until_labeled("1").await;
}

#[tokio::test]
async fn node_name_and_kubeconfig_that_cannot_be_used_are_refused_by_name() {
    let server = ApiServer::start().unwrap();
    let config = config_of(&server).await;
    let membership = Config::default();
    for node in ["", "n1,spec.nodeName=n2", "N1"] {
        let error = kube::open(config.clone(), node, &membership, &Metrics::default(), |_| ())
            .await
            .err()
            .unwrap();
        assert!(format!("{error:#}").contains("--node-name"), "{error:#}");
    }
    let error = kube::config(Some("/nonexistent/kubeconfig".as_ref())).await.unwrap_err();
    assert!(format!("{error:#}").contains("/nonexistent/kubeconfig"), "{error:#}");
}
