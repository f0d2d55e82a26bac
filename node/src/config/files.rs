//! Files that a user names: read, but not without end.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// PEM label of a certificate (RFC 7468 §5).
pub const CERTIFICATE: &str = "CERTIFICATE";
/// End of the PEM labels of private keys (RFC 7468 §10, RFC 5915 §4).
pub const PRIVATE_KEY: &str = "PRIVATE KEY";

/// Longest text that is read, in bytes: several times the largest document, and what any machine has to spare. A user
/// may name a device or a log by mistake.
pub const MAX_TEXT_LEN: u64 = 64 << 20;

/// Reads a text file of at most [`MAX_TEXT_LEN`] bytes.
///
/// # Errors
/// It can't be read, is longer, or is no UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    read_bounded(File::open(path)?)
}

/// Reads text of at most [`MAX_TEXT_LEN`] bytes to its end.
///
/// # Errors
/// It can't be read, is longer, or is no UTF-8.
pub fn read_bounded(from: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    from.take(MAX_TEXT_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_TEXT_LEN {
        let text = format!("it has more than {} MiB", MAX_TEXT_LEN >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))
}

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
    read_text(path).map_err(|error| {
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
    fn a_file_without_end_is_not_read_to_its_end() {
        let error = read_text(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert!(read_bounded(&b"\xff\xfe"[..]).is_err());
        assert_eq!(read_bounded(&b"[[group]]"[..]).unwrap(), "[[group]]");
    }

    #[test]
    fn a_pem_file_must_hold_what_it_is_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pem");
        std::fs::write(&path, "-----BEGIN EC PRIVATE KEY-----\n").unwrap();
        assert!(read_pem(&path, PRIVATE_KEY).is_ok());
        assert!(read_pem(&path, CERTIFICATE).is_err());
    }
}
