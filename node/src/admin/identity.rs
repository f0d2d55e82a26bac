//! Who is calling: the uid at the other end of the local socket, or the common name in the client's certificate.

use tonic::Request;
use tonic::transport::server::UdsConnectInfo;

/// Identity of the caller for the audit log. `node` is the name of this node: a uid means something only here.
pub fn of<T>(request: &Request<T>, node: &str) -> String {
    if let Some(unix) = request.extensions().get::<UdsConnectInfo>() {
        return match &unix.peer_cred {
            Some(peer) => format!("uid {} on {node}", peer.uid()),
            None => format!("unknown on {node}"),
        };
    }
    let certificates = request.peer_certs();
    let name = certificates.as_ref().and_then(|all| common_name(all.first()?.as_ref()));
    name.map_or_else(|| "certificate without a common name".to_owned(), |name| format!("cn {name}"))
}

/// DER tags used here (X.690 §8).
const INTEGER: u8 = 0x02;
const OID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
/// id-at-commonName, 2.5.4.3 (RFC 5280 appendix A.1).
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The last common name of the subject of an X.509 certificate in DER (RFC 5280 §4.1). TLS has verified the certificate
/// before; here only its name is found.
pub fn common_name(certificate: &[u8]) -> Option<String> {
    let (SEQUENCE, certificate, _) = element(certificate)? else { return None };
    let (SEQUENCE, mut rest, _) = element(certificate)? else { return None };
    if let (VERSION, _, after) = element(rest)? {
        rest = after;
    }
    // Serial number, signature algorithm, issuer, validity; then the subject.
    for expected in [INTEGER, SEQUENCE, SEQUENCE, SEQUENCE] {
        let (tag, _, after) = element(rest)?;
        if tag != expected {
            return None;
        }
        rest = after;
    }
    let (SEQUENCE, mut names, _) = element(rest)? else { return None };
    let mut found = None;
    while !names.is_empty() {
        let (SET, mut attributes, after) = element(names)? else { return None };
        names = after;
        while !attributes.is_empty() {
            let (SEQUENCE, attribute, after) = element(attributes)? else { return None };
            attributes = after;
            let (OID, kind, value) = element(attribute)? else { return None };
            let (_, text, _) = element(value)?;
            if kind == COMMON_NAME {
                found = std::str::from_utf8(text).ok().map(printable);
            }
        }
    }
    found
}

/// A name that can't break a log line.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// One DER element: tag, content, what follows (X.690 §8.1).
fn element(data: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = data.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // Certificates are far below 4 GiB: up to four bytes of length.
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
            (bytes.iter().fold(0, |length, &byte| length << 8 | usize::from(byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn certificate(name: &str) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(vec!["lb1".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "org");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn the_common_name_is_found() {
        assert_eq!(common_name(&certificate("alice")).as_deref(), Some("alice"));
        assert_eq!(common_name(&certificate(&"x".repeat(200))), Some("x".repeat(200)));
        assert_eq!(common_name(&certificate("a\nb")).as_deref(), Some("a?b"));
    }

    #[test]
    fn a_truncated_certificate_has_no_name() {
        let whole = certificate("alice");
        for len in 0..whole.len() {
            assert_eq!(common_name(&whole[..len]), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = common_name(&data);
        }
    }
}
