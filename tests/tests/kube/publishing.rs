//! What the agent writes to pods.

use std::time::Duration;

use redirect_agent::source::{Redirection, Source as _, Whom};
use redirect_tests::apiserver::Kind;

use crate::fixture::{Fixture, REDIRECTION, pod};

const ENABLED: Option<Redirection> = Some(Redirection::Enabled);
const PENDING: Option<Redirection> = Some(Redirection::Pending);

fn patches(fixture: &Fixture) -> usize {
    fixture.server.requests_of("patch", "pods/status").len()
}

#[tokio::test]
async fn annotation_is_written_once_and_taken_back_once() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    fixture.source.publish(&cart, None).await.unwrap();
    assert_eq!(patches(&fixture), 0, "there was nothing to say");
    for (state, text, made) in [(PENDING, "pending", 1), (ENABLED, "enabled", 2)] {
        fixture.source.publish(&cart, state).await.unwrap();
        assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION).as_deref(), Some(text));
        fixture
            .until(text, |i| {
                let pod = i.pods.values().next().unwrap();
                pod.annotations.get(REDIRECTION).is_some_and(|a| a == text)
            })
            .await;
        fixture.source.publish(&cart, state).await.unwrap();
        assert_eq!(patches(&fixture), made);
    }
    for _ in 0..2 {
        fixture.source.publish(&cart, None).await.unwrap();
        assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION), None);
        fixture.until("nothing", |i| i.pods.values().next().unwrap().annotations.is_empty()).await;
    }
    assert_eq!(patches(&fixture), 3);
    let last = fixture.server.requests_of("patch", "pods/status").pop().unwrap();
    assert!(last.query.contains("fieldManager=redirect-agent"), "{last:?}");
    assert_eq!(last.body["metadata"]["uid"], cart.uid.as_str());
}

#[tokio::test]
async fn what_was_written_counts_before_the_watch_has_seen_it() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    // No event comes round.
    fixture.server.forbid("watch", "pods");
    fixture.server.forbid("list", "pods");
    fixture.server.cut_watches(redirect_tests::apiserver::Cut::Abruptly);
    fixture.until("the trouble", |i| !i.problems.is_empty()).await;
    fixture.source.publish(&cart, ENABLED).await.unwrap();
    fixture.source.publish(&cart, None).await.unwrap();
    assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION), None);
    assert_eq!(patches(&fixture), 2);
}

#[tokio::test]
async fn pod_of_another_uid_under_the_name_is_not_touched() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    fixture.server.forbid("watch", "pods");
    fixture.server.forbid("list", "pods");
    fixture.server.cut_watches(redirect_tests::apiserver::Cut::Abruptly);
    fixture.until("the trouble", |i| !i.problems.is_empty()).await;
    fixture.server.delete(Kind::Pod, "shop", "cart");
    fixture.source.publish(&cart, ENABLED).await.unwrap();
    fixture.server.put(Kind::Pod, pod("cart", "10.0.0.1"));
    for conflicts in [true, false] {
        fixture.server.uid_conflicts(conflicts);
        fixture.source.publish(&cart, ENABLED).await.unwrap();
    }
    let codes: Vec<u16> =
        fixture.server.requests_of("patch", "pods/status").iter().map(|r| r.code).collect();
    assert_eq!(codes, [404, 409, 422]);
    assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION), None);
    // Once the watch knows, nobody asks any more.
    fixture.server.allow_all();
    fixture.until("the new one", |i| i.pods.values().all(|pod| pod.uid != cart.uid)).await;
    fixture.source.publish(&cart, ENABLED).await.unwrap();
    assert_eq!(patches(&fixture), 3);
}

#[tokio::test]
async fn refused_patch_names_the_rule_that_is_missing() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    fixture.server.forbid("patch", "pods/status");
    let error = format!("{:#}", fixture.source.publish(&cart, ENABLED).await.unwrap_err());
    for part in ["shop/cart", REDIRECTION, "forbids", "patch on pods/status"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // Nothing was written, so nothing has to be taken back.
    fixture.source.publish(&cart, None).await.unwrap();
    assert_eq!(patches(&fixture), 1);
    fixture.server.allow_all();
    fixture.source.publish(&cart, ENABLED).await.unwrap();
    assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION).as_deref(), Some("enabled"));
}

#[tokio::test]
async fn patch_whose_answer_is_lost_is_taken_back_all_the_same() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    fixture.server.lose_answers(true);
    fixture.source.publish(&cart, ENABLED).await.unwrap_err();
    fixture.server.lose_answers(false);
    assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION).as_deref(), Some("enabled"));
    fixture.source.publish(&cart, None).await.unwrap();
    assert_eq!(fixture.server.annotation("shop", "cart", REDIRECTION), None);
}

#[tokio::test]
async fn requests_that_are_not_answered_end_alike() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    fixture.server.slow_down(Duration::from_secs(60));
    let whom = Whom::Named(cart.key.clone());
    let (published, found) =
        tokio::join!(fixture.source.publish(&cart, ENABLED), fixture.source.find(&whom));
    for error in [published.unwrap_err(), found.unwrap_err()] {
        let error = format!("{error:#}");
        assert!(error.ends_with(": the API server took more than 10s"), "{error}");
    }
    // It may have been written.
    fixture.server.slow_down(Duration::ZERO);
    let before = patches(&fixture);
    fixture.source.publish(&cart, None).await.unwrap();
    assert_eq!(patches(&fixture), before + 1);
}
