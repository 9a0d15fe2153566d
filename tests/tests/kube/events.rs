//! Events on pods.

use redirect_agent::source::{Event, EventKind, Source as _};
use redirect_tests::apiserver::{ApiServer, Kind};

use crate::fixture::Fixture;

#[tokio::test]
async fn event_says_what_happened_to_which_pod_and_who_says_so() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    let long = "ä".repeat(2000);
    fixture.source.record(&cart, Event::new(EventKind::Enrolled, "in the mesh"));
    fixture.source.record(&cart, Event::new(EventKind::EnrollmentFailed, long));
    fixture.until_server("two events", |s| s.all(Kind::Event).len() == 2).await;
    let events = fixture.server.all(Kind::Event);
    let of = |reason: &str| events.iter().find(|event| event["reason"] == reason).unwrap();
    let enrolled = of("Enrolled");
    assert_eq!(enrolled["type"], "Normal");
    assert_eq!(enrolled["note"], "in the mesh");
    assert_eq!(enrolled["reportingController"], "redirect-agent");
    assert_eq!(enrolled["reportingInstance"], "redirect-agent-n1");
    assert_eq!(enrolled["regarding"]["kind"], "Pod");
    assert_eq!(enrolled["regarding"]["name"], "cart");
    assert_eq!(enrolled["regarding"]["uid"], cart.uid.as_str());
    assert_eq!(of("EnrollmentFailed")["type"], "Warning");
}

#[tokio::test]
async fn repeats_become_one_series_and_another_message_another_event() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    for message in ["no netns", "no netns", "no netns", "no address"] {
        fixture.source.record(&cart, Event::new(EventKind::EnrollmentFailed, message));
    }
    let count = |s: &ApiServer, note: &str| {
        let events = s.all(Kind::Event);
        let event = events.iter().find(|event| event["note"] == note)?;
        Some(event["series"]["count"].as_u64().unwrap_or(1))
    };
    fixture.until_server("the series", |s| count(s, "no netns") == Some(3)).await;
    fixture.until_server("the other", |s| count(s, "no address") == Some(1)).await;
    assert_eq!(fixture.server.all(Kind::Event).len(), 2);
}

#[tokio::test]
async fn flood_of_one_pods_events_is_bounded_and_others_are_heard() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    let mut other = cart.clone();
    other.uid = "another".to_owned();
    for number in 0..200 {
        let message = format!("broken in way {number}");
        fixture.source.record(&cart, Event::new(EventKind::EnrollmentFailed, message));
    }
    fixture.source.record(&other, Event::new(EventKind::Enrolled, "in the mesh"));
    fixture
        .until_server("the other", |s| s.all(Kind::Event).iter().any(|e| e["reason"] == "Enrolled"))
        .await;
    let told = fixture.server.all(Kind::Event).len();
    assert!((2..=21).contains(&told), "{told} events");
}

#[tokio::test]
async fn events_that_are_refused_or_too_many_hold_nobody_up() {
    let mut fixture = Fixture::start().await;
    let cart = fixture.pod("cart").unwrap();
    fixture.server.forbid("create", "events");
    for number in 0..10_000 {
        fixture.source.record(&cart, Event::new(EventKind::Repaired, number.to_string()));
    }
    fixture.until_server("a refusal", |s| !s.requests_of("create", "events").is_empty()).await;
    fixture.label("1");
    fixture.until_labeled("1").await;
    fixture.server.allow_all();
    let mut other = cart.clone();
    other.uid = "another".to_owned();
    fixture
        .until_server("it to be told", |s| {
            fixture.source.record(&other, Event::new(EventKind::Enrolled, "in the mesh"));
            !s.all(Kind::Event).is_empty()
        })
        .await;
}
