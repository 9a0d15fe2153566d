//! istio-cni's redirection of a pod, as it writes it with DNS capture on.
//!
//! Istio: `cni/pkg/iptables/iptables.go` and `cni/pkg/nftables/nftables.go`, `AppendInpodRules`.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::netns::Netns;

/// By what istio-cni redirects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// iptables on nf_tables, the default of current distributions.
    IptablesNft,
    /// iptables on the kernel's ip_tables.
    IptablesLegacy,
    /// nftables, as istio-cni writes it with `global.nativeNftables`.
    NativeNftables,
}

/// What istio-cni gives `iptables-restore`: Istio `cni/pkg/iptables/testdata/default.golden`; in IPv6
/// with its addresses.
const IPTABLES: &str = "\
* mangle
-N ISTIO_PRERT
-N ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
* nat
-N ISTIO_PRERT
-N ISTIO_OUTPUT
-A OUTPUT -j ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A ISTIO_PRERT -s PROBE -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT -d PROBE -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d LOCALHOST -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-port 15053
-A ISTIO_OUTPUT ! -d LOCALHOST -p tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d LOCALHOST -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d LOCALHOST -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
* raw
-N ISTIO_OUTPUT
-N ISTIO_PRERT
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
";
const PROBE_V4: &str = "169.254.7.127";
const PROBE_V6: &str = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff";

/// What it does with native nftables: Istio `cni/pkg/nftables/testdata/default_ipv6.golden`.
const NFTABLES: &str = "\
add table inet istio-ambient-nat
add chain inet istio-ambient-nat prerouting { type nat hook prerouting priority -100 ; }
add chain inet istio-ambient-nat output { type nat hook output priority -100 ; }
add chain inet istio-ambient-nat istio-prerouting
add chain inet istio-ambient-nat istio-output
add rule inet istio-ambient-nat output jump istio-output
add rule inet istio-ambient-nat prerouting jump istio-prerouting
add rule inet istio-ambient-nat istio-prerouting meta l4proto tcp ip saddr 169.254.7.127 counter accept
add rule inet istio-ambient-nat istio-prerouting meta l4proto tcp ip6 saddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter accept
add rule inet istio-ambient-nat istio-output meta l4proto tcp ip daddr 169.254.7.127 counter accept
add rule inet istio-ambient-nat istio-output meta l4proto tcp ip6 daddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter accept
add rule inet istio-ambient-nat istio-prerouting ip daddr != 127.0.0.1/32 tcp dport != 15008 mark and 0xfff != 0x539 counter redirect to :15006
add rule inet istio-ambient-nat istio-prerouting ip6 daddr != ::1/128 tcp dport != 15008 mark and 0xfff != 0x539 counter redirect to :15006
add rule inet istio-ambient-nat istio-output oifname != lo mark and 0xfff != 0x539 udp dport 53 counter redirect to :15053
add rule inet istio-ambient-nat istio-output ip daddr != 127.0.0.1/32 tcp dport 53 mark and 0xfff != 0x539 counter redirect to :15053
add rule inet istio-ambient-nat istio-output ip6 daddr != ::1/128 tcp dport 53 mark and 0xfff != 0x539 counter redirect to :15053
add rule inet istio-ambient-nat istio-output meta l4proto tcp mark and 0xfff == 0x111 counter accept
add rule inet istio-ambient-nat istio-output oifname lo ip daddr != 127.0.0.1/32 counter accept
add rule inet istio-ambient-nat istio-output oifname lo ip6 daddr != ::1/128 counter accept
add rule inet istio-ambient-nat istio-output meta l4proto tcp ip daddr != 127.0.0.1/32 mark and 0xfff != 0x539 counter redirect to :15001
add rule inet istio-ambient-nat istio-output meta l4proto tcp ip6 daddr != ::1/128 mark and 0xfff != 0x539 counter redirect to :15001
add table inet istio-ambient-mangle
add chain inet istio-ambient-mangle prerouting { type filter hook prerouting priority -150 ; }
add chain inet istio-ambient-mangle output { type route hook output priority -150 ; }
add chain inet istio-ambient-mangle istio-prerouting
add chain inet istio-ambient-mangle istio-output
add rule inet istio-ambient-mangle prerouting jump istio-prerouting
add rule inet istio-ambient-mangle output jump istio-output
add rule inet istio-ambient-mangle istio-prerouting meta mark & 0xfff == 0x539 counter ct mark set ct mark & 0xfffff000 | 0x111
add rule inet istio-ambient-mangle istio-output ct mark and 0xfff == 0x111 counter meta mark set ct mark
add table inet istio-ambient-raw
add chain inet istio-ambient-raw prerouting { type filter hook prerouting priority -300 ; }
add chain inet istio-ambient-raw output { type filter hook output priority -300 ; }
add chain inet istio-ambient-raw istio-prerouting
add chain inet istio-ambient-raw istio-output
add rule inet istio-ambient-raw prerouting jump istio-prerouting
add rule inet istio-ambient-raw output jump istio-output
add rule inet istio-ambient-raw istio-output udp dport 53 meta mark and 0xfff == 0x539 counter ct zone set 1
add rule inet istio-ambient-raw istio-prerouting udp sport 53 meta mark and 0xfff != 0x539 counter ct zone set 1
";

