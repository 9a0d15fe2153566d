//! A server with a pod on it, and a source that follows it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use redirect_agent::{
    membership::{Config, Pod, PodKey},
    metrics::Metrics,
    source::{
        Inventory, Source as _,
        kube::{self, KubeSource},
    },
};
use redirect_tests::apiserver::{ApiServer, Kind};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

/// By when something that takes a moment has happened, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);
pub const NODE: &str = "n1";
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

pub struct Fixture {
    pub server: ApiServer,
    pub source: KubeSource,
    pub inventory: watch::Receiver<Arc<Inventory>>,
    _stop: DropGuard,
}

impl Fixture {
    /// Follows a server with pod `shop/cart` on this node.
    pub async fn start() -> Fixture {
        let server = ApiServer::start().unwrap();
        server.put(Kind::Namespace, namespace("shop", &[]));
        server.put(Kind::Pod, pod("cart", "10.0.0.1"));
        Fixture::follow(server, &Config::default()).await
    }

    pub async fn follow(server: ApiServer, membership: &Config) -> Fixture {
        let config = config_of(&server).await;
        let (source, watcher) =
            timeout(SOON, kube::open(config, NODE, membership, &Metrics::default(), |_| ()))
                .await
                .unwrap()
                .unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(watcher.run(stop.clone()));
        let inventory = source.inventory();
        Fixture { server, source, inventory, _stop: stop.drop_guard() }
    }

    pub fn now(&mut self) -> Arc<Inventory> {
        Arc::clone(&self.inventory.borrow_and_update())
    }

    pub fn pod(&mut self, name: &str) -> Option<Pod> {
        self.now().pods.get(&key(name)).cloned()
    }

    /// Waits until the inventory is so, and gives it.
    pub async fn until(&mut self, what: &str, is: impl Fn(&Inventory) -> bool) -> Arc<Inventory> {
        let found = timeout(SOON, self.inventory.wait_for(|inventory| is(inventory))).await;
        let found = found.map(|found| Arc::clone(&found.unwrap()));
        found.unwrap_or_else(|_| panic!("waited in vain for {what}: {:#?}", self.now()))
    }

    /// Waits until the label of pod `cart` is this.
    pub async fn until_labeled(&mut self, value: &str) -> Arc<Inventory> {
        self.until(value, |i| {
            i.pods
                .get(&key("cart"))
                .is_some_and(|pod| pod.labels.get("test") == Some(&value.to_owned()))
        })
        .await
    }

    pub fn label(&self, value: &str) {
        self.server.edit(Kind::Pod, "shop", "cart", |pod| {
            pod["metadata"]["labels"]["test"] = value.into();
        });
    }

    /// Waits until something is true of the server.
    pub async fn until_server(&self, what: &str, is: impl Fn(&ApiServer) -> bool) {
        let deadline = Instant::now() + SOON;
        while !is(&self.server) {
            assert!(
                Instant::now() < deadline,
                "waited in vain for {what}: {:#?}",
                self.server.requests()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub async fn config_of(server: &ApiServer) -> kube::Config {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    server.write_kubeconfig(&path).unwrap();
    kube::config(Some(&path)).await.unwrap()
}

pub fn key(name: &str) -> PodKey {
    PodKey::new("shop", name).unwrap()
}

/// A pod of this node, as kubelet reports it; `ips` separated by spaces.
pub fn pod(name: &str, ips: &str) -> Value {
    let ips: Vec<Value> = ips.split_whitespace().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}, "annotations": {}},
        "spec": {"nodeName": NODE, "serviceAccountName": name, "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIP": ips.first().map(|ip| &ip["ip"]), "podIPs": ips},
    })
}

pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let labels: serde_json::Map<String, Value> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
    json!({"metadata": {"name": name, "labels": labels}})
}
