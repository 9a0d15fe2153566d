//! The flags of `run` as they count for a running agent, whether they come from its command line, its
//! environment or the defaults: a ConfigMap is not in the command line.

use std::{collections::BTreeMap, fs};

use clap::{ArgMatches, CommandFactory as _, parser::ValueSource};
use serde::{Deserialize, Serialize};

use super::Cli;

/// The flags, by name without the hyphens. One without a value and a default is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flags(pub BTreeMap<String, Flag>);

/// A flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flag {
    /// Its values, as they were written; of `@FILE`, what was in the file, too.
    pub value: Vec<String>,
    /// Where they come from.
    pub from: Origin,
}

/// Where a flag has its value from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Nobody has set it.
    Default,
    /// A variable of the environment.
    Environment,
    /// The command line.
    CommandLine,
}

impl Flags {
    /// The flags of this `run`.
    pub(super) fn of_run(matches: &ArgMatches) -> Self {
        let cli = Cli::command();
        let arguments =
            cli.find_subcommand("run").into_iter().flat_map(clap::Command::get_arguments);
        let flag = |argument: &clap::Arg| {
            let id = argument.get_id().as_str();
            let from = match matches.try_get_raw(id).ok().and_then(|_| matches.value_source(id))? {
                ValueSource::EnvVariable => Origin::Environment,
                ValueSource::CommandLine => Origin::CommandLine,
                _ => Origin::Default,
            };
            let raw = matches.get_raw(id)?.map(|value| value.to_string_lossy().into_owned());
            let mut value: Vec<String> = raw.collect();
            if id == "enablement_selectors" {
                let file = value.first().and_then(|value| value.strip_prefix('@'));
                value.extend(file.and_then(|file| fs::read_to_string(file).ok()));
            }
            Some((argument.get_long()?.to_owned(), Flag { value, from }))
        };
        Self(arguments.filter(|argument| !argument.is_hide_set()).filter_map(flag).collect())
    }
}
