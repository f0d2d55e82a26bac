//! Requests and their answers on the wire.

use std::net::SocketAddr;

use bytes::Bytes;
use komainu_proto::cluster as wire;
use komainu_proto::domain::{NodeId, Role};
use prost::Message;

use crate::api::NodeIdentity;
use crate::core::{Failure, Request};
use crate::state::{Command, Outcome, Refusal};

/// What one node asks another.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Question {
    Request(Request),
    Query(Bytes),
}

/// Encodes a question of node `from`.
pub(super) fn encode_question(from: NodeId, question: &Question) -> Vec<u8> {
    use wire::question::Question as Q;
    let who = match question {
        Question::Request(Request::Join { who, .. } | Request::Leave { who, .. }) => who.clone(),
        _ => String::new(),
    };
    let question = match question {
        Question::Request(Request::Command(command)) => Q::Command(command.encode()),
        Question::Request(Request::Join { node, .. }) => Q::Join(wire::NodeRecord {
            id: node.id.0,
            name: node.name.clone(),
            role: node.role.as_str().to_owned(),
            address: node.address.to_string(),
        }),
        Question::Request(Request::Leave { node, .. }) => Q::Leave(node.0),
        Question::Query(query) => Q::Query(query.to_vec()),
    };
    wire::Question { from: from.0, who, question: Some(question) }.encode_to_vec()
}

/// Reads a question: who asks, and what.
pub(super) fn decode_question(data: &[u8]) -> Result<(NodeId, Question), String> {
    use wire::question::Question as Q;
    let decoded = wire::Question::decode(data).map_err(|e| format!("not a question: {e}"))?;
    let question = match decoded.question.ok_or("a question of a newer version")? {
        Q::Command(command) => {
            let command = Command::decode(&command).map_err(|e| format!("command: {e}"))?;
            Question::Request(Request::Command(Box::new(command)))
        }
        Q::Join(node) => {
            let node = NodeIdentity {
                id: NodeId(node.id),
                name: node.name,
                role: node.role.parse::<Role>().map_err(|e| format!("join: {e}"))?,
                address: node.address.parse::<SocketAddr>().map_err(|e| format!("join.address: {e}"))?,
            };
            Question::Request(Request::Join { node, who: decoded.who })
        }
        Q::Leave(node) => Question::Request(Request::Leave { node: NodeId(node), who: decoded.who }),
        Q::Query(query) => Question::Query(query.into()),
    };
    Ok((NodeId(decoded.from), question))
}

/// Encodes how a request ended.
pub(super) fn encode_result(result: &Result<Outcome, Failure>) -> Vec<u8> {
    use wire::answer::Answer as A;
    let decided = |result: Result<&Outcome, &Refusal>| {
        A::Result(
            serde_json::to_vec(&result).expect("it has no map keys but strings and is written to memory"),
        )
    };
    let answer = match result {
        Ok(outcome) => decided(Ok(outcome)),
        Err(Failure::Refused(refusal)) => decided(Err(refusal)),
        Err(Failure::NotLeader { leader }) => {
            A::NotLeader(wire::NotLeader { leader: leader.map_or(0, |n| n.0) })
        }
        Err(Failure::NotFormed { present, configured }) => {
            A::NotFormed(wire::NotFormed { present: *present as u64, configured: *configured as u64 })
        }
        Err(Failure::Busy) => A::Busy(wire::Busy {}),
        Err(Failure::Lost) => A::Lost(wire::Lost {}),
        Err(Failure::Impossible(reason)) => A::Impossible(reason.clone()),
    };
    wire::Answer { answer: Some(answer) }.encode_to_vec()
}

/// Reads how a request ended. What can't be read was perhaps carried out all the same.
pub(super) fn decode_result(data: &[u8]) -> Result<Outcome, Failure> {
    use wire::answer::Answer as A;
    let answer = wire::Answer::decode(data).ok().and_then(|a| a.answer).ok_or(Failure::Lost)?;
    Err(match answer {
        A::Result(result) => {
            let result: Result<Outcome, Refusal> =
                serde_json::from_slice(&result).map_err(|_| Failure::Lost)?;
            return result.map_err(Failure::Refused);
        }
        A::NotLeader(wire::NotLeader { leader }) => {
            Failure::NotLeader { leader: (leader != 0).then_some(NodeId(leader)) }
        }
        A::NotFormed(n) => {
            Failure::NotFormed { present: n.present as usize, configured: n.configured as usize }
        }
        A::Busy(_) => Failure::Busy,
        A::Lost(_) | A::Query(_) => Failure::Lost,
        A::Impossible(reason) => Failure::Impossible(reason),
    })
}

/// Encodes a query handler's answer.
pub(super) fn encode_query_answer(answer: Bytes) -> Vec<u8> {
    wire::Answer { answer: Some(wire::answer::Answer::Query(answer.to_vec())) }.encode_to_vec()
}

/// Reads a query handler's answer.
pub(super) fn decode_query_answer(data: &[u8]) -> Result<Bytes, String> {
    match wire::Answer::decode(data).map(|a| a.answer) {
        Ok(Some(wire::answer::Answer::Query(answer))) => Ok(answer.into()),
        _ => Err("its answer can't be read".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Change, Problem};

    #[test]
    fn questions_survive_the_wire() {
        let node = NodeIdentity {
            id: NodeId(3),
            name: "w".to_owned(),
            role: Role::Witness,
            address: "[2001:db8::3]:7800".parse().expect("an address"),
        };
        let command = Command::own(7, Change::Confirm { revision: 3 });
        for question in [
            Question::Request(Request::Command(Box::new(command))),
            Question::Request(Request::Join { node, who: "op".to_owned() }),
            Question::Request(Request::Leave { node: NodeId(9), who: "op".to_owned() }),
            Question::Query(Bytes::from_static(b"x")),
        ] {
            assert_eq!(decode_question(&encode_question(NodeId(1), &question)), Ok((NodeId(1), question)));
        }
    }

    #[test]
    fn answers_survive_the_wire() {
        let text = || "t".to_owned();
        let problem = Problem { path: text(), value: text(), reason: text(), action: text() };
        for result in [
            Ok(Outcome { index: 3, revision: 4, changed: true, ..Outcome::default() }),
            Err(Failure::Refused(Refusal::Invalid(vec![problem]))),
            Err(Failure::NotLeader { leader: None }),
            Err(Failure::NotLeader { leader: Some(NodeId(4)) }),
            Err(Failure::NotFormed { present: 1, configured: 3 }),
            Err(Failure::Busy),
            Err(Failure::Lost),
            Err(Failure::Impossible(text())),
        ] {
            assert_eq!(decode_result(&encode_result(&result)), result);
        }
        assert_eq!(decode_result(b"\xff"), Err(Failure::Lost));
        let answer = encode_query_answer(Bytes::from_static(b"x"));
        assert_eq!(decode_query_answer(&answer), Ok(Bytes::from_static(b"x")));
    }
}
