//! `maps`: what the datapath has in the kernel, and how to read it with bpftool.

use anyhow::Result;

use super::print;
use crate::{
    cli::MapsArgs,
    dataplane::pins::{self, PinnedMap, pinned_maps},
    output::{self, Format},
};

pub(super) fn maps(args: &MapsArgs) -> Result<()> {
    let maps = pinned_maps(&args.bpffs.bpffs_dir)?;
    print(shown(&maps, args.output)?.as_bytes())
}

fn shown(maps: &[PinnedMap], format: Format) -> Result<String> {
    if format == Format::Json {
        return output::json(&pins::document(maps));
    }
    let rows = maps.iter().map(|map| {
        let (entries, most) = match map.entries {
            Some(entries) => (entries.to_string(), map.max_entries.to_string()),
            None => Default::default(),
        };
        // The kernel lets nobody list the values of these.
        let verb = if matches!(map.kind, "sk_storage" | "ringbuf") { "show" } else { "dump" };
        let dump = format!("bpftool map {verb} pinned {}", map.path.display());
        vec![map.name.to_owned(), map.kind.to_owned(), entries, most, dump]
    });
    Ok(output::table(&["NAME", "TYPE", "ENTRIES", "MAX", "COMMAND"], rows))
}
