//! Pods in all the states that a cluster shows them in.

use redirect_agent::membership::Phase;
use redirect_tests::apiserver::{Cut, Kind};
use serde_json::{Value, json};

use crate::fixture::{Fixture, key, pod};

#[tokio::test]
async fn pod_gets_its_address_keeps_it_while_it_ends_and_may_change_it() {
    let mut fixture = Fixture::start().await;
    let mut starting = pod("starting", "");
    starting["status"] = json!({"phase": "Pending"});
    fixture.server.put(Kind::Pod, starting);
    let ips = |i: &redirect_agent::source::Inventory| {
        let pod = i.pods.get(&key("starting"))?;
        Some(pod.ips.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    fixture.until("the pod", |i| ips(i).is_some_and(|ips| ips.is_empty())).await;
    for addresses in ["10.0.0.7 fd00::7", "10.0.0.8 fd00::8"] {
        fixture.server.put(Kind::Pod, pod("starting", addresses));
        let expected: Vec<&str> = addresses.split(' ').collect();
        fixture.until(addresses, |i| ips(i).is_some_and(|ips| ips == expected)).await;
    }
    fixture.server.edit(Kind::Pod, "shop", "starting", |pod| {
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        pod["metadata"]["deletionGracePeriodSeconds"] = 30.into();
    });
    let ending = fixture.until("its end", |i| i.pods[&key("starting")].deleting).await;
    assert_eq!(ending.pods[&key("starting")].ips.len(), 2, "it still runs");
    fixture.server.edit(Kind::Pod, "shop", "starting", |pod| {
        pod["status"]["phase"] = "Succeeded".into();
    });
    fixture.until("its end", |i| i.pods[&key("starting")].phase == Phase::Succeeded).await;
    fixture.server.delete(Kind::Pod, "shop", "starting");
    fixture.until("nothing", |i| !i.pods.contains_key(&key("starting"))).await;
}

#[tokio::test]
async fn address_of_a_pod_that_ends_or_has_ended_is_its_new_owners() {
    let mut fixture = Fixture::start().await;
    for (name, change) in [
        ("deleted", ("/metadata", "deletionTimestamp", "2026-01-01T00:00:00Z")),
        ("finished", ("/status", "phase", "Failed")),
    ] {
        let mut old = pod(name, "10.0.0.9 fd00::9");
        let (path, field, value) = change;
        old.pointer_mut(path).unwrap()[field] = value.into();
        fixture.server.put(Kind::Pod, old);
        fixture.until(name, |i| i.pods.contains_key(&key(name))).await;
        fixture.server.put(Kind::Pod, pod("new", "10.0.0.9 fd00::9"));
        let both = fixture.until("the new one", |i| i.pods.contains_key(&key("new"))).await;
        assert_eq!(both.problems, []);
        assert_eq!(both.pods[&key("new")].ips.len(), 2);
        assert!(both.pods.contains_key(&key(name)));
        fixture.server.delete(Kind::Pod, "shop", "new");
        fixture.server.delete(Kind::Pod, "shop", name);
        fixture.until("neither", |i| i.pods.len() == 1).await;
    }
}

#[tokio::test]
async fn address_of_a_pod_that_runs_stays_its_own() {
    let mut fixture = Fixture::start().await;
    fixture.server.put(Kind::Pod, pod("thief", "10.0.0.1"));
    let inventory = fixture.until("the problem", |i| !i.problems.is_empty()).await;
    assert!(inventory.problems[0].to_string().contains("10.0.0.1"), "{inventory:?}");
    assert!(
        inventory.pods.contains_key(&key("cart")) && !inventory.pods.contains_key(&key("thief"))
    );
}

#[tokio::test]
async fn pod_that_is_recreated_under_its_name_is_another_one_however_much_of_it_is_seen() {
    let mut fixture = Fixture::start().await;
    let mut uid = fixture.pod("cart").unwrap().uid;
    for seen in ["both events", "the end, in the history", "the end, in a new list"] {
        match seen {
            "both events" => {}
            "the end, in the history" => fixture.server.go_away().unwrap(),
            _ => {
                fixture.server.go_away().unwrap();
                fixture.server.elsewhere();
            }
        }
        fixture.server.delete(Kind::Pod, "shop", "cart");
        fixture.server.put(Kind::Pod, pod("cart", "10.0.0.5"));
        match seen {
            "both events" => {}
            "the end, in the history" => fixture.server.come_back().unwrap(),
            _ => {
                fixture.server.elsewhere();
                fixture.server.forget(true);
                fixture.server.come_back().unwrap();
            }
        }
        let new =
            fixture.until(seen, |i| i.pods.get(&key("cart")).is_some_and(|p| p.uid != uid)).await;
        uid.clone_from(&new.pods[&key("cart")].uid);
        assert_eq!(new.pods.len(), 1);
    }
}

#[tokio::test]
async fn pod_that_cannot_be_read_keeps_its_last_good_version_and_harms_nobody() {
    let mut fixture = Fixture::start().await;
    for (name, wrong) in [
        ("ill-typed", json!({"phase": "Running", "podIPs": "10.0.0.1"})),
        ("no-address", json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.300"}]})),
        ("loopback", json!({"phase": "Running", "podIPs": [{"ip": "127.0.0.1"}]})),
    ] {
        fixture.server.edit(Kind::Pod, "shop", "cart", |pod| pod["status"] = wrong.clone());
        let mut fresh = pod("fresh", "");
        fresh["status"] = wrong;
        fixture.server.put(Kind::Pod, fresh);
        let kept = fixture.until(name, |i| i.problems.len() == 2).await;
        assert_eq!(kept.pods.keys().collect::<Vec<_>>(), [&key("cart")]);
        assert_eq!(kept.pods[&key("cart")].ips.len(), 1);
        let [cart, fresh] = [0, 1].map(|n| kept.problems[n].to_string());
        assert!(cart.starts_with("pod shop/cart: ") && cart.contains("stays in force"), "{cart}");
        assert!(fresh.starts_with("pod shop/fresh: ") && fresh.contains("left alone"), "{fresh}");
        // The same after a new list.
        fixture.server.elsewhere();
        fixture.server.forget(false);
        let lists = fixture.server.requests_of("list", "pods").len();
        fixture.server.cut_watches(Cut::Cleanly);
        fixture.until_server("a list", |s| s.requests_of("list", "pods").len() > lists).await;
        fixture.until("no change", |i| i.problems.len() == 2 && i.pods.len() == 1).await;
        fixture.server.delete(Kind::Pod, "shop", "fresh");
        fixture.server.put(Kind::Pod, pod("cart", "10.0.0.1"));
        fixture.until("no problem", |i| i.problems.is_empty()).await;
    }
}

#[tokio::test]
async fn mirror_of_a_static_pod_is_known_by_the_api_servers_uid_and_keeps_its_annotations() {
    let mut fixture = Fixture::start().await;
    let mut mirror = pod("static-n1", "10.0.0.4");
    mirror["metadata"]["annotations"] = json!({
        "kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc",
        "kubernetes.io/config.source": "file",
        "kubectl.kubernetes.io/last-applied-configuration": "{}",
    });
    let mirror: Value = fixture.server.put(Kind::Pod, mirror);
    let seen = fixture.until("the mirror", |i| i.pods.contains_key(&key("static-n1"))).await;
    let seen = &seen.pods[&key("static-n1")];
    assert_eq!(seen.uid, mirror["metadata"]["uid"]);
    assert_eq!(seen.annotations["kubernetes.io/config.hash"], "abc");
    assert_eq!(seen.annotations.len(), 3, "kubectl's copy is of no use here");
}