impl Backend {
    /// Looks whether the tools are installed.
    ///
    /// # Errors
    ///
    /// When one is missing: it says what to install.
    pub fn find_tools(self) -> Result<()> {
        let (programs, package): (&[_], _) = match self {
            Self::IptablesNft => (&["iptables-nft-restore", "ip6tables-nft-restore"], "iptables"),
            Self::IptablesLegacy => {
                (&["iptables-legacy-restore", "ip6tables-legacy-restore"], "iptables")
            }
            Self::NativeNftables => (&["nft"], "nftables"),
        };
        for program in programs {
            Command::new(program).arg("--version").output().with_context(|| {
                format!(
                    "run {program}: install Debian's package {package} (`cargo xtask setup` does)"
                )
            })?;
        }
        Ok(())
    }

    /// What istio-cni does to a pod.
    ///
    /// # Errors
    ///
    /// When a tool is missing, or the kernel lacks what it needs.
    pub fn redirect(self, netns: &Netns) -> Result<()> {
        match self {
            Self::IptablesNft => restore(netns, "nft")?,
            Self::IptablesLegacy => restore(netns, "legacy")?,
            Self::NativeNftables => feed(netns, &["nft", "-f", "-"], NFTABLES)?,
        }
        route_marked(netns, "add")
    }

    /// What it does to one that it lets go of.
    ///
    /// # Errors
    ///
    /// When a tool is missing, or there is nothing to let go of.
    pub fn let_go(self, netns: &Netns) -> Result<()> {
        feed(netns, &["nft", "-f", "-"], "flush ruleset\n")?;
        route_marked(netns, "del")
    }
}

fn restore(netns: &Netns, variant: &str) -> Result<()> {
    for (program, localhost, probe) in
        [("iptables", "127.0.0.1/32", PROBE_V4), ("ip6tables", "::1/128", PROBE_V6)]
    {
        let rules = IPTABLES.replace("LOCALHOST", localhost).replace("PROBE", probe);
        feed(netns, &[&format!("{program}-{variant}-restore"), "--noflush"], &rules)?;
    }
    Ok(())
}

/// The rule and the route of istio-cni.
fn route_marked(netns: &Netns, verb: &str) -> Result<()> {
    for family in ["-4", "-6"] {
        let ip = |args: &str| {
            let args: Vec<&str> = [family].into_iter().chain(args.split(' ')).collect();
            netns.output("ip", &args)
        };
        ip(&format!("rule {verb} fwmark 0x111/0xfff pref 32764 lookup 100"))?;
        ip(&format!("route {verb} local default dev lo table 100"))?;
    }
    Ok(())
}

/// Runs a command in a namespace with this as its standard input.
///
/// # Errors
///
/// When it cannot be run, or fails: with what it said.
pub fn feed(netns: &Netns, command: &[&str], input: &str) -> Result<()> {
    let (program, args) = command.split_first().context("no command")?;
    netns.run(|| {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {program} (cargo xtask setup installs it)"))?;
        let mut stdin = child.stdin.take().context("write to it")?;
        // One that fails may end before it has read everything: what it says counts.
        let written = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context("wait for it")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} in {}: {said}", netns.path().display());
        written.context("write to it")
    })
}
