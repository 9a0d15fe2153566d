//! A call to a Service: which of its endpoints it may reach, and how each would take it.

use std::time::SystemTime;

use super::{
    Area, Cause, Destination, EndpointPart, Finding, Judgment, NodePart, PodPart, ServicePart, To,
    Weight, decision::waypoint, verdict::judge,
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
    asked: To,
    service: ServicePart,
    pods: Vec<Option<PodPart>>,
    now: SystemTime,
) -> (Destination, Judgment) {
    let mut endpoints = service.endpoints.clone();
    let mut to = Destination { asked, service: Some(service), service_unknown: None, pod: None };
    let mut worst: Option<(_, usize, Option<PodPart>, Judgment)> = None;
    for (n, (endpoint, pod)) in endpoints.iter_mut().zip(pods).enumerate() {
        let Some(name) = pod.as_ref().map(|pod| pod.name.clone()) else { continue };
        to.pod = pod;
        let judgment = judge(node, from, Some(&to), Some(endpoint), now);
        let about = judgment.1.iter().find(|found| found.pod.as_ref() == Some(&name));
        let (weight, cause) =
            about.map_or((Weight::Hint, Cause::NothingFound), |found| (found.weight, found.cause));
        endpoint.verdict = Some(cause);
        let rank = (!endpoint.ready, weight, cause);
        if worst.as_ref().is_none_or(|(least, ..)| rank < *least) {
            worst = Some((rank, n, to.pod.take(), judgment));
        }
    }
    let (chosen, pod, judgment) = match worst {
        Some((_, n, pod, judgment)) => (Some(n), pod, judgment),
        None => (None, None, judge(node, from, Some(&to), None, now)),
    };
    for (n, endpoint) in endpoints.iter_mut().enumerate() {
        endpoint.chosen = Some(n) == chosen;
    }
    let service = to.service.map(|service| ServicePart { endpoints, ..service });
    (Destination { pod, service, ..to }, judgment)
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
