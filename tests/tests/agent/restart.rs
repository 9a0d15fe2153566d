//! Traffic needs no agent: it may stop, or die at any instruction.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Manifest, converse, echo, links};
use crate::drift::detach;
use crate::load::Load;

both_families! {
    agent_is_killed_and_the_next_one_takes_over_under_load,
    agent_is_stopped_and_traffic_stays_as_it_is,
    agent_is_killed_half_way_out_of_the_mesh_and_the_next_one_goes_on,
}

/// In which the moments of the kills are chosen.
const SEED: u64 = 0x2545_f491_4f6c_dd1d;
/// Enrollment and unenrollment take about this long.
const SWITCH: Duration = Duration::from_millis(900);

fn agent_is_killed_and_the_next_one_takes_over_under_load(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let pins = node.links(server)?;
    let before = (footprint(&server.netns)?, links(&pins)?);
    assert!(before.1.len() >= 3, "{before:?}");

    Load::between(client, server, &[family]).keeping_old().during(|| {
        for _ in 0..3 {
            node.kill_agent()?;
            for _ in 0..20 {
                node.assert_inbound(client, server, family)?;
                node.assert_outbound(server, client, family)?;
            }
            node.start_agent()?;
            node.wait_until_enrolled(server)?;
            node.assert_inbound(client, server, family)?;
            node.assert_outbound(server, client, family)?;
        }
        Ok(())
    })?;

    // The very links, with the programs of the new agent, and one for each of the former.
    let (after, programs) = (footprint(&server.netns)?, links(&pins)?);
    assert_eq!(after, before.0);
    let id = |link: &(String, u64, u64)| (link.0.clone(), link.1);
    assert_eq!(
        programs.iter().map(id).collect::<Vec<_>>(),
        before.1.iter().map(id).collect::<Vec<_>>()
    );
    for (new, old) in programs.iter().zip(&before.1) {
        if new.0 == "lookup" {
            // The pod's own never changes; what it calls does.
            assert_eq!(new.2, old.2);
            continue;
        }
        assert_ne!(new.2, old.2, "{} runs the program of an agent that is dead", new.0);
    }
    Ok(())
}

fn agent_is_stopped_and_traffic_stays_as_it_is(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let bypassing = cluster.topology.add_pod(0, "shop", "bypassing")?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&bypassing)?);
    node.write(&Manifest::of(&bypassing))?;
    node.wait_for_state(&bypassing, PodState::Bypassing)?;
    let before = (footprint(&server.netns)?, footprint(&bypassing.netns)?);
    let pins = links(&node.links(server)?)?;

    Load::between(client, server, &[family]).keeping_old().during(|| {
        node.stop_agent()?;
        for _ in 0..20 {
            node.assert_inbound(client, server, family)?;
            node.assert_outbound(server, client, family)?;
            node.assert_direct(client, &bypassing, family)?;
        }
        Ok(())
    })?;

    assert_unchanged(&server.netns, &before.0)?;
    assert_unchanged(&bypassing.netns, &before.1)?;
    assert_eq!(links(&node.links(server)?)?, pins);
    assert!(node.is_published(server), "its peers were told not to speak HBONE to it");
    Ok(())
}

/// The links are detached, and their pins and all else are still there: for a moment that is how
/// every pod looks that leaves.
fn agent_is_killed_half_way_out_of_the_mesh_and_the_next_one_goes_on(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let untouched = footprint(&cluster.server.netns)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    for stays in [true, false] {
        let Cluster { node, server, .. } = &mut cluster;
        node.enroll(server)?;
        let enrolled = footprint(&server.netns)?;
        node.kill_agent()?;
        for pin in fs::read_dir(node.links(server)?).context("list the pins")? {
            detach(&pin?.path())?;
        }
        if stays {
            node.start_agent()?;
            node.wait_until_enrolled(server)?;
            assert_unchanged(&server.netns, &enrolled)?;
            cluster.assert_redirected(family)?;
        } else {
            node.write(&Manifest::of(server))?;
            node.start_agent()?;
            node.wait_for_state(server, PodState::Bypassing)?;
            assert_unchanged(&server.netns, &untouched)?;
            cluster.assert_direct(family)?;
        }
    }
    Ok(())
}

#[test]
fn agent_is_killed_at_random_moments_of_switching_under_load() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let untouched = footprint(&server.netns)?;
    let mut random = Random(SEED);
    let families = [Family::V4, Family::V6];

    Load::between(client, server, &families).keeping_old().during(|| {
        for round in 0..14 {
            let (ambient, moment) = (random.below(2) == 0, random.below(900));
            let moment = SWITCH * moment / 900;
            let manifest = Manifest::of(server);
            node.write(&if ambient { manifest.mode("ambient") } else { manifest })?;
            pass(moment, client, server)?;
            node.kill_agent()?;
            node.start_agent()?;
            // Else the next one comes in the middle of this one's start.
            if random.below(2) == 0 {
                let settled = match ambient {
                    true => node.wait_until_enrolled(server),
                    false => node.wait_for_state(server, PodState::Bypassing).map(drop),
                };
                settled.with_context(|| format!("round {round}, killed after {moment:?}"))?;
            }
        }
        Ok(())
    })?;

    for family in families {
        node.enroll(server)?;
        node.assert_inbound(client, server, family)?;
        node.assert_outbound(server, client, family)?;
        node.write(&Manifest::of(server))?;
        node.wait_for_state(server, PodState::Bypassing)?;
        node.assert_direct(client, server, family)?;
        node.assert_direct(server, client, family)?;
    }
    assert_unchanged(&server.netns, &untouched)?;
    assert!(!node.links(server)?.exists());
    Ok(())
}

/// Talks until a moment has come.
fn pass(moment: Duration, from: &Pod, to: &Pod) -> Result<()> {
    let until = Instant::now() + moment;
    let mut conversation = converse(from, to, Family::V4)?;
    while Instant::now() < until {
        conversation.exchange(b"not yet")?;
    }
    Ok(())
}

/// A reproducible sequence (xorshift64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 >> 32).unwrap_or_default() % limit
    }
}
