//! The map `dns_flows`: where programs remember which resolver a query was for.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use redirect_ebpf::{
    abi::{DNS_PLACES, DnsFlow, DnsKey, PROTOCOL_TCP, PROTOCOL_UDP, PodId},
    dns::is_free,
};

use super::absent;

/// Its name, and that of its pin.
pub(super) const DNS_FLOWS: &str = "dns_flows";

/// A connection over TCP may still be open when its place is free. It keeps the place for so long, unless another
/// flow takes it.
const OPEN: Duration = Duration::from_secs(60 * 60);
/// The same if one side has closed it, and the other may still send.
const HALF_CLOSED: Duration = Duration::from_secs(60);

/// Deletes the pod's flows.
pub(super) fn clear(
    flows: &mut HashMap<&mut MapData, DnsKey, DnsFlow>,
    pod_id: PodId,
) -> Result<()> {
    for place in 0..DNS_PLACES {
        for protocol in [PROTOCOL_TCP, PROTOCOL_UDP] {
            absent(flows.remove(&DnsKey { pod_id, place, protocol }))
                .context("write map dns_flows")?;
        }
    }
    Ok(())
}

/// Deletes the flows that nobody needs any more: programs only reuse their places, so that in time every pod would
/// take up all of its own. `now` is in ns of CLOCK_MONOTONIC. Uses a file descriptor of its own, because it may take
/// long.
pub(super) fn sweep(dir: &Path, now: u64) -> Result<()> {
    let map = MapData::from_pin(dir.join(DNS_FLOWS)).context("open map dns_flows")?;
    let mut flows: HashMap<_, DnsKey, DnsFlow> = Map::HashMap(map).try_into()?;
    let (open, half_closed) =
        (u64::try_from(OPEN.as_nanos())?, u64::try_from(HALF_CLOSED.as_nanos())?);
    let is_over = |key: &DnsKey, flow: &DnsFlow| {
        let keep = match (key.protocol, flow.ended) {
            (PROTOCOL_TCP, 0) => open,
            (PROTOCOL_TCP, _) => half_closed,
            _ => 0,
        };
        is_free(flow, now.saturating_sub(keep))
    };
    let mut over = Vec::new();
    for entry in flows.iter() {
        let (key, flow) = entry.context("read map dns_flows")?;
        if is_over(&key, &flow) {
            over.push(key);
        }
    }
    for key in over {
        // A program may have given the place to another flow since. If it does so between these two calls, its
        // query is not answered, and the client asks again.
        if flows.get(&key, 0).is_ok_and(|flow| is_over(&key, &flow)) {
            absent(flows.remove(&key)).context("write map dns_flows")?;
        }
    }
    Ok(())
}
