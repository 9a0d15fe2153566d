//! `cluster`: what the API server shows of all nodes.

use std::{process::ExitCode, time::SystemTime};

use anyhow::Result;

use super::{print, reader_leaves};
use crate::{
    cli::ClusterArgs,
    cluster::{
        changes,
        collect::{Query, Server, collect},
        settings::SettingsOverrides,
        text, watch,
    },
};

pub(super) async fn cluster(args: ClusterArgs) -> Result<ExitCode> {
    let server = Server::open(args.kubeconfig, args.context).await?;
    let query = Query {
        namespace: args.namespace,
        agent_namespace: args.agent_namespace,
        overrides: SettingsOverrides {
            excluded_namespaces: args.excluded_namespaces,
            selectors: args.enablement_selectors,
        },
        readyz: args.readyz,
        chunk: args.chunk_size,
    };
    let snapshot = collect(&server, &query).await?;
    let mut report = snapshot.report(SystemTime::now());
    print(text(&report, args.output)?.as_bytes())?;
    if !args.watch {
        return Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let each = |new| {
        let lines = changes(&report, &new, args.output);
        report = new;
        print(lines.as_bytes())
    };
    tokio::select! {
        ended = watch(&server, &query, snapshot, each) => ended?,
        () = reader_leaves() => {}
    }
    Ok(ExitCode::SUCCESS)
}
