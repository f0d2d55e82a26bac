//! DNS over UDP (RFC 1035 §4): a query is answered.
//!
//! With `host` the name is asked for (type A) and must be answered without error. Without it the root's name servers
//! are asked for, and any answer but "server failure" passes: an authoritative server rightly refuses that question.

use std::net::SocketAddr;

use tokio::time::Instant;

use super::Took;
use super::udp::{connected, words};

/// Longest datagram that is read: the limit of DNS over UDP without EDNS (RFC 1035 §4.2.1).
const MAX_ANSWER: usize = 512;
const HEADER_LEN: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_NS: u16 = 2;
const CLASS_IN: u16 = 1;
const SERVER_FAILURE: u8 = 2;

pub(super) async fn probe(address: SocketAddr, name: Option<&str>) -> Result<String, String> {
    let started = Instant::now();
    let id: u16 = rand::random();
    let question = question(id, name)?;
    let socket = connected(address).await?;
    socket.send(&question).await.map_err(|e| words(&e))?;
    let mut answer = [0; MAX_ANSWER];
    loop {
        let len = socket.recv(&mut answer).await.map_err(|e| words(&e))?;
        if let Some(code) = response_code(&answer[..len], id) {
            return match (code, name) {
                (0, _) => Ok(format!("answered in {}", Took::since(started))),
                (SERVER_FAILURE, _) | (_, Some(_)) => Err(format!("answered {}", code_words(code))),
                (_, None) => Ok(format!("answered {} in {}", code_words(code), Took::since(started))),
            };
        }
    }
}

/// A standard query with recursion desired.
fn question(id: u16, name: Option<&str>) -> Result<Vec<u8>, String> {
    let mut q = Vec::with_capacity(HEADER_LEN + 260);
    q.extend(id.to_be_bytes());
    q.extend([0x01, 0x00]);
    q.extend([0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.unwrap_or("").split('.').filter(|l| !l.is_empty()) {
        match u8::try_from(label.len()) {
            Ok(len) if len < 64 => q.push(len),
            _ => return Err(format!("host: label \"{label}\" is longer than 63 bytes")),
        }
        q.extend(label.as_bytes());
    }
    q.push(0);
    if q.len() > HEADER_LEN + 255 {
        return Err("host: name is longer than 255 bytes".to_owned());
    }
    q.extend(if name.is_some() { TYPE_A } else { TYPE_NS }.to_be_bytes());
    q.extend(CLASS_IN.to_be_bytes());
    Ok(q)
}

/// The response code, if the datagram is a response to our query.
fn response_code(datagram: &[u8], id: u16) -> Option<u8> {
    let header: &[u8; HEADER_LEN] = datagram.first_chunk()?;
    let is_response = header[2] & 0x80 != 0;
    (is_response && header[..2] == id.to_be_bytes()).then_some(header[3] & 0x0f)
}

/// RFC 1035 §4.1.1.
fn code_words(code: u8) -> String {
    match code {
        0 => "no error".to_owned(),
        1 => "format error".to_owned(),
        SERVER_FAILURE => "server failure".to_owned(),
        3 => "no such name".to_owned(),
        4 => "not implemented".to_owned(),
        5 => "refused".to_owned(),
        other => format!("error code {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_literal_bytes() {
        let q = question(0x1234, Some("a.example.")).unwrap();
        assert_eq!(
            q,
            b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x07example\x00\x00\x01\x00\x01"
        );
        assert_eq!(&question(0, None).unwrap()[HEADER_LEN..], b"\x00\x00\x02\x00\x01");
    }

    #[test]
    fn names_out_of_bounds_are_refused() {
        assert!(question(0, Some(&"x".repeat(64))).is_err());
        assert!(question(0, Some(&"abcdefg.".repeat(40))).is_err());
    }

    #[test]
    fn only_a_response_to_the_query_counts() {
        let mut r = [0u8; 12];
        assert_eq!(response_code(&r, 0), None, "a query");
        r[2] = 0x80;
        r[3] = 0x83;
        assert_eq!(response_code(&r, 0), Some(3));
        assert_eq!(response_code(&r, 1), None, "another's");
        assert_eq!(response_code(&r[..11], 0), None, "cut short");
    }
}
