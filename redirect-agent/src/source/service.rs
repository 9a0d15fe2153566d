//! Services: which pods a call to one may reach.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::{core::v1 as k8s, discovery::v1 as discovery},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::Whom;
use crate::membership::{Phase, Pod, PodKey};

/// A Service, as far as a call to it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: PodKey,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.clusterIPs`; a headless Service has none.
    pub ips: Vec<IpAddr>,
    /// The TCP ports of `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// The pods behind it, and what else its EndpointSlices name.
    pub endpoints: Vec<Endpoint>,
}

/// A TCP port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty if it has none.
    pub name: String,
    /// Where it is called.
    pub port: u16,
}

impl Service {
    /// The endpoints for a call to this address; for a call by name, those of the first cluster IP's family. A
    /// headless Service has the first address of each pod.
    pub fn endpoints_for(&self, called: Option<IpAddr>) -> Vec<&Endpoint> {
        let family = called.or_else(|| self.ips.first().copied()).map(|ip| ip.is_ipv4());
        let mut endpoints: Vec<&Endpoint> = Vec::new();
        for endpoint in &self.endpoints {
            let fits = match family {
                Some(v4) => endpoint.ip.is_ipv4() == v4,
                None => {
                    let known =
                        |other: &&Endpoint| endpoint.pod.is_some() && other.pod == endpoint.pod;
                    !endpoints.iter().any(known)
                }
            };
            if fits {
                endpoints.push(endpoint);
            }
        }
        endpoints
    }
}

/// Where a call to a Service may arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod, if it is one.
    pub pod: Option<PodKey>,
    /// Its address.
    pub ip: IpAddr,
    /// Whether it gets new connections.
    pub ready: bool,
    /// Its ports, by the name of the Service's port.
    pub ports: BTreeMap<String, u16>,
}

impl Service {
    /// Whether it has this cluster IP.
    pub fn has(object: &k8s::Service, ip: IpAddr) -> bool {
        ips(object).contains(&ip)
    }

    /// Whether it is meant.
    pub fn is(object: &k8s::Service, whom: &Whom) -> bool {
        match whom {
            Whom::Named(called) | Whom::Service(called) => key(object).as_ref() == Some(called),
            Whom::At(ip) => Self::has(object, *ip),
        }
    }

    /// The Service with the endpoints of its EndpointSlices. `None` without a valid name.
    pub fn new(object: &k8s::Service, slices: &[discovery::EndpointSlice]) -> Option<Self> {
        Some(Self { endpoints: slices.iter().flat_map(in_slice).collect(), ..bare(object)? })
    }

    /// The Service with the pods that its selector selects: there are no EndpointSlices in manifests. A port
    /// that a container names is unknown.
    pub fn selecting<'a>(
        object: &k8s::Service,
        pods: impl Iterator<Item = &'a Pod>,
    ) -> Option<Self> {
        let service = bare(object)?;
        let selector = object.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        let selector = selector.filter(|selector| !selector.is_empty());
        let is_selected = |pod: &&Pod| {
            pod.key.namespace == service.key.namespace
                && !pod.phase.is_finished()
                && selector.is_some_and(|selector| {
                    selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
                })
        };
        let ports = targets(object);
        let endpoints = pods.filter(is_selected).flat_map(|pod| {
            pod.ips.iter().map(|ip| Endpoint {
                pod: Some(pod.key.clone()),
                ip: *ip,
                ready: pod.phase == Phase::Running && !pod.deleting,
                ports: ports.clone(),
            })
        });
        Some(Self { endpoints: endpoints.collect(), ..service })
    }
}

fn key(object: &k8s::Service) -> Option<PodKey> {
    let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
    PodKey::new(namespace, object.metadata.name.as_deref()?).ok()
}

/// Without endpoints.
fn bare(object: &k8s::Service) -> Option<Service> {
    let ports = tcp(object).filter_map(|port| {
        let name = port.name.clone().unwrap_or_default();
        Some(ServicePort { name, port: u16::try_from(port.port).ok()? })
    });
    Some(Service {
        key: key(object)?,
        labels: object.metadata.labels.clone().unwrap_or_default(),
        ips: ips(object),
        ports: ports.collect(),
        endpoints: Vec::new(),
    })
}

/// A headless Service says `None`, which is no address. Manifests may lack `clusterIPs`.
fn ips(object: &k8s::Service) -> Vec<IpAddr> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let one = spec.cluster_ip.iter().filter(|_| spec.cluster_ips.is_none());
    spec.cluster_ips.iter().flatten().chain(one).filter_map(|ip| ip.parse().ok()).collect()
}

