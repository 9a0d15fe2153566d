//! What one pod could do to another by what the kernel itself shares among network namespaces.

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::libc::{self, c_int};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::PlainProxy;
use redirect_tests::process::Attached;
use redirect_tests::sockets::{PATIENCE, listen};
use redirect_tests::topology::{Style, Topology};
use socket2::{Domain, Socket, Type};

use crate::{PORT, iptables};

const CLOSED_PORT: u16 = 9999;
/// So many that each CPU has answered one.
const TIMES: usize = 32;

sockopt_impl!(Repair, SetOnly, libc::IPPROTO_TCP, libc::TCP_REPAIR, c_int);

/// Where there is no connection, the kernel answers from one socket for each CPU, whatever the namespace. A record
/// with that socket would be every pod's. A RST that this pod sends by `eth0`, by NET_ADMIN, has its peer in the pod.
/// The guard moves it to `lo`, and the neighbor's would do the same from then on. Before Linux 6.13, the kernel also
/// answers so for a TIME_WAIT, and that takes no capability.
#[test]
fn answer_of_the_kernel_for_a_pod_does_not_redirect_those_for_its_neighbor() -> Result<()> {
    let family = Family::V4;
    let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
    let a = topology.add_pod(0, "default", "a")?;
    let b = topology.add_pod(0, "default", "b")?;
    let outside = topology.add_pod(1, "default", "outside")?;
    let _proxies = (PlainProxy::start(&a.netns)?, PlainProxy::start(&b.netns)?);
    let _a = Attached::new(&topology, &a)?;
    let attached = Attached::new(&topology, &b)?;
    attached.set(&["--exclude-inbound-ports", &CLOSED_PORT.to_string()])?;
    let refuses = || {
        let call = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let refused = call.connect_timeout(&b.addr(family, CLOSED_PORT).into(), PATIENCE);
        let error = refused.err().context("somebody listens")?;
        ensure!(error.raw_os_error() == Some(libc::ECONNREFUSED), "{error}");
        Ok(())
    };
    for _ in 0..TIMES {
        outside.netns.run(refuses).context("before")?;
    }

    let mark = "-t mangle -A OUTPUT -p tcp --tcp-flags RST RST -j MARK --set-mark 1";
    iptables(&a, Family::V4, mark)?;
    let target = listen(&outside, outside.addr(family, PORT))?;
    for _ in 0..TIMES {
        let opened = a.netns.run(|| Ok(TcpStream::connect(outside.addr(family, PORT))?))?;
        let (mut accepted, _) = target.accept()?;
        setsockopt(&opened, Repair, &1).context("vanish")?;
        drop(opened);
        accepted.write_all(b"anybody?")?;
        thread::sleep(Duration::from_millis(10));
    }
    for n in 0..TIMES {
        outside.netns.run(refuses).with_context(|| format!("after, {n}"))?;
    }
    Ok(())
}
