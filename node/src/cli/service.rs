//! `komainu service …`

use komainu_proto::admin::{Service, ServiceAddRequest, ServiceRemoveRequest, ServiceStatus};
use komainu_proto::domain;

use super::args::{ServiceAddArgs, ServiceCommand};
use super::connect::Client;
use super::output::Output;
use super::{CliError, document, look};
use crate::render::table::Table;
use crate::render::{json, status};

/// Does what the command says.
///
/// # Errors
/// There is no such service, or the cluster refuses the change.
pub async fn run(client: &mut Client, output: &Output, command: ServiceCommand) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    match command {
        ServiceCommand::List => list(output, look::fetch(client).await?.services),
        ServiceCommand::Show { service } => {
            let services = look::fetch(client).await?.services;
            let found = find(&services, &service)?;
            output.either(&json::Service::from(found.clone()), || status::service(found))
        }
        ServiceCommand::Add(args) => {
            let service = Some(Service::from(&new_service(args)));
            document::report(
                output,
                client.call(admin.service_add(ServiceAddRequest { service })).await?,
                false,
            )
        }
        ServiceCommand::Remove { service } => {
            let answer = client.call(admin.service_remove(ServiceRemoveRequest { service })).await?;
            document::report(output, answer, false)
        }
    }
}

/// The service of this name.
///
/// # Errors
/// There is none.
pub fn find<'a>(services: &'a [ServiceStatus], name: &str) -> Result<&'a ServiceStatus, CliError> {
    services.iter().find(|s| s.name == name).ok_or_else(|| {
        let names: Vec<&str> = services.iter().map(|s| s.name.as_str()).collect();
        let known = if names.is_empty() { "there are none yet".to_owned() } else { names.join(", ") };
        CliError::new(format!("service {name}: does not exist; name one of: {known}"))
    })
}

fn list(output: &Output, services: Vec<ServiceStatus>) -> Result<(), CliError> {
    if output.json() {
        let services: Vec<json::Service> = services.into_iter().map(Into::into).collect();
        return output.value(&services, false);
    }
    let mut table = Table::new(["SERVICE", "PROTOCOL", "VIP", "MODE", "SCHEDULER", "GROUP", "BACKENDS UP"]);
    for service in &services {
        let up = service.backends.iter().filter(|b| json::health(b.health) == "up").count();
        table.row([
            service.name.clone(),
            json::protocol(service.protocol).to_owned(),
            status::endpoint(&service.vip, service.port),
            json::mode(service.mode).to_owned(),
            json::scheduler(service.scheduler).to_owned(),
            service.group.clone(),
            format!("{up} of {}", service.backends.len()),
        ]);
    }
    output.text(&table.to_string())
}

fn new_service(args: ServiceAddArgs) -> domain::Service {
    domain::Service {
        name: args.service,
        group: args.group,
        vip: args.vip,
        port: args.port,
        protocol: args.protocol,
        mode: args.mode,
        scheduler: args.scheduler,
        dead_backend: args.dead_backend,
        udp_flows: domain::UdpFlows::Table,
        tcp_idle_ms: domain::DEFAULT_TCP_IDLE_MS,
        udp_idle_ms: domain::DEFAULT_UDP_IDLE_MS,
        health: domain::HealthCheck { kind: args.check, path: args.check_path, ..Default::default() },
        backends: args
            .backends
            .into_iter()
            .map(|backend| domain::Backend {
                name: backend.name,
                address: backend.address.ip(),
                port: backend.address.port(),
                weight: domain::DEFAULT_WEIGHT,
                admin: None,
            })
            .collect(),
    }
}
