//! What nodes are made of: their files, their data, the program that they run.

use std::path::{Path, PathBuf};

use super::{Cluster, write};
use crate::error::{LabError, Result};

impl Cluster {
    /// Sets a variable in the environment of nodes started from now on.
    pub fn set_env(&mut self, key: &str, value: &str) {
        self.environment.push((key.to_owned(), value.to_owned()));
    }

    /// Adds lines to a node's file, read at its next start.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn configure(&self, name: &str, lines: &str) -> Result<()> {
        let path = &self.node(name).config;
        let text = std::fs::read_to_string(path)
            .map_err(|e| LabError::system(format!("read {}", path.display()), e))?;
        write(path, &format!("{text}{lines}"))
    }

    /// Adds lines to a table that a node's file has, e.g. `service`. Read at its next start.
    ///
    /// # Errors
    /// The file can't be written, or has no such table.
    pub fn configure_table(&self, name: &str, table: &str, lines: &str) -> Result<()> {
        let path = &self.node(name).config;
        let text = std::fs::read_to_string(path)
            .map_err(|e| LabError::system(format!("read {}", path.display()), e))?;
        let head = format!("[{table}]\n");
        if !text.contains(&head) {
            let none = std::io::Error::other("there is no such table");
            return Err(LabError::system(format!("find [{table}] in {}", path.display()), none));
        }
        write(path, &text.replacen(&head, &format!("{head}{lines}\n"), 1))
    }

    /// Path of a node's file.
    pub fn node_file_of(&self, name: &str) -> &Path {
        &self.node(name).config
    }

    /// Directory of what a node stores.
    pub fn data_dir_of(&self, name: &str) -> &Path {
        &self.node(name).data_dir
    }

    /// The program that nodes run.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Another program for nodes that are started from now on, and for the CLI.
    pub fn set_binary(&mut self, binary: PathBuf) {
        self.binary = binary;
    }
}
