//! Reflection and the health service, as a stock client sees them: it knows gRPC and nothing of Komainu.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use komainu_lab::cluster::SOON;
use komainu_tests::grpc::{inside, unix};
use komainu_tests::{Bed, Machine};
use prost::Message;
use prost_types::FileDescriptorProto;
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;

const ADMIN: &str = "komainu.admin.v1.Admin";
const HEALTH: &str = "grpc.health.v1.Health";

fn socket(bed: &Bed, node: &str) -> PathBuf {
    bed.cluster.lab.dir().join(node).join("run/admin.sock")
}

/// One function for each version of the reflection protocol: the same messages under two names.
macro_rules! reflection {
    ($function:ident, $version:ident) => {
        /// Services by reflection, and the files that describe `symbol` with everything they import.
        async fn $function(channel: Channel, symbol: &str) -> (BTreeSet<String>, Vec<FileDescriptorProto>) {
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
            };
            let mut client = ServerReflectionClient::new(channel);
            let mut ask = async |message: MessageRequest| {
                let request = ServerReflectionRequest { host: String::new(), message_request: Some(message) };
                let answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
                answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
            };
            let MessageResponse::ListServicesResponse(list) =
                ask(MessageRequest::ListServices(String::new())).await
            else {
                panic!("no list of services")
            };
            let services = list.service.into_iter().map(|s| s.name).collect();
            let mut known: BTreeMap<String, FileDescriptorProto> = BTreeMap::new();
            let mut questions = vec![MessageRequest::FileContainingSymbol(symbol.to_owned())];
            while let Some(question) = questions.pop() {
                let MessageResponse::FileDescriptorResponse(files) = ask(question.clone()).await else {
                    panic!("no description for {question:?}")
                };
                for bytes in files.file_descriptor_proto {
                    let file = FileDescriptorProto::decode(&bytes[..]).unwrap();
                    let missing = file.dependency.iter().filter(|name| !known.contains_key(*name));
                    questions.extend(missing.cloned().map(MessageRequest::FileByFilename));
                    known.insert(file.name().to_owned(), file);
                }
            }
            (services, known.into_values().collect())
        }
    };
}
reflection!(reflect_v1, v1);
reflection!(reflect_v1alpha, v1alpha);

/// Checks what reflection says, and calls a method with nothing but that.
async fn look_around(channel: Channel, services: BTreeSet<String>, files: Vec<FileDescriptorProto>) {
    assert!(services.contains(ADMIN) && services.contains(HEALTH), "{services:?}");
    let file = files.iter().find(|f| f.service.iter().any(|s| s.name() == "Admin")).unwrap();
    assert_eq!(file.package(), "komainu.admin.v1");
    let admin = file.service.iter().find(|s| s.name() == "Admin").unwrap();
    let methods: BTreeSet<&str> = admin.method.iter().map(|m| m.name()).collect();
    for method in ["Status", "Apply", "Export", "BackendSetAdmin", "Switchover", "Events"] {
        assert!(methods.contains(method), "no {method} in {methods:?}");
    }
    // Every message that a method takes or gives is described.
    let described: BTreeSet<String> = files
        .iter()
        .flat_map(|f| f.message_type.iter().map(|m| format!(".{}.{}", f.package(), m.name())))
        .collect();
    for method in &admin.method {
        for name in [method.input_type(), method.output_type()] {
            assert!(described.contains(name), "{name} of {} is not described", method.name());
        }
    }

    // A field that happens to be number 1 and a string can be read as a string without more ado.
    let version = admin.method.iter().find(|m| m.name() == "Version").unwrap();
    let message = file.message_type.iter().find(|m| version.output_type().ends_with(m.name())).unwrap();
    assert_eq!(message.field.iter().find(|f| f.name() == "version").unwrap().number(), 1);
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let path = format!("/{ADMIN}/Version").parse().unwrap();
    let answer: String =
        client.unary(Request::new(()), path, ProstCodec::<(), String>::default()).await.unwrap().into_inner();
    assert!(answer.split('.').count() == 3, "version {answer}");
}

async fn health_is_served(channel: Channel) {
    let mut health = HealthClient::new(channel);
    let request = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for service in ["", ADMIN] {
        let answer = health.check(request(service)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let unknown = health.check(request("komainu.nothing")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

#[test]
fn reflection_and_health_serve_a_stock_client_on_owner_standby_and_witness() {
    let bed = Bed::web(Machine::Shared);
    for node in ["lb1", "lb2", "wit"] {
        let path = socket(&bed, node);
        inside(bed.host(node), || async move {
            let channel = unix(&path).await;
            for (services, files) in
                [reflect_v1(channel.clone(), ADMIN).await, reflect_v1alpha(channel.clone(), ADMIN).await]
            {
                look_around(channel.clone(), services, files).await;
            }
            health_is_served(channel).await;
        });
    }
}

/// Fault: the administration was aborted right after it was told to end, so streams broke off.
#[test]
fn streams_end_in_order_when_the_node_stops() {
    let mut bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let path = socket(&bed, &owner);
    let (watching, is_watching) = std::sync::mpsc::channel();
    let host = bed.host(&owner).clone();
    let watcher = std::thread::spawn(move || {
        inside(&host, || async move {
            let mut health = HealthClient::new(unix(&path).await);
            let request = HealthCheckRequest { service: ADMIN.to_owned() };
            let mut stream = health.watch(request).await.unwrap().into_inner();
            let mut seen = Vec::new();
            loop {
                match stream.message().await {
                    Ok(Some(answer)) => seen.push(answer.status()),
                    Ok(None) => return Ok(seen),
                    Err(error) => return Err((seen, error)),
                }
                let _ = watching.send(());
            }
        })
    });
    is_watching.recv().unwrap();
    let status = bed.cluster.terminate(&owner, SOON).unwrap();
    assert_eq!(status.code(), Some(0));
    let seen = watcher.join().unwrap().expect("the stream ends without an error");
    assert_eq!(seen, [ServingStatus::Serving, ServingStatus::NotServing]);
}
