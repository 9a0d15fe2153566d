//! `redirect-agent`: wiring only.

use redirect_agent::{
    dataplane::{Dataplane, Options, PodNetns},
    netns::Netns,
};
use std::time::Duration;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let dp = Dataplane::open(&Options {
        bpffs_dir: args[3].clone().into(),
        proxy_grace: Duration::from_secs(3),
        log: false,
    })?;
    let pod = PodNetns::new(Netns::open(args[2].as_ref())?, &[], 0)?;
    println!("{pod:?}");
    match args[1].as_str() {
        "attach" => {
            dp.prepare(&pod)?;
            dp.proxy_listens(&pod)?;
            dp.capture(&pod)?;
            println!("missing {:?}", dp.missing(&pod)?);
        }
        "detach" => {
            dp.release(&pod)?;
            dp.remove(&pod)?;
        }
        _ => {}
    }
    println!("{:?}", dp.counters()?);
    Ok(())
}
