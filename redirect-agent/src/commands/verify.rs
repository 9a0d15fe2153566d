//! `verify`: what the datapath does with real calls of a pod and to it.

use anyhow::{Result, bail, ensure};
use futures_util::{StreamExt as _, stream};

use super::print;
use crate::{
    cli::VerifyArgs,
    control::Client,
    explain::API_VERSION,
    membership::PodKey,
    output::{self, TextFormat},
    overrides::Mode,
    verify::{self, Request, Verifications},
};

/// How many pods are verified at once. Each takes the place of one who observes, and others may, too.
const AT_ONCE: usize = 4;

pub(super) async fn verify(args: VerifyArgs) -> Result<()> {
    let client = Client::new(args.control.control_socket);
    match args.pod {
        Some(pod) => one(&client, Request { pod, to: args.to }, args.output).await,
        None => all(&client, args.output).await,
    }
}

async fn one(client: &Client, request: Request, format: TextFormat) -> Result<()> {
    let found = client.verify(&request).await?;
    let text = match format {
        TextFormat::Text => verify::text(&found),
        TextFormat::Json => output::json(&found)?,
    };
    print(text.as_bytes())?;
    ensure!(found.ok, "verification of {} failed: {}", found.pod.name, found.result.as_str());
    Ok(())
}

/// Every pod of the node that is to be in the mesh.
async fn all(client: &Client, format: TextFormat) -> Result<()> {
    let status = client.status().await?;
    if let Some(waiting) = &status.waiting {
        bail!("the agent does not know the pods yet: {}", output::printable(waiting));
    }
    let is_unenrolled = status.overrides.iter().any(|o| o.found.mode == Mode::Unenroll);
    let kept_out = match (&status.pause, is_unenrolled) {
        (Some(_), _) => Some("the node is paused"),
        (None, true) => Some("overrides keep pods out of the mesh"),
        (None, false) => None,
    };
    let mut pods: Vec<PodKey> = status
        .pods
        .into_iter()
        .filter(|pod| pod.reason.enrolls())
        .map(|pod| PodKey { namespace: pod.namespace, name: pod.name })
        .collect();
    pods.sort();
    let verifying = stream::iter(pods).map(|pod| async move {
        let found = client.verify(&Request { pod: pod.clone(), to: None }).await;
        found.map_err(|error| format!("{pod}: {error:#}"))
    });
    let mut found = Verifications {
        api_version: API_VERSION.to_owned(),
        kind: "VerificationList".to_owned(),
        items: Vec::new(),
        failed: Vec::new(),
    };
    for verified in verifying.buffered(AT_ONCE).collect::<Vec<_>>().await {
        match verified {
            Ok(verified) => found.items.push(verified),
            Err(error) => found.failed.push(error),
        }
    }
    let text = match format {
        TextFormat::Text => verify::table(&found),
        TextFormat::Json => output::json(&found)?,
    };
    print(text.as_bytes())?;
    if found.items.is_empty() && found.failed.is_empty() {
        match kept_out {
            Some(why) => bail!("no pod to verify: {why}, see `redirect-agent status`"),
            None => eprintln!("no pod of this node is to be in the mesh"),
        }
    }
    let all = found.items.len() + found.failed.len();
    let wrong = found.items.iter().filter(|found| !found.ok).count() + found.failed.len();
    ensure!(wrong == 0, "verification failed for {wrong} of {all} pods");
    Ok(())
}
