//! The cluster document as a whole.

use komainu_proto::admin::{
    ApplyRequest, ChangeResponse, ConfirmRequest, Document, ExportRequest, HistoryRequest, Problem,
    RestoreRequest, RollbackRequest,
};
use komainu_proto::{domain, refusal};

use super::CliError;
use super::args::ApplyArgs;
use super::connect::Client;
use super::output::Output;
use crate::config::{document, files};
use crate::render::json;
use crate::render::table::Table;
use crate::render::time;

/// Puts a file in force.
///
/// # Errors
/// The file can't be read or is wrong, or the cluster refuses it.
pub async fn apply(client: &mut Client, output: &Output, args: ApplyArgs) -> Result<(), CliError> {
    let (name, text) = read(&args.file)?;
    let parsed = document::parse(&name, &text)?;
    let request = ApplyRequest {
        document: Some(Document::from(&parsed.document)),
        dry_run: args.dry_run,
        if_revision: args.if_revision,
        confirm_within_ms: args.confirm_within.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
    };
    let mut admin = client.admin.clone();
    let at = |problem: &Problem| match parsed.lines.find(&problem.field) {
        Some(line) => format!("{name}:{line}: {}", refusal::text(problem)),
        None => format!("{name}: {}", refusal::text(problem)),
    };
    // The server knows fields, only we know lines.
    let answer = async {
        match admin.apply(request).await {
            Err(status) if !refusal::problems(&status).is_empty() => Ok(tonic::Response::new(Err(
                CliError::Failed(refusal::problems(&status).iter().map(at).collect()),
            ))),
            Err(status) => Err(status),
            Ok(answer) => Ok(tonic::Response::new(Ok(answer.into_inner()))),
        }
    };
    let mut change = client.call(answer).await??;
    for warning in std::mem::take(&mut change.warnings) {
        output.progress(&format!("warning: {}", at(&warning)));
        change.warnings.push(warning);
    }
    report(output, change, args.dry_run)
}

/// Makes a change permanent.
///
/// # Errors
/// Nothing waits, or another revision does.
pub async fn confirm(client: &mut Client, output: &Output, revision: Option<u64>) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let change = client.call(admin.confirm(ConfirmRequest { revision })).await?;
    let revision = change.revision;
    output.either(&json::Change::from(change), || format!("revision {revision} is confirmed\n"))
}

/// Takes a change back.
///
/// # Errors
/// Nothing waits, or another revision does.
pub async fn rollback(client: &mut Client, output: &Output, revision: Option<u64>) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let change = client.call(admin.rollback(RollbackRequest { revision })).await?;
    report(output, change, false)
}

/// Prints a document as TOML; with `--json` its JSON form.
///
/// # Errors
/// There is no such revision.
pub async fn export(client: &mut Client, output: &Output, revision: Option<u64>) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let answer = client.call(admin.export(ExportRequest { revision })).await?;
    let document = answer.document.unwrap_or_default();
    let document = domain::Document::try_from(&document).map_err(|error| {
        CliError::new(format!(
            "the node sent a document that this version can't read: {error}; upgrade komainu here"
        ))
    })?;
    output.either(&serde_json::json!({ "revision": answer.revision, "document": document }), || {
        format!("# revision {}\n{}", answer.revision, document::to_toml(&document))
    })
}

/// Lists revisions.
///
/// # Errors
/// The node doesn't answer.
pub async fn history(client: &mut Client, output: &Output) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let entries = client.call(admin.history(HistoryRequest {})).await?.entries;
    if output.json() {
        let entries: Vec<json::HistoryEntry> = entries.into_iter().map(Into::into).collect();
        return output.value(&entries, false);
    }
    let mut table = Table::new(["REVISION", "AT", "WHO", "WHAT"]);
    for entry in entries {
        table.row([entry.revision.to_string(), time::moment(entry.at_unix_ms), entry.who, entry.what]);
    }
    output.text(&table.to_string())
}

/// Puts an older document in force.
///
/// # Errors
/// There is no such revision, or the cluster refuses it now.
pub async fn restore(
    client: &mut Client,
    output: &Output,
    revision: u64,
    if_revision: Option<u64>,
    dry_run: bool,
) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let change = client.call(admin.restore(RestoreRequest { revision, if_revision, dry_run })).await?;
    report(output, change, dry_run)
}

/// Prints what a change did.
///
/// # Errors
/// Stdout can't be written.
pub fn report(output: &Output, change: ChangeResponse, dry_run: bool) -> Result<(), CliError> {
    if output.json() {
        return output.value(&json::Change::from(change), false);
    }
    let mut text = String::new();
    for line in &change.diff {
        text.push_str(line);
        text.push('\n');
    }
    let revision = change.revision;
    text.push_str(&match (change.applied, change.confirm_within_ms) {
        (true, Some(within)) => format!(
            "revision {revision} is in force; it is rolled back unless you say `komainu confirm` within {}\n",
            time::duration(within)
        ),
        (true, None) => format!("revision {revision} is in force\n"),
        (false, _) if dry_run && !change.diff.is_empty() => {
            format!("dry run: revision {revision} stays in force\n")
        }
        (false, _) => format!("nothing to change: revision {revision} stays in force\n"),
    });
    output.text(&text)
}

fn read(file: &std::path::Path) -> Result<(String, String), CliError> {
    if file.as_os_str() == "-" {
        let text = files::read_bounded(std::io::stdin().lock())
            .map_err(|error| crate::config::ConfigError::unreadable("stdin", &error))?;
        return Ok(("stdin".to_owned(), text));
    }
    let name = file.display().to_string();
    let text =
        files::read_text(file).map_err(|error| crate::config::ConfigError::unreadable(&name, &error))?;
    Ok((name, text))
}
