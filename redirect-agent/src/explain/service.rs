//! A call to a Service: which of its endpoints it may reach, and how each would take it.

use std::time::SystemTime;

use super::{
    Area, Cause, Destination, EndpointPart, Finding, NodePart, PodPart, ServicePart, To, Weight,
    decision::waypoint, verdict::judge,
};
use crate::{
    membership::Namespace,
    source::{Endpoint, Service},
};

/// How many endpoints are looked at, those of this node first.
pub(super) const LOOKED_AT: usize = 10;

/// The Service without its endpoints.
pub(super) fn describe(service: &Service, namespace: Option<&Namespace>) -> ServicePart {
    ServicePart {
        name: service.key.to_string(),
        ips: service.ips.clone(),
        ports: service.ports.iter().map(|port| port.port).collect(),
        waypoint: waypoint("service", &service.key, &service.labels, namespace),
        endpoints: Vec::new(),
    }
}

/// An endpoint, as a call to this port of the Service finds it. Without a port, the Service's only one.
pub(super) fn endpoint(service: &Service, asked: Option<u16>, endpoint: &Endpoint) -> EndpointPart {
    let port = match (asked, &service.ports[..]) {
        (None, [only]) => Some(only),
        (asked, ports) => ports.iter().find(|port| Some(port.port) == asked),
    };
    EndpointPart {
        pod: endpoint.pod.as_ref().map(ToString::to_string),
        ip: endpoint.ip,
        port: port.and_then(|port| endpoint.ports.get(&port.name).copied()),
        ready: endpoint.ready,
        verdict: None,
        chosen: false,
    }
}

/// Judges the call for each endpoint that was looked at, and takes the one that is worst off among those that
/// get new connections.
pub(super) fn choose(
    node: &NodePart,
    from: &PodPart,
    asked: &To,
    mut service: ServicePart,
    pods: &[Option<PodPart>],
    now: SystemTime,
) -> Destination {
    let mut worst = None;
    for (n, pod) in pods.iter().enumerate() {
        let Some(pod) = pod else { continue };
        for (other, endpoint) in service.endpoints.iter_mut().enumerate() {
            endpoint.chosen = n == other;
        }
        let to = Destination {
            asked: asked.clone(),
            service: Some(service.clone()),
            service_unknown: None,
            pod: Some(pod.clone()),
        };
        let (_, findings) = judge(node, from, Some(&to), now);
        let about = findings.iter().find(|found| found.pod.as_ref() == Some(&pod.name));
        let Some(endpoint) = service.endpoints.get_mut(n) else { continue };
        endpoint.verdict = Some(about.map_or(Cause::NothingFound, |found| found.cause));
        let rank =
            (!endpoint.ready, about.map_or(Weight::Hint, |found| found.weight), endpoint.verdict);
        if worst.as_ref().is_none_or(|(least, _)| rank < *least) {
            worst = Some((rank, n));
        }
    }
    let chosen = worst.map(|(_, n)| n);
    for (n, endpoint) in service.endpoints.iter_mut().enumerate() {
        endpoint.chosen = Some(n) == chosen;
    }
    let pod = chosen.and_then(|n| pods.get(n).cloned().flatten());
    Destination { asked: asked.clone(), service: Some(service), service_unknown: None, pod }
}

/// What is wrong with the Service itself.
pub(super) fn findings(asked: &To, service: Option<&ServicePart>) -> Option<Finding> {
    let of = |area, cause, message, next: String| {
        Some(Finding { area, cause, pod: None, message, next: vec![next], weight: Weight::Wrong })
    };
    let Some(service) = service else {
        let crate::source::Whom::Service(key) = &asked.whom else { return None };
        let message = format!("there is no Service {} in namespace {}", key.name, key.namespace);
        let next = format!("kubectl get services -n {}", key.namespace);
        return of(Area::Configuration, Cause::NoSuchService, message, next);
    };
    let (namespace, name) = service.name.split_once('/').unwrap_or_default();
    if let Some(port) = asked.port.filter(|port| !service.ports.contains(port)) {
        let ports: Vec<String> = service.ports.iter().map(u16::to_string).collect();
        let has = if ports.is_empty() { "none".to_owned() } else { ports.join(", ") };
        let message =
            format!("Service {} does not have TCP port {port}; it has {has}", service.name);
        let next = format!("kubectl get service -n {namespace} {name}");
        return of(Area::Configuration, Cause::NoSuchServicePort, message, next);
    }
    if service.endpoints.iter().any(|endpoint| endpoint.ready) {
        return None;
    }
    let next =
        format!("kubectl get endpointslices -n {namespace} -l kubernetes.io/service-name={name}");
    if service.endpoints.is_empty() {
        let message = format!(
            "Service {} has no endpoints: its selector selects no pod, or it has none and nobody has made \
             EndpointSlices",
            service.name
        );
        return of(Area::Configuration, Cause::NoReadyEndpoint, message, next);
    }
    let message = format!(
        "none of the {} endpoints of Service {} is ready: look at the readiness of their pods",
        service.endpoints.len(),
        service.name
    );
    of(Area::Application, Cause::NoReadyEndpoint, message, next)
}

/// What the call passes before it comes to an endpoint.
pub(super) fn passes(service: &ServicePart, by_callers_proxy: bool) -> Vec<String> {
    let ready = service.endpoints.iter().filter(|endpoint| endpoint.ready).count();
    if ready == 0 {
        return Vec::new();
    }
    let who = match (by_callers_proxy, service.ips.is_empty()) {
        (true, _) => "its proxy",
        (false, true) => "the application, by DNS,",
        (false, false) => "the network (kube-proxy, or what does its work)",
    };
    let mut why =
        vec![format!("{who} chooses one of {ready} ready endpoints of Service {}", service.name)];
    let gateway = service.waypoint.as_ref().and_then(|waypoint| waypoint.gateway.as_ref());
    if let Some(gateway) = gateway.filter(|_| by_callers_proxy) {
        why.push(format!(
            "Service {} has waypoint {gateway}: the proxy calls that, and it chooses the endpoint",
            service.name
        ));
    }
    why
}
