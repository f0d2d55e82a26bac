//! Commands that ask nobody.

use std::path::Path;

use clap::CommandFactory;
use serde_json::json;

use super::CliError;
use super::args::Cli;
use super::output::Output;
use crate::config::files;

/// Makes a cluster secret.
///
/// # Errors
/// No random bytes, or the file exists or can't be written.
pub fn keygen(output: &Output, file: Option<&Path>) -> Result<(), CliError> {
    let secret = files::new_secret()
        .map_err(|error| CliError::new(format!("the kernel gives no random bytes: {error}; try again")))?;
    match file {
        Some(path) => {
            files::write_secret(path, &secret).map_err(|error| CliError::new(error.to_string()))?;
            output.either(&json!({ "file": path }), || {
                format!(
                    "wrote {}; copy it to every node and name it as cluster.secret_file\n",
                    path.display()
                )
            })
        }
        None => {
            let text = files::secret_text(&secret);
            output.either(&json!({ "secret": text.trim() }), || text.clone())
        }
    }
}

/// Prints completions.
///
/// # Errors
/// Stdout can't be written.
pub fn completions(output: &Output, shell: clap_complete::Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "komainu", &mut script);
    output.text(&String::from_utf8_lossy(&script))
}