fn tcp(object: &k8s::Service) -> impl Iterator<Item = &k8s::ServicePort> {
    let ports = object.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ports.filter(|port| is_tcp(port.protocol.as_ref()))
}

fn is_tcp(protocol: Option<&String>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

/// The pods' ports, where the Service gives their numbers.
fn targets(object: &k8s::Service) -> BTreeMap<String, u16> {
    let number = |port: &k8s::ServicePort| match &port.target_port {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(text)) => text.parse().ok(),
    };
    tcp(object)
        .filter_map(|port| {
            let number = u16::try_from(number(port)?).ok()?;
            Some((port.name.clone().unwrap_or_default(), number))
        })
        .collect()
}

fn in_slice(slice: &discovery::EndpointSlice) -> Vec<Endpoint> {
    let ports: BTreeMap<String, u16> = slice
        .ports
        .iter()
        .flatten()
        .filter(|port| is_tcp(port.protocol.as_ref()))
        .filter_map(|port| {
            let number = u16::try_from(port.port?).ok()?;
            Some((port.name.clone().unwrap_or_default(), number))
        })
        .collect();
    let of = |endpoint: &discovery::Endpoint| {
        let target = endpoint.target_ref.as_ref().filter(|t| t.kind.as_deref() == Some("Pod"));
        let pod = target.and_then(|target| {
            PodKey::new(target.namespace.as_deref()?, target.name.as_deref()?).ok()
        });
        // What a slice does not say counts as ready. Source: Kubernetes `discovery/v1`, EndpointConditions.
        let ready = endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
        // All addresses of an endpoint are interchangeable, and clients use the first.
        let ip = endpoint.addresses.first()?.parse().ok()?;
        Some(Endpoint { pod, ip, ready, ports: ports.clone() })
    };
    slice.endpoints.iter().flatten().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: serde_json::Value) -> k8s::Service {
        let metadata = json!({"name": "cart", "namespace": "shop"});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn endpoints_come_from_slices_with_their_ports() {
        let object = service(json!({
            "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00:96::7"],
            "ports": [
                {"name": "http", "port": 80, "targetPort": "web"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
        }));
        let slice = json!({
            "metadata": {"name": "cart-x"}, "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.0.0.2"], "conditions": {"ready": true},
                 "targetRef": {"kind": "Pod", "namespace": "shop", "name": "cart-1"}},
                {"addresses": ["10.0.0.3"], "conditions": {"ready": false}},
                {"addresses": ["example.com"]},
            ],
            "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        });
        let service = Service::new(&object, &[serde_json::from_value(slice).unwrap()]).unwrap();
        assert_eq!(service.ips, [ip("10.96.0.7"), ip("fd00:96::7")]);
        assert_eq!(service.ports, [ServicePort { name: "http".to_owned(), port: 80 }]);
        let ports = BTreeMap::from([("http".to_owned(), 8080)]);
        let pod = Some(PodKey::new("shop", "cart-1").unwrap());
        let first = Endpoint { pod, ip: ip("10.0.0.2"), ready: true, ports: ports.clone() };
        let second = Endpoint { pod: None, ip: ip("10.0.0.3"), ready: false, ports };
        assert_eq!(service.endpoints, [first, second]);
        assert_eq!(service.endpoints_for(None).len(), 2);
        assert_eq!(service.endpoints_for(Some(ip("fd00:96::7"))), [] as [&Endpoint; 0]);
        assert!(Service::has(&object, ip("fd00:96::7")) && !Service::has(&object, ip("10.0.0.2")));
    }

    #[test]
    fn a_headless_service_has_no_address_and_a_port_may_be_its_own_target() {
        let object = service(json!({
            "clusterIP": "None", "clusterIPs": ["None"],
            "ports": [{"port": 80}, {"name": "b", "port": 81, "targetPort": 8081},
                      {"name": "c", "port": 82, "targetPort": "web"}],
        }));
        assert_eq!(ips(&object), Vec::<IpAddr>::new());
        let expected = [(String::new(), 80), ("b".to_owned(), 8081)];
        assert_eq!(targets(&object), BTreeMap::from(expected));
        // Without a selector, it selects nothing.
        assert_eq!(Service::selecting(&object, std::iter::empty()).unwrap().endpoints, []);
    }
}
