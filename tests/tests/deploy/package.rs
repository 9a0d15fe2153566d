//! The Debian package: that its man pages are the command line's, and that systemd takes its unit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::{Command, CommandFactory as _, Parser as _};
use redirect_agent::cli::Cli;
use redirect_tests::manifests::{Objects, dir};

fn debian() -> PathBuf {
    dir().join("debian")
}

/// Every page by its name: one for the program, and one for each command.
fn rendered() -> Result<BTreeMap<String, String>> {
    // The terminal's width decides where clap breaks the lines of its examples.
    let mut cli = Cli::command().term_width(100).disable_help_subcommand(true);
    cli.build();
    let mut pages = BTreeMap::new();
    page(&cli, &mut pages)?;
    for command in cli.get_subcommands().filter(|command| !command.is_hide_set()) {
        page(command, &mut pages)?;
    }
    Ok(pages)
}

fn page(command: &Command, pages: &mut BTreeMap<String, String>) -> Result<()> {
    let man = clap_mangen::Man::new(command.clone()).manual("redirect-agent");
    let mut text = Vec::new();
    man.render(&mut text).context("render a man page")?;
    // The version is that of the package, and no reason to change every page.
    let text = String::from_utf8(text)?.replace(&format!(" {}\"", env!("CARGO_PKG_VERSION")), "\"");
    pages.insert(man.get_filename(), text);
    Ok(())
}

#[test]
fn man_pages_are_those_of_the_command_line() -> Result<()> {
    let man = debian().join("man");
    let rendered = rendered()?;
    ensure!(rendered.len() > 15, "{:?}", rendered.keys());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let _ = fs::remove_dir_all(&man);
        fs::create_dir_all(&man)?;
        for (name, text) in &rendered {
            fs::write(man.join(name), text)?;
        }
    }
    let committed = fs::read_dir(&man).with_context(|| format!("read {}", man.display()))?;
    let names: BTreeSet<String> = committed
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    assert_eq!(names, rendered.keys().cloned().collect(), "UPDATE_GOLDEN=1 writes them");
    for (name, text) in &rendered {
        let committed = fs::read_to_string(man.join(name))?;
        assert_eq!(&committed, text, "{name} is out of date; UPDATE_GOLDEN=1 writes it");
    }
    Ok(())
}

#[test]
fn service_has_the_capabilities_of_the_daemon_set() -> Result<()> {
    let unit = fs::read_to_string(debian().join("redirect-agent.service"))?;
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let of_unit: BTreeSet<String> =
        line.context("no capabilities")?.split(' ').map(str::to_owned).collect();
    let container = Objects::committed()?.container()?;
    let context = container.security_context.context("no security context")?;
    let added = context.capabilities.and_then(|capabilities| capabilities.add);
    let of_daemon_set: BTreeSet<String> =
        added.context("none")?.iter().map(|name| format!("CAP_{name}")).collect();
    assert_eq!(of_unit, of_daemon_set);
    Ok(())
}

#[test]
fn settings_that_the_service_names_are_the_agents() -> Result<()> {
    let settings = fs::read_to_string(debian().join("redirect-agent.default"))?;
    let run = Cli::command();
    let run = run.find_subcommand("run").context("no command run")?;
    let environment: BTreeSet<_> = run
        .get_arguments()
        .filter_map(|argument| argument.get_env())
        .map(|name| name.to_string_lossy().into_owned())
        .chain(["RUST_LOG".to_owned()])
        .collect();
    let mut named = 0;
    for line in settings.lines() {
        let line = line.trim_start_matches(['#', ' ']);
        let Some((name, value)) = line.split_once('=') else { continue };
        if name == "REDIRECT_AGENT_ARGS" {
            let words = value.trim_matches('"').split_whitespace();
            Cli::try_parse_from(["redirect-agent", "run"].into_iter().chain(words))
                .with_context(|| format!("read {line:?}"))?;
        } else if name.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
            ensure!(environment.contains(name), "{name} is no setting of the agent");
        } else {
            continue;
        }
        named += 1;
    }
    ensure!(named >= 5, "only {named} settings were found");
    Ok(())
}
