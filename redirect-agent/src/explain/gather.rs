//! What the running agent knows and finds about what is asked.

use std::time::SystemTime;

use anyhow::{Result, bail};
use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::{
    API_VERSION, Bypass, Destination, Explanation, Judgment, KernelPart, NodePart, Place, PodPart,
    Request, ServicePart, To, decision::Rules, service, verdict::judge,
};
use crate::{
    membership::{Config, DATAPLANE_MODE_AMBIENT, LABEL_DATAPLANE_MODE, Pod, PodKey},
    overrides::{Moment, Overrides},
    reconcile::{Look, Observer},
    source::{Endpoint, Inventory, Source, Whom},
    traffic::{Settings, Traffic},
};

/// Who answers.
pub struct Answerer<'a, S> {
    /// The node's name.
    pub node: &'a str,
    /// Looks at the pods.
    pub observer: &'a Observer<S>,
    /// Decides which pods are in the mesh.
    pub membership: &'a Config,
    /// How annotations are read.
    pub traffic: &'a Settings,
    /// The operators' overrides.
    pub overrides: &'a Overrides,
    /// Until when the source may be asked.
    pub until: Instant,
}

impl<S: Source> Answerer<'_, S> {
    /// Explains.
    ///
    /// # Errors
    ///
    /// When maps, or the source, cannot be read.
    pub async fn explain(&self, request: Request) -> Result<Explanation> {
        let now = SystemTime::now();
        let inventory = self.observer.inventory();
        let pod = self.pod(&request.pod, &inventory, now).await?;
        let node = self.node(&inventory);
        let (to, judgment) = match request.to {
            Some(to) => {
                let (to, judgment) = self.destination(&node, &pod, to, &inventory, now).await?;
                (Some(to), judgment)
            }
            None => (None, judge(&node, &pod, None, None, now)),
        };
        Ok(conclude(node, pod, to, judgment, now))
    }

    /// What is called, and how the call goes.
    async fn destination(
        &self,
        node: &NodePart,
        from: &PodPart,
        asked: To,
        inventory: &Inventory,
        now: SystemTime,
    ) -> Result<(Destination, Judgment)> {
        let pod = match &asked.whom {
            Whom::Named(key) => Some(self.pod(key, inventory, now).await?),
            Whom::Service(_) => None,
            Whom::At(_) => self.pod_at(&asked.whom, inventory, now).await?,
        };
        let unknown = pod.as_ref().is_none_or(|pod| pod.place == Place::Unknown);
        let found = match &asked.whom {
            // It stays in the pod.
            Whom::At(ip) if from.bypass_to(*ip, None) == Some(Bypass::InPod) => Ok(None),
            whom if unknown => self.in_time(self.observer.find_service(whom)).await,
            _ => Ok(None),
        };
        let (found, service_unknown) = match found {
            Ok(found) => (found, None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        let Some(found) = found else {
            let to = Destination { asked, service: None, service_unknown, pod };
            let judgment = judge(node, from, Some(&to), None, now);
            return Ok((to, judgment));
        };
        let service = service::describe(&found, inventory.namespaces.get(&found.key.namespace));
        let is_elsewhere = |endpoint: &&Endpoint| {
            !endpoint.pod.as_ref().is_some_and(|pod| inventory.pods.contains_key(pod))
        };
        let called = if let Whom::At(ip) = asked.whom { Some(ip) } else { None };
        let mut endpoints = found.endpoints_for(called);
        endpoints.sort_by_key(|endpoint| (is_elsewhere(endpoint), !endpoint.ready));
        let looked_at: Vec<Option<&PodKey>> =
            endpoints.iter().take(service::LOOKED_AT).map(|found| found.pod.as_ref()).collect();
        let pods = self.pods(&looked_at, inventory, now).await.into_iter().zip(&endpoints);
        // Whoever writes a slice may name any pod in it.
        let is_its = |pod: &PodPart, ip| pod.ips.is_empty() || pod.ips.contains(&ip);
        let pods = pods.map(|(pod, found)| pod.filter(|pod| is_its(pod, found.ip))).collect();
        let parts = endpoints.iter().map(|e| service::endpoint(&found, asked.port, e)).collect();
        let service = ServicePart { endpoints: parts, ..service };
        Ok(service::choose(node, from, asked, service, pods, now))
    }

    fn node(&self, inventory: &Inventory) -> NodePart {
        let away = self.observer.proxies_away();
        let labeled = |labels: &std::collections::BTreeMap<String, String>| {
            labels.get(LABEL_DATAPLANE_MODE).is_some_and(|mode| mode == DATAPLANE_MODE_AMBIENT)
        };
        NodePart {
            name: self.node.to_owned(),
            source: self.observer.source(),
            proxies: Some(self.observer.zds().proxies.len()),
            no_proxy_since: away.as_ref().map(|away| Moment::of(away.since)),
            last_proxy: away.and_then(|away| away.reason),
            lacks_namespace: false,
            mesh_namespaces: inventory
                .namespaces
                .values()
                .filter(|namespace| labeled(&namespace.labels))
                .map(|namespace| namespace.name.clone())
                .collect(),
        }
    }

    fn rules(&self) -> Rules<'_> {
        let (membership, traffic) = (self.membership, self.traffic);
        Rules { membership, traffic, overrides: Some(self.overrides) }
    }

    async fn pod(&self, key: &PodKey, inventory: &Inventory, now: SystemTime) -> Result<PodPart> {
        match self.known(key, inventory, now).await? {
            Some(pod) => Ok(pod),
            None => {
                let found = self.in_time(self.observer.find(&Whom::Named(key.clone()))).await?;
                Ok(self.unless_here(key, found, inventory, now))
            }
        }
    }

    /// The pods behind a Service. `None`: the endpoint is no pod, or cannot be asked for, and the Service's own
    /// word has to do.
    async fn pods(
        &self,
        keys: &[Option<&PodKey>],
        inventory: &Inventory,
        now: SystemTime,
    ) -> Vec<Option<PodPart>> {
        let known = keys.iter().map(async |key| match key {
            Some(key) => self.known(key, inventory, now).await,
            None => Ok(None),
        });
        let mut pods: Vec<Option<PodPart>> = Vec::new();
        let mut asked = Vec::new();
        for (n, (known, key)) in join_all(known).await.into_iter().zip(keys).enumerate() {
            if let (Ok(None), Some(key)) = (&known, key) {
                asked.push((n, (*key).clone()));
            }
            pods.push(known.ok().flatten());
        }
        let named: Vec<PodKey> = asked.iter().map(|(_, key)| key.clone()).collect();
        let found = self.in_time(async { Ok(self.observer.find_all(&named).await) }).await;
        for ((n, key), found) in asked.iter().zip(found.into_iter().flatten()) {
            let Ok(found) = found else { continue };
            if let Some(pod) = pods.get_mut(*n) {
                *pod = Some(self.unless_here(key, found, inventory, now));
            }
        }
        pods
    }

    /// A pod of this node; `None`: the source has to be asked.
    async fn known(
        &self,
        key: &PodKey,
        inventory: &Inventory,
        now: SystemTime,
    ) -> Result<Option<PodPart>> {
        if let Some(look) = self.observer.look(key, self.overrides).await? {
            return Ok(Some(self.here(look, inventory, now)));
        }
        let conflicts = conflicts(key, inventory);
        let (name, place) = (key.to_string(), Place::LeftOut);
        let left_out = !conflicts.is_empty();
        Ok(left_out.then(|| PodPart { name, place, conflicts, ..PodPart::default() }))
    }

    /// A pod that is not on this node, as the source has found it, if it has.
    fn unless_here(
        &self,
        key: &PodKey,
        found: Option<Pod>,
        inventory: &Inventory,
        now: SystemTime,
    ) -> PodPart {
        if let Some(pod) = found {
            return self.on_another_node(&pod, inventory, now);
        }
        let named = inventory.pods.keys().filter(|other| other.name == key.name);
        let elsewhere = named.map(PodKey::to_string).collect();
        PodPart { name: key.to_string(), elsewhere, ..PodPart::default() }
    }

    /// What the source says before the time is over.
    async fn in_time<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        timeout_at(self.until, answer)
            .await
            .unwrap_or_else(|_| bail!("{} did not say it in time", self.observer.source()))
    }

    async fn pod_at(
        &self,
        whom: &Whom,
        inventory: &Inventory,
        now: SystemTime,
    ) -> Result<Option<PodPart>> {
        if let Some(pod) = inventory.pods.values().find(|pod| whom.is(pod)) {
            return self.pod(&pod.key, inventory, now).await.map(Some);
        }
        let found = self.in_time(self.observer.find(whom)).await?;
        Ok(found.map(|pod| self.on_another_node(&pod, inventory, now)))
    }

    fn on_another_node(&self, pod: &Pod, inventory: &Inventory, now: SystemTime) -> PodPart {
        let namespace = inventory.namespaces.get(&pod.key.namespace);
        // Overrides apply only on the node on which they were set.
        let rules = Rules { overrides: None, ..self.rules() };
        PodPart { place: Place::OtherNode, ..rules.describe(namespace, pod, now) }
    }

    fn here(&self, look: Look, inventory: &Inventory, now: SystemTime) -> PodPart {
        let namespace = inventory.namespaces.get(&look.pod.key.namespace);
        let said = self.rules().describe(namespace, &look.pod, now);
        let key = &look.pod.key;
        let (found, not_found) = match look.found {
            Ok(found) => (Some(found), None),
            Err(why) => (None, Some(why)),
        };
        let names =
            |parts: &[crate::dataplane::Part]| parts.iter().map(ToString::to_string).collect();
        let kernel = found.as_ref().and_then(|found| {
            let kernel = found.kernel.as_ref()?;
            Some(KernelPart {
                netns: found.netns,
                captured: kernel.partly_captured,
                present: names(&kernel.inspection.present),
                missing: names(&kernel.inspection.missing),
                missing_kinds: kernel.inspection.missing.iter().map(|part| part.kind).collect(),
                proxy_does_not_listen: kernel.deaf.iter().map(ToString::to_string).collect(),
                proxy_dns: found.proxy_dns,
                istio_cni: kernel.istio_cni,
            })
        });
        PodPart {
            place: Place::Here,
            node: Some(self.node.to_owned()),
            traffic: Some(look.traffic).filter(|traffic| *traffic != Traffic::default()),
            state: Some(look.state),
            message: look.problem.or(not_found.filter(|_| look.decision.enrolled)),
            kernel,
            proxy: look.answer,
            missing_addresses: found
                .as_ref()
                .map(|f| f.missing_addresses.clone())
                .unwrap_or_default(),
            listens: found.map(|found| found.listeners),
            redirection: look.published.map(|state| state.as_str().to_owned()),
            counters: look.counters.into_iter().map(|(name, n)| (name.to_owned(), n)).collect(),
            conflicts: conflicts(key, inventory),
            history: self.observer.journal().of(key),
            ..said
        }
    }
}

/// What a pod shares with another pod.
fn conflicts(key: &PodKey, inventory: &Inventory) -> Vec<String> {
    let conflicts = inventory.problems.iter().filter_map(|problem| problem.conflict.as_deref());
    conflicts
        .filter_map(|conflict| {
            let other = if conflict.pod == *key {
                &conflict.holder
            } else if conflict.holder == *key {
                &conflict.pod
            } else {
                return None;
            };
            Some(format!("{} is that of pod {other}, too", conflict.what))
        })
        .collect()
}

/// The document of what was gathered and judged.
pub(super) fn conclude(
    node: NodePart,
    pod: PodPart,
    to: Option<Destination>,
    (path, findings): Judgment,
    now: SystemTime,
) -> Explanation {
    let verdict = findings.first().cloned().unwrap_or_else(|| super::verdict::nothing(&pod));
    Explanation {
        api_version: API_VERSION.to_owned(),
        kind: "Explanation".to_owned(),
        time: Moment::of(now),
        node,
        pod,
        to,
        path,
        findings,
        verdict,
    }
}
