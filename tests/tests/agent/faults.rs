//! The agent is killed at system calls by which it changes something, in every change that it makes. Traffic goes
//! on, none of it past the proxy, and what comes next completes what was begun.

use std::cell::RefCell;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::dataplane::contents::contents;
use redirect_agent::output::PodState;
use redirect_tests::app::Conversation;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::istio_cni::Backend;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, converse, echo, links};
use crate::drift::detach;
use crate::kill::{FILES, MESSAGES, Scenario, Victim};
use crate::load::Load;
use crate::takeover;

/// Makes three tests of each scenario, each with a part of the system calls.
macro_rules! killed {
    ($($scenario:ident),+ $(,)?) => {
        mod at_bpf {
            $(#[test]
            fn $scenario() -> anyhow::Result<()> {
                super::$scenario(crate::kill::BPF)
            })+
        }
        mod at_messages {
            $(#[test]
            fn $scenario() -> anyhow::Result<()> {
                super::$scenario(crate::kill::MESSAGES)
            })+
        }
        mod at_files {
            $(#[test]
            fn $scenario() -> anyhow::Result<()> {
                super::$scenario(crate::kill::FILES)
            })+
        }
    };
}

killed! {
    agent_is_killed_in_the_middle_of_enrollment,
    agent_is_killed_in_the_middle_of_unenrollment,
    agent_is_killed_in_the_middle_of_a_settings_change,
    agent_is_killed_in_the_middle_of_a_repair_of_routing,
    agent_is_killed_in_the_middle_of_a_repair_of_links,
    agent_is_killed_in_the_middle_of_its_first_start,
    agent_is_killed_in_the_middle_of_an_upgrade,
    cleanup_is_killed_in_the_middle,
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const OFTEN: &[&str] = &["--verify-interval", "300ms"];
const SHORT: &[&str] = &["--drain", "1s"];

fn agent_is_killed_in_the_middle_of_enrollment(calls: &[&'static str]) -> Result<()> {
    let mut cluster = Cluster::with_flags(SHORT)?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let scenario = Scenario {
        before: &|node| leave(node, server),
        victim: Victim::Running {
            change: &|node| node.write(&Manifest::of(server).mode("ambient")),
            is_done: &|node| Ok(node.is_published(server) && !is_switching(node)?),
        },
        resume: &Node::start_agent,
        after: &|node| {
            node.wait_until_enrolled(server)?;
            assert_redirected(node, server, client)
        },
    };
    let load = Load::between(client, server, &FAMILIES).with_own_ports();
    load.during(|| scenario.kill_at_each_call(node, &[server, client], calls)).map(drop)
}

fn agent_is_killed_in_the_middle_of_unenrollment(calls: &[&'static str]) -> Result<()> {
    let mut cluster = Cluster::with_flags(SHORT)?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let untouched = footprint(&server.netns)?;
    let scenario = Scenario {
        before: &|node| node.enroll(server),
        victim: Victim::Running {
            change: &|node| node.write(&Manifest::of(server)),
            is_done: &|node| Ok(!node.links(server)?.exists() && !is_switching(node)?),
        },
        resume: &Node::start_agent,
        after: &|node| {
            node.wait_for_state(server, PodState::Bypassing)?;
            assert_unchanged(&server.netns, &untouched)?;
            assert_direct(node, server, client)
        },
    };
    let load = Load::between(client, server, &FAMILIES).with_own_ports();
    load.during(|| scenario.kill_at_each_call(node, &[server, client], calls)).map(drop)
}

/// The port that the load calls is excluded, so that new connections take another path, and open ones do not.
fn agent_is_killed_in_the_middle_of_a_settings_change(calls: &[&'static str]) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let open = Open::default();
    let excluded = Manifest::of(server).mode("ambient").with(
        "/metadata/annotations",
        "traffic.redirect-agent/excludeOutboundPorts",
        json!(PORT.to_string()),
    );
    let is_settled = |node: &Node, excluded: bool| {
        let rules = [["-4", "rule", "show"], ["-6", "rule", "show"]];
        for rules in rules.map(|args| server.netns.output("ip", &args)) {
            if rules?.contains(&format!("dport {PORT} ")) != excluded {
                return Ok(false);
            }
        }
        Ok(!is_switching(node)?)
    };
    let settles = |node: &Node, excluded| {
        wait_for("the exclusion to be as wished, and settled", SOON, || {
            Ok(is_settled(node, excluded)?.then_some(()))
        })
    };
    let scenario = Scenario {
        before: &|node| {
            node.enroll(server)?;
            settles(node, false)?;
            assert_redirected(node, server, client)?;
            // Those of the former round are direct, and stay so.
            open.exchange()?;
            open.replace(server, client)
        },
        victim: Victim::Running {
            change: &|node| node.write(&excluded),
            is_done: &|node| is_settled(node, true),
        },
        resume: &Node::start_agent,
        after: &|node| {
            node.wait_until_complete(server)?;
            settles(node, true)?;
            // Those of before are redirected, and stay so.
            open.exchange()?;
            open.replace(server, client)?;
            FAMILIES.into_iter().try_for_each(|family| {
                node.assert_direct(server, client, family)?;
                node.assert_inbound(client, server, family)
            })
        },
    };
    let inbound = FAMILIES.map(|family| (&*client, &*server, family));
    let load = Load::of_all(inbound.to_vec()).by_proxy();
    load.during(|| scenario.kill_at_each_call(node, &[server, client], calls)).map(drop)
}

fn agent_is_killed_in_the_middle_of_a_repair_of_routing(calls: &[&'static str]) -> Result<()> {
    killed_in_repair(calls, &|_, pod| {
        for flag in ["-4", "-6"] {
            for what in
                ["rule del table 15001", "rule del fwmark 0x111/0xfff", "route flush table 15001"]
            {
                let args: Vec<&str> = [flag].into_iter().chain(what.split(' ')).collect();
                pod.netns.output("ip", &args)?;
            }
        }
        pod.netns.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")
    })
}

fn agent_is_killed_in_the_middle_of_a_repair_of_links(calls: &[&'static str]) -> Result<()> {
    killed_in_repair(calls, &|node, pod| {
        for (name, ..) in links(&node.links(pod)?)? {
            if name.starts_with("out_") {
                detach(&node.links(pod)?.join(name))?;
            }
        }
        Ok(())
    })
}

/// What is removed is the fast path, or the guard, and not both: traffic goes on by the other.
fn killed_in_repair(
    calls: &[&'static str],
    remove: &dyn Fn(&Node, &Pod) -> Result<()>,
) -> Result<()> {
    let mut cluster = Cluster::enrolled(OFTEN)?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let enrolled = footprint(&server.netns)?;
    let is_whole = |_: &Node| Ok(footprint(&server.netns)? == enrolled);
    let scenario = Scenario {
        before: &|_| Ok(()),
        victim: Victim::Running { change: &|node| remove(node, server), is_done: &is_whole },
        resume: &Node::start_agent,
        after: &|node| {
            node.wait_until_complete(server)?;
            assert_unchanged(&server.netns, &enrolled)?;
            assert_redirected(node, server, client)
        },
    };
    let load = Load::between(client, server, &FAMILIES).by_proxy().keeping_old();
    load.during(|| scenario.kill_at_each_call(node, &[server, client], calls)).map(drop)
}

/// The node is as before any agent, and the pod is labelled already.
fn agent_is_killed_in_the_middle_of_its_first_start(calls: &[&'static str]) -> Result<()> {
    let mut cluster = Cluster::with_flags(SHORT)?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let scenario = Scenario {
        before: &|node| {
            leave(node, server)?;
            node.stop_agent()?;
            clean_up(node)?;
            node.write(&Manifest::of(server).mode("ambient"))
        },
        victim: Victim::Starting {
            is_done: &|node| Ok(node.is_published(server) && !is_switching(node)?),
        },
        resume: &Node::start_agent,
        after: &|node| {
            node.wait_until_enrolled(server)?;
            assert_redirected(node, server, client)
        },
    };
    let load = Load::between(client, server, &FAMILIES).with_own_ports();
    load.during(|| scenario.kill_at_each_call(node, &[server, client], calls)).map(drop)
}

fn agent_is_killed_in_the_middle_of_an_upgrade(calls: &[&'static str]) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let enrolled = footprint(&server.netns)?;
    let scenario = Scenario {
        before: &|node| node.stop_agent().map(drop),
        victim: Victim::Starting {
            is_done: &|node| {
                let pod = node.pod(server)?.context("the pod is not known yet")?;
                Ok(pod.state == PodState::Enrolled && pod.kernel.is_some_and(|k| k.complete))
            },
        },
        resume: &Node::start_agent,
        after: &|node| {
            node.wait_until_enrolled(server)?;
            assert_unchanged(&server.netns, &enrolled)?;
            assert_redirected(node, server, client)
        },
    };
    let load = Load::between(client, server, &FAMILIES).by_proxy().keeping_old();
    load.during(|| scenario.kill_at_each_call(node, &[server, client], calls)).map(drop)
}

/// Without load: what is redirected ends with the redirection.
fn cleanup_is_killed_in_the_middle(calls: &[&'static str]) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let untouched = footprint(&server.netns)?;
    let scenario = Scenario {
        before: &|node| {
            if node.has_agent_died()? {
                node.start_agent()?;
            }
            node.enroll(server)?;
            assert_redirected(node, server, client)?;
            node.stop_agent().map(drop)
        },
        victim: Victim::Command(&Node::cleanup_command),
        resume: &|node| {
            // By the proxy or past it, each call is answered.
            for family in FAMILIES {
                converse(client, server, family)?;
                converse(server, client, family)?;
            }
            clean_up(node)
        },
        after: &|node| {
            assert_unchanged(&server.netns, &untouched)?;
            ensure!(!node.bpffs().exists(), "{} is left", node.bpffs().display());
            ensure!(!node.state_dir().exists(), "{} is left", node.state_dir().display());
            assert_direct(node, server, client)
        },
    };
    scenario.kill_at_each_call(node, &[server, client], calls)
}

/// Connections that istio-cni's rules have translated are open all the while. It makes no call of `bpf`.
#[test]
fn takeover_is_killed_in_the_middle() -> Result<()> {
    let (mut cluster, _) =
        takeover::migrating(Backend::IptablesNft, &[takeover::BESIDE], "ambient")?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let open = Open::default();
    for family in FAMILIES {
        open.0.borrow_mut().extend(takeover::open_by_istio_cni(&cluster, family)?);
    }
    let Cluster { node, server, client, .. } = &mut cluster;
    node.start_agent()?;
    let taken_over = |node: &Node| {
        ensure!(!takeover::has_istio_cnis(&server.netns)?, "{}", takeover::ruleset(&server.netns)?);
        node.wait_until_complete(server)?;
        open.exchange()
    };
    let scenario = Scenario {
        before: &|node| {
            if !takeover::has_istio_cnis(&server.netns)? {
                Backend::IptablesNft.redirect(&server.netns)?;
            }
            node.wait_for_state(server, PodState::Degraded)?;
            open.exchange()
        },
        victim: Victim::Command(&Node::take_over_command),
        resume: &|node| {
            assert_redirected(node, server, client)?;
            open.exchange()?;
            let (done, said) = node.take_over(&[])?;
            ensure!(done, "{said}");
            Ok(())
        },
        after: &|node| {
            taken_over(node)?;
            assert_redirected(node, server, client)
        },
    };
    let load = Load::between(client, server, &FAMILIES).by_proxy().keeping_old();
    load.during(|| {
        scenario.kill_at_each_call(node, &[server, client], &[MESSAGES, FILES].concat())
    })?;
    open.0.borrow_mut().clear();
    takeover::take_over_rest(node, server)
}

/// Connections of one path, in both families.
#[derive(Default)]
struct Open(RefCell<Vec<Conversation>>);

impl Open {
    fn replace(&self, from: &Pod, to: &Pod) -> Result<()> {
        let opened = FAMILIES.into_iter().map(|family| converse(from, to, family));
        self.0.replace(opened.collect::<Result<_>>()?);
        Ok(())
    }

    fn exchange(&self) -> Result<()> {
        let mut open = self.0.borrow_mut();
        open.iter_mut().try_for_each(|conversation| conversation.exchange(b"still there?"))
    }
}

fn leave(node: &Node, pod: &Pod) -> Result<()> {
    node.write(&Manifest::of(pod))?;
    node.wait_for_state(pod, PodState::Bypassing).map(drop)
}

fn clean_up(node: &Node) -> Result<()> {
    let (done, said) = node.cleanup()?;
    ensure!(done, "{said}");
    Ok(())
}

/// Whether connections of any pod are still being sorted by their paths.
fn is_switching(node: &Node) -> Result<bool> {
    Ok(!contents(node.bpffs(), "switches")?.entries.is_empty())
}

fn assert_redirected(node: &Node, pod: &Pod, peer: &Pod) -> Result<()> {
    FAMILIES.into_iter().try_for_each(|family| {
        node.assert_inbound(peer, pod, family)?;
        node.assert_outbound(pod, peer, family)
    })
}

fn assert_direct(node: &Node, pod: &Pod, peer: &Pod) -> Result<()> {
    FAMILIES.into_iter().try_for_each(|family| {
        node.assert_direct(peer, pod, family)?;
        node.assert_direct(pod, peer, family)
    })
}
