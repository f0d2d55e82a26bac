//! What is wrong with a file.

use std::fmt;

/// One mistake in a file: where, which value, why, what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file as it was named to us.
    pub file: String,
    /// Line, from 1; absent when the whole file is meant.
    pub line: Option<usize>,
    /// Field, e.g. `cluster.peer[0].address`; empty when the whole file is meant.
    pub field: String,
    /// Value as written; absent when one is missing.
    pub value: Option<String>,
    /// What is wrong.
    pub reason: String,
    /// What to do.
    pub action: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        f.write_str(": ")?;
        if !self.field.is_empty() {
            f.write_str(&self.field)?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.reason)?;
        if !self.action.is_empty() {
            write!(f, "; {}", self.action)?;
        }
        Ok(())
    }
}

/// Everything that is wrong with a file. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError {
    /// In the order of the file.
    pub mistakes: Vec<Mistake>,
}

impl ConfigError {
    /// A file that can't be read at all.
    pub fn unreadable(file: &str, error: &std::io::Error) -> Self {
        let action = match error.kind() {
            std::io::ErrorKind::NotFound => "give the right path with -c or -f",
            std::io::ErrorKind::PermissionDenied => "run as a user who may read it",
            std::io::ErrorKind::IsADirectory => "name the file in it",
            _ => "give a TOML file",
        };
        ConfigError {
            mistakes: vec![Mistake {
                file: file.to_owned(),
                line: None,
                field: String::new(),
                value: None,
                reason: format!("can't be read: {error}"),
                action: action.to_owned(),
            }],
        }
    }
}

/// The word of `known` that somebody who wrote `word` probably meant.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|k| (strsim::normalized_damerau_levenshtein(word, k), *k))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_read_is_told_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let junk = dir.path().join("junk.toml");
        std::fs::write(&junk, [0xff, 0x00, 0x80]).unwrap();
        for path in [junk.as_path(), dir.path(), &dir.path().join("absent")] {
            let error = crate::config::files::read_text(path).unwrap_err();
            let told = ConfigError::unreadable("services.toml", &error).to_string();
            assert!(told.starts_with("services.toml: can't be read: ") && told.contains("; "), "{told}");
        }
    }

    #[test]
    fn the_nearest_word_is_found_or_none() {
        let known = ["interface", "lane", "gateway"];
        assert_eq!(nearest("interfaces", &known), Some("interface"));
        assert_eq!(nearest("lnae", &known), Some("lane"));
        assert_eq!(nearest("zzz", &known), None);
    }
}
