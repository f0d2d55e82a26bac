//! The files in `deploy/` and the pages in `docs/` say what the program does.

use std::collections::BTreeSet;

use clap::CommandFactory;

use super::{NodeConfig, document};

const NODE: &str = include_str!("../../../deploy/examples/node.toml");
const WITNESS: &str = include_str!("../../../deploy/examples/witness.toml");
const SERVICES: &str = include_str!("../../../deploy/examples/services.toml");
const UNIT: &str = include_str!("../../../deploy/komainu.service");
const CONFIGURATION: &str = include_str!("../../../docs/configuration.md");
const CLI: &str = include_str!("../../../docs/cli.md");

fn keys(table: &toml::Table, into: &mut BTreeSet<String>) {
    for (key, value) in table {
        into.insert(key.clone());
        let tables: Vec<&toml::Table> = match value {
            toml::Value::Table(table) => vec![table],
            toml::Value::Array(array) => array.iter().filter_map(toml::Value::as_table).collect(),
            _ => Vec::new(),
        };
        for table in tables {
            keys(table, into);
        }
    }
}

#[test]
fn the_node_files_are_right() {
    let balancer = NodeConfig::parse("node.toml", NODE).unwrap();
    let witness = NodeConfig::parse("witness.toml", WITNESS).unwrap();
    // The timing is written out as the default that it is.
    assert_eq!(balancer.timing, witness.timing);
    // They are of one cluster.
    let listen = |config: &NodeConfig| config.cluster.as_ref().unwrap().listen;
    assert!(balancer.peers().iter().any(|peer| peer.id == witness.id && peer.address == listen(&witness)));
    assert!(witness.peers().iter().any(|peer| peer.id == balancer.id && peer.address == listen(&balancer)));
}

#[test]
fn the_document_is_right_as_a_whole() {
    use komainu_cluster::state::{Context, validate};
    let document = document::parse("services.toml", SERVICES).unwrap().document;
    validate(&document, &Context::default()).unwrap();
}

#[test]
fn every_key_of_the_examples_is_documented() {
    let mut all = BTreeSet::new();
    for text in [NODE, WITNESS, SERVICES] {
        keys(&text.parse().unwrap(), &mut all);
    }
    for key in all {
        let documented = [format!("`{key}`"), format!("[{key}]"), format!(".{key}]")];
        assert!(
            documented.iter().any(|form| CONFIGURATION.contains(form)),
            "docs/configuration.md lacks {key}"
        );
    }
}

#[test]
fn every_command_is_documented() {
    let mut command = crate::cli::args::Cli::command();
    command.build();
    for verb in command.get_subcommands().filter(|c| c.get_name() != "help") {
        let inner: Vec<String> = verb
            .get_subcommands()
            .filter(|c| c.get_name() != "help")
            .map(|c| format!("`komainu {} {}", verb.get_name(), c.get_name()))
            .collect();
        let forms = if inner.is_empty() { vec![format!("`komainu {}", verb.get_name())] } else { inner };
        for form in forms {
            assert!(CLI.contains(&form), "docs/cli.md lacks {form}`");
        }
    }
}

#[test]
fn the_unit_starts_what_there_is() {
    for line in UNIT.lines().filter_map(|line| line.strip_prefix("ExecStart")) {
        let (_, line) = line.split_once('=').unwrap();
        let verb = line.split_whitespace().nth(1).unwrap();
        assert!(CLI.contains(&format!("`komainu {verb} -c")), "{line}");
        assert!(line.ends_with(super::node::DEFAULT_FILE), "{line}");
    }
    assert!(UNIT.contains("Type=notify"));
}
