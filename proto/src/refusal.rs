//! Structured reasons of a refused call, inside a gRPC status.
//!
//! The form is gRPC's own convention: the trailer `grpc-status-details-bin` holds a `google.rpc.Status`
//! (<https://github.com/googleapis/googleapis/blob/master/google/rpc/status.proto>) whose details are `Any`.

use prost::Message;
use tonic::{Code, Status};

use crate::admin::{Problem, Refusal};
use crate::convert::ConvertError;

/// Type URL of a [`Refusal`] inside an `Any`.
const REFUSAL_URL: &str = "type.googleapis.com/komainu.admin.v1.Refusal";

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<RpcAny>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct RpcAny {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// A status that carries `problems`; its message is the first of them and how many more there are.
pub fn status(code: Code, problems: Vec<Problem>) -> Status {
    let message = summary(&problems);
    let details = RpcStatus {
        code: code as i32,
        message: message.clone(),
        details: vec![RpcAny {
            type_url: REFUSAL_URL.to_owned(),
            value: Refusal { problems }.encode_to_vec(),
        }],
    };
    Status::with_details(code, message, details.encode_to_vec().into())
}

/// The problems that a status carries; empty when it carries none.
pub fn problems(status: &Status) -> Vec<Problem> {
    let Ok(details) = RpcStatus::decode(status.details()) else { return Vec::new() };
    details
        .details
        .iter()
        .filter(|any| any.type_url == REFUSAL_URL)
        .filter_map(|any| Refusal::decode(any.value.as_slice()).ok())
        .flat_map(|refusal| refusal.problems)
        .collect()
}

fn summary(problems: &[Problem]) -> String {
    match problems {
        [] => "refused".to_owned(),
        [one] => text(one),
        [first, rest @ ..] => format!("{} (and {} more)", text(first), rest.len()),
    }
}

/// One problem in words: field, value, reason, what to do.
pub fn text(problem: &Problem) -> String {
    let Problem { field, value, reason, action } = problem;
    let mut text = field.clone();
    if !value.is_empty() {
        text.push_str(&format!(" = {value}"));
    }
    text.push_str(&format!(": {reason}"));
    if !action.is_empty() {
        text.push_str(&format!("; {action}"));
    }
    text
}

impl From<ConvertError> for Problem {
    fn from(error: ConvertError) -> Self {
        Problem { field: error.field, value: error.value, reason: error.reason, action: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_travel_in_a_status() {
        let problem = Problem {
            field: "service[web].port".into(),
            value: "0".into(),
            reason: "is no port".into(),
            action: "give one".into(),
        };
        let sent = status(Code::InvalidArgument, vec![problem.clone(), Problem::default()]);
        assert_eq!(sent.message(), "service[web].port = 0: is no port; give one (and 1 more)");
        assert_eq!(problems(&sent), vec![problem, Problem::default()]);
    }

    #[test]
    fn a_status_without_details_has_no_problems() {
        assert!(problems(&Status::unavailable("no leader")).is_empty());
        assert!(problems(&Status::with_details(Code::Internal, "x", bytes_of_nonsense().into())).is_empty());
    }

    fn bytes_of_nonsense() -> Vec<u8> {
        vec![0xff; 7]
    }
}
