//! Certificates and keys that the node file or the command line names.

use std::path::Path;

/// PEM label of a certificate (RFC 7468 §5).
pub const CERTIFICATE: &str = "CERTIFICATE";
/// End of the PEM labels of private keys (RFC 7468 §10, RFC 5915 §4).
pub const PRIVATE_KEY: &str = "PRIVATE KEY";

/// What is wrong with a named file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}; {action}")]
pub struct FileError {
    /// What is wrong.
    pub reason: String,
    /// What to do.
    pub action: String,
}

impl FileError {
    fn new(reason: impl Into<String>, action: impl Into<String>) -> Self {
        FileError { reason: reason.into(), action: action.into() }
    }
}

/// Reads a PEM file that must hold something labelled `kind`.
///
/// # Errors
/// The file can't be read or holds nothing of that kind.
pub fn read_pem(path: &Path, kind: &'static str) -> Result<String, FileError> {
    let text = read(path, "give the path of an existing PEM file")?;
    let found =
        text.lines().any(|line| line.starts_with("-----BEGIN ") && line.ends_with(&format!("{kind}-----")));
    if found {
        Ok(text)
    } else {
        Err(FileError::new(format!("holds no PEM {kind}"), "give a PEM file that does"))
    }
}

fn read(path: &Path, missing: &str) -> Result<String, FileError> {
    std::fs::read_to_string(path).map_err(|error| {
        let action = match error.kind() {
            std::io::ErrorKind::NotFound => missing.to_owned(),
            std::io::ErrorKind::PermissionDenied => "let the user that komainu runs as read it".to_owned(),
            _ => "give a text file".to_owned(),
        };
        FileError::new(format!("can't be read: {error}"), action)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pem_file_must_hold_what_it_is_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pem");
        std::fs::write(&path, "-----BEGIN EC PRIVATE KEY-----\n").unwrap();
        assert!(read_pem(&path, PRIVATE_KEY).is_ok());
        assert!(read_pem(&path, CERTIFICATE).is_err());
    }
}
