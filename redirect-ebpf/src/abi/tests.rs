use core::net::Ipv4Addr;
use std::collections::BTreeSet;

use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addr(text: &str) -> Addr {
    ip(text).into()
}

#[test]
fn addresses_survive_the_way_into_a_map_and_back() {
    let v4 = (0..32).map(|bit| IpAddr::from(Ipv4Addr::from_bits(1 << bit)));
    let v6 = (0..128).map(|bit| IpAddr::from(Ipv6Addr::from_bits(1 << bit)));
    let more = ["0.0.0.0", "255.255.255.255", "10.0.0.2", "::", "::1", "fd00::2", "::10.0.0.2"];
    for address in v4.chain(v6).chain(more.map(ip)) {
        assert_eq!(Addr::from(address).to_ip(), address);
        assert_eq!(Addr::from(address).is_v4(), address.is_ipv4(), "{address}");
    }
}

#[test]
fn an_ipv4_address_has_one_form_only() {
    assert_eq!(addr("::ffff:10.0.0.2"), addr("10.0.0.2"));
    assert_eq!(addr("10.0.0.2"), Addr::v4([10, 0, 0, 2]));
    assert_eq!(addr("::ffff:10.0.0.2").to_ip(), ip("10.0.0.2"));
    for other in ["::fffe:10.0.0.2", "::1:ffff:10.0.0.2", "1::ffff:10.0.0.2", "::10.0.0.2"] {
        assert!(!addr(other).is_v4(), "{other}");
    }
}

#[test]
fn loopback_begins_and_ends_where_the_standards_say() {
    for inside in ["127.0.0.0", "127.0.0.1", "127.255.255.255", "::1"] {
        assert!(addr(inside).is_loopback(), "{inside}");
    }
    for v4 in [true, false] {
        assert!(Addr::loopback(v4).is_localhost());
    }
    for other in ["127.0.0.0", "127.0.0.2", "127.1.0.1", "::2", "::127.0.0.1"] {
        assert!(!addr(other).is_localhost(), "{other}");
    }
    for outside in [
        "126.255.255.255",
        "128.0.0.0",
        "0.0.0.1",
        "255.0.0.1",
        "::",
        "::2",
        "::1:0:0:1",
        "8000::1",
        "::127.0.0.1",
        "1::ffff:127.0.0.1",
    ] {
        assert!(!addr(outside).is_loopback(), "{outside}");
    }
}

#[test]
fn link_local_begins_and_ends_where_the_standards_say() {
    for inside in ["fe80::", "fe80::1", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"] {
        assert!(addr(inside).is_link_local(), "{inside}");
    }
    for outside in
        ["fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fec0::", "7e80::", "::fe80", "169.254.0.1"]
    {
        assert!(!addr(outside).is_link_local(), "{outside}");
    }
}

#[test]
fn every_counter_has_a_number_and_a_name_of_its_own() {
    for (number, (counter, _)) in Counter::ALL.iter().enumerate() {
        assert_eq!(*counter as usize, number);
    }
    let names: BTreeSet<_> = Counter::ALL.iter().map(|(_, name)| name).collect();
    assert_eq!(names.len(), Counter::ALL.len());
}
