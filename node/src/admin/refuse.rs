//! What went wrong, as gRPC statuses whose message says what was refused, where, and what to do.

use komainu_cluster::api::NodeIdentity;
use komainu_cluster::shell::{ProposeError, QueryError};
use komainu_cluster::state::{self, Refusal};
use komainu_proto::admin::Problem;
use komainu_proto::convert::ConvertError;
use komainu_proto::refusal;
use tonic::{Code, Status};

/// A change that was not made.
pub fn propose(error: ProposeError) -> Status {
    match error {
        ProposeError::Refused(refusal) => refused(refusal),
        ProposeError::NoLeader | ProposeError::Stopping => Status::unavailable(error.to_string()),
        ProposeError::Timeout => Status::deadline_exceeded(error.to_string()),
        ProposeError::Impossible(_) => Status::failed_precondition(error.to_string()),
    }
}

/// A node that was not admitted. Most often it is the node that is waited for, not the leader.
pub fn join(node: &NodeIdentity, error: ProposeError) -> Status {
    match error {
        ProposeError::Timeout => Status::deadline_exceeded(format!(
            "node {} \"{}\" is not heard at {}; start it, with this cluster's nodes in its node file and their secret_file: it is admitted as soon as it is heard, see `komainu node list`",
            node.id.0, node.name, node.address
        )),
        error => propose(error),
    }
}

/// A change that the cluster said no to.
pub fn refused(refusal: Refusal) -> Status {
    let code = match &refusal {
        Refusal::Invalid(_) => return problems(Vec::new(), refusal),
        Refusal::Value { .. } => Code::InvalidArgument,
        Refusal::Unknown { .. } => Code::NotFound,
        Refusal::Exists { .. } => Code::AlreadyExists,
        Refusal::Revision { .. }
        | Refusal::AwaitingConfirm { .. }
        | Refusal::NotAwaiting { .. }
        | Refusal::Superseded { .. } => Code::FailedPrecondition,
    };
    Status::new(code, refusal.to_string())
}

fn problems(mut found: Vec<Problem>, refusal: Refusal) -> Status {
    if let Refusal::Invalid(all) = refusal {
        found.extend(all.into_iter().map(problem));
    }
    refusal::status(Code::InvalidArgument, found)
}

/// A document that is wrong.
pub fn invalid(found: Vec<state::Problem>) -> Status {
    problems(Vec::new(), Refusal::Invalid(found))
}

/// A message that says nothing sensible.
pub fn convert(error: ConvertError) -> Status {
    refusal::status(Code::InvalidArgument, vec![error.into()])
}

/// A field of a request that is wrong.
pub fn argument(field: &str, value: impl ToString, reason: &str, action: &str) -> Status {
    let (field, value) = (field.to_owned(), value.to_string());
    let problem = Problem { field, value, reason: reason.to_owned(), action: action.to_owned() };
    refusal::status(Code::InvalidArgument, vec![problem])
}

/// A name that stands for nothing.
pub fn unknown<'a>(what: &str, value: &str, known: impl Iterator<Item = &'a str>) -> Status {
    let known: Vec<&str> = known.collect();
    let action = if known.is_empty() {
        "there are none yet".to_owned()
    } else {
        format!("name one of: {}", known.join(", "))
    };
    Status::not_found(format!("{what} \"{value}\": does not exist; {action}"))
}

/// Another node that did not answer.
pub fn query(error: &QueryError) -> Status {
    Status::unavailable(format!("{error}; see in `komainu status` whether it is alive, and try again"))
}

/// A problem on the wire.
pub fn problem(problem: state::Problem) -> Problem {
    Problem { field: problem.path, value: problem.value, reason: problem.reason, action: problem.action }
}
