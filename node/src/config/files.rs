//! Files that the node file names: the cluster secret, certificates, keys.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Length of the cluster secret in bytes: the key of XChaCha20-Poly1305.
pub const SECRET_LEN: usize = 32;
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

/// Draws a cluster secret.
///
/// # Errors
/// The kernel gives no random bytes (getrandom(2)).
pub fn new_secret() -> Result<[u8; SECRET_LEN], getrandom::Error> {
    let mut secret = [0; SECRET_LEN];
    getrandom::fill(&mut secret)?;
    Ok(secret)
}

/// The text form of a secret: hexadecimal digits on one line.
pub fn secret_text(secret: &[u8; SECRET_LEN]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(2 * SECRET_LEN + 1);
    for byte in secret {
        write!(text, "{byte:02x}").expect("writing to memory");
    }
    text.push('\n');
    text
}

/// Writes a new secret to `path`, readable by its owner only. An existing file is left alone: replacing the secret on
/// one node would cut it off from the others.
///
/// # Errors
/// The file exists or can't be written.
pub fn write_secret(path: &Path, secret: &[u8; SECRET_LEN]) -> Result<(), FileError> {
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
            let action = match error.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    "remove it first if the whole cluster is to get a new secret"
                }
                _ => "name a file in a directory that you may write to",
            };
            FileError::new(format!("{}: can't be made: {error}", path.display()), action)
        })?;
    file.write_all(secret_text(secret).as_bytes()).and_then(|()| file.sync_all()).map_err(|error| {
        FileError::new(format!("{}: can't be written: {error}", path.display()), "make room")
    })
}

/// Reads a cluster secret.
///
/// # Errors
/// The file can't be read, can be read by everybody, or holds no secret.
pub fn read_secret(path: &Path) -> Result<[u8; SECRET_LEN], FileError> {
    let text = read(path, "make it with `komainu keygen -o FILE` on one node and copy it to the others")?;
    let mode = std::fs::metadata(path).map_or(0, |m| m.permissions().mode());
    if mode & 0o007 != 0 {
        return Err(FileError::new(
            format!("everybody may read or change it (mode {:03o})", mode & 0o777),
            format!("chmod 600 {}", path.display()),
        ));
    }
    parse_secret(&text).ok_or_else(|| {
        FileError::new(
            format!("holds no cluster secret ({} hexadecimal digits)", 2 * SECRET_LEN),
            "make it with `komainu keygen -o FILE`",
        )
    })
}

fn parse_secret(text: &str) -> Option<[u8; SECRET_LEN]> {
    let digits = text.trim().as_bytes();
    if digits.len() != 2 * SECRET_LEN {
        return None;
    }
    let mut secret = [0; SECRET_LEN];
    for (byte, pair) in secret.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |b: u8| char::from(b).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
    }
    Some(secret)
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
    fn a_secret_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.key");
        let secret = new_secret().unwrap();
        write_secret(&path, &secret).unwrap();
        assert_eq!(read_secret(&path), Ok(secret));
        assert!(write_secret(&path, &secret).unwrap_err().reason.contains("exists"));
    }

    #[test]
    fn a_bad_secret_file_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.key");
        let refused = || read_secret(&path).unwrap_err();
        assert!(refused().reason.contains("can't be read"));
        let put = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put("0123", 0o600);
        assert!(refused().reason.contains("64 hexadecimal"));
        put(&"zz".repeat(32), 0o600);
        assert!(refused().reason.contains("64 hexadecimal"));
        put(&"00".repeat(32), 0o644);
        assert!(refused().action.starts_with("chmod 600"));
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
