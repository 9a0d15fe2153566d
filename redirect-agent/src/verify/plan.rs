//! Picks harmless test connections.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Direction;
use crate::{
    explain::{PodPart, application_listens, listeners::is_called},
    traffic::Traffic,
};

/// What a pod calls: addresses that are reserved for documentation, so nobody has them. Source: RFC 5737, RFC
/// 3849.
const NOBODY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// Port 9 (discard), unless excluded. Source: RFC 863.
const DISCARD: u16 = 9;

/// A call that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub direction: Direction,
    /// The pod's address, or another one of its family.
    pub ip: IpAddr,
    /// What is called, or why nothing is.
    pub to: Result<SocketAddr, String>,
}

/// The calls for a pod: in each family that it has, one from it, to `to` if that is given, and one to it.
pub(super) fn plan(pod: &PodPart, to: Option<SocketAddr>) -> Vec<Planned> {
    let traffic = pod.traffic.clone().unwrap_or_default();
    let of_family = |v4: bool| pod.ips.iter().find(|ip| ip.is_ipv4() == v4).copied();
    let mut calls = Vec::new();
    match to {
        Some(to) => {
            let has_family = of_family(to.is_ipv4()).is_some();
            let to = has_family
                .then_some(to)
                .ok_or_else(|| format!("{} has no address of the family of {}", pod.name, to.ip()));
            let ip = to.as_ref().map_or_else(|_| NOBODY[0], SocketAddr::ip);
            calls.push(Planned { direction: Direction::Outbound, ip, to });
        }
        None => calls.extend(
            NOBODY.into_iter().filter(|ip| of_family(ip.is_ipv4()).is_some()).map(|ip| {
                let to = Ok(SocketAddr::new(ip, outbound_port(&traffic, ip)));
                Planned { direction: Direction::Outbound, ip, to }
            }),
        ),
    }
    calls.extend([true, false].into_iter().filter_map(of_family).map(|ip| Planned {
        direction: Direction::Inbound,
        ip,
        to: inbound_port(pod, &traffic, ip).map(|port| SocketAddr::new(ip, port)),
    }));
    calls
}

/// A port that is redirected, if any is.
fn outbound_port(traffic: &Traffic, ip: IpAddr) -> u16 {
    let only = traffic.selections.outbound_ports.only.iter().flatten().map(|ports| ports.first);
    let is_redirected = |port: &u16| traffic.redirects_call_to(ip, Some(*port));
    let mut ports = [DISCARD].into_iter().chain(only).chain(1..=u16::MAX);
    ports.find(is_redirected).unwrap_or(DISCARD)
}

/// A port on which the application listens, and which is redirected if any of those is.
fn inbound_port(pod: &PodPart, traffic: &Traffic, ip: IpAddr) -> Result<u16, String> {
    let listens = application_listens(pod);
    let listens = listens.ok_or("it is not known where the application listens")?;
    let called = || {
        let called = listens.iter().filter(|at| is_called(**at, ip, at.port()));
        called.map(SocketAddr::port)
    };
    let redirected = called().find(|port| traffic.redirects_call_from(None, Some(*port)));
    redirected.or_else(|| called().next()).ok_or_else(|| format!("nothing listens at {ip}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::{Selection, Selections};

    fn pod(ips: &[&str], listens: &[&str], selections: Selections) -> PodPart {
        PodPart {
            name: "shop/cart".to_owned(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            listens: Some(listens.iter().map(|at| at.parse().unwrap()).collect()),
            traffic: Some(Traffic { selections, ..Traffic::default() }),
            ..PodPart::default()
        }
    }

    #[track_caller]
    fn planned(pod: &PodPart, to: Option<&str>) -> Vec<String> {
        let text = |call: Planned| {
            let to = call.to.map_or_else(|why| why, |to| to.to_string());
            format!("{} {to}", call.direction.as_str())
        };
        plan(pod, to.map(|to| to.parse().unwrap())).into_iter().map(text).collect()
    }

    const BOTH: [&str; 2] = ["10.0.0.2", "fd00::2"];

    #[test]
    fn a_pod_calls_nobody_and_is_called_where_it_listens_in_each_family_that_it_has() {
        let both = pod(&BOTH, &["0.0.0.0:80", "[::]:8080"], Selections::default());
        assert_eq!(
            planned(&both, None),
            [
                "outbound 192.0.2.1:9",
                "outbound [2001:db8::1]:9",
                "inbound 10.0.0.2:80",
                "inbound [fd00::2]:8080"
            ]
        );
        let v6 = pod(&["fd00::2"], &["0.0.0.0:80", "[::1]:81"], Selections::default());
        assert_eq!(
            planned(&v6, None),
            ["outbound [2001:db8::1]:9", "inbound nothing listens at fd00::2"]
        );
        assert_eq!(
            planned(&v6, Some("[fd00::9]:80")),
            ["outbound [fd00::9]:80", "inbound nothing listens at fd00::2"]
        );
        let other = "outbound shop/cart has no address of the family of 10.0.0.9";
        assert_eq!(planned(&v6, Some("10.0.0.9:80"))[0], other);
    }

    #[test]
    fn ports_that_are_redirected_are_preferred_to_such_that_settings_exclude() {
        let ports = |text: &str| text.parse().unwrap();
        let selections = Selections {
            outbound_ports: Selection::new(Some(&[ports("80-90"), ports("443")]), &[ports("80")]),
            inbound_ports: Selection::new(None, &[ports("80")]),
            ..Selections::default()
        };
        let listens = ["[::]:80", "[::]:8080"];
        assert_eq!(
            planned(&pod(&BOTH[..1], &listens, selections.clone()), None),
            ["outbound 192.0.2.1:443", "inbound 10.0.0.2:8080"]
        );
        // All are excluded: that is what there is to say.
        assert_eq!(
            planned(&pod(&BOTH[..1], &listens[..1], selections.clone()), None)[1],
            "inbound 10.0.0.2:80"
        );
        let nothing = Selections { outbound_ports: Selection::new(Some(&[]), &[]), ..selections };
        assert_eq!(planned(&pod(&BOTH[..1], &[], nothing), None)[0], "outbound 192.0.2.1:9");
    }
}
