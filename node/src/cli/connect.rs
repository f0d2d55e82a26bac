//! Which node is meant, and how it is reached.

use std::path::{Path, PathBuf};
use std::time::Duration;

use komainu_proto::admin::admin_client::AdminClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::CliError;
use super::args::ClientArgs;
use crate::config::files;
use crate::config::node::{DEFAULT_FILE, DEFAULT_RUN_DIR, SOCKET_NAME};

/// Time to reach a node.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for an answer. Longer than a leader needs to be elected and to commit.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest message: a document of the largest size allowed, in protobuf.
pub const MAX_MESSAGE_LEN: usize = 64 << 20;

/// A connection to a node.
pub struct Client {
    /// The generated client; use [`Client::call`] for calls with one answer.
    pub admin: AdminClient<Channel>,
    address: String,
}

/// Where a node is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Unix(PathBuf),
    Https(String),
}

impl Client {
    /// Reaches the node that `args` name.
    ///
    /// # Errors
    /// The address is wrong, or nobody answers there.
    pub async fn connect(args: &ClientArgs) -> Result<Self, CliError> {
        let target = match &args.node {
            Some(address) => parse(address)?,
            None => Target::Unix(local_socket(Path::new(DEFAULT_FILE))),
        };
        let (address, endpoint) = match &target {
            Target::Unix(path) => {
                let address = format!("unix:{}", path.display());
                let endpoint = Endpoint::from_shared(address.clone());
                (address, endpoint.map_err(|error| CliError::new(format!("--node: {error}")))?)
            }
            Target::Https(url) => {
                let wrong = |error| CliError::new(format!("--node {url}: {}", chain(&error)));
                let endpoint = Endpoint::from_shared(url.clone()).map_err(wrong)?;
                (url.clone(), endpoint.tls_config(tls(args)?).map_err(wrong)?)
            }
        };
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .connect()
            .await
            .map_err(|error| unreachable(&target, &address, &error))?;
        let admin = AdminClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_LEN)
            .max_encoding_message_size(MAX_MESSAGE_LEN);
        Ok(Client { admin, address })
    }

    /// Waits for the answer of a call, but not for ever.
    ///
    /// # Errors
    /// The node's refusal, or that it doesn't answer.
    pub async fn call<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, CliError> {
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(answer) => Ok(answer?.into_inner()),
            Err(_) => Err(CliError::new(format!(
                "{}: no answer within {} s; look at `komainu status`, or ask another node with --node",
                self.address,
                CALL_TIMEOUT.as_secs()
            ))),
        }
    }
}

fn parse(address: &str) -> Result<Target, CliError> {
    if let Some(path) = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:")) {
        return Ok(Target::Unix(PathBuf::from(path)));
    }
    if address.starts_with("https://") {
        return Ok(Target::Https(address.to_owned()));
    }
    let action = if address.starts_with("http://") {
        "remote administration is served over mutual TLS only: write https://host:port"
    } else {
        "write unix:/path/to/admin.sock or https://host:port"
    };
    Err(CliError::new(format!("--node {address}: is not the address of a node; {action}")))
}

/// The socket of the node on this machine: where its node file says, also when that file has mistakes elsewhere.
fn local_socket(node_file: &Path) -> PathBuf {
    let run_dir = std::fs::read_to_string(node_file)
        .ok()
        .and_then(|text| text.parse::<toml::Table>().ok())
        .and_then(|table| table.get("run_dir")?.as_str().map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from(DEFAULT_RUN_DIR));
    run_dir.join(SOCKET_NAME)
}

fn tls(args: &ClientArgs) -> Result<ClientTlsConfig, CliError> {
    let pem = |file: &Option<PathBuf>, option: &str, kind| {
        let path = file.as_ref().ok_or_else(|| {
            CliError::new(format!("--{option}: is missing; remote nodes are reached over mutual TLS: give --ca, --cert and --key"))
        })?;
        files::read_pem(path, kind)
            .map_err(|error| CliError::new(format!("--{option} {}: {error}", path.display())))
    };
    let ca = pem(&args.ca, "ca", files::CERTIFICATE)?;
    let cert = pem(&args.cert, "cert", files::CERTIFICATE)?;
    let key = pem(&args.key, "key", files::PRIVATE_KEY)?;
    Ok(ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .identity(Identity::from_pem(cert, key)))
}

fn unreachable(target: &Target, address: &str, error: &tonic::transport::Error) -> CliError {
    let why = chain(error);
    let action = match target {
        Target::Unix(path) if !path.exists() => {
            "is the daemon running here? Start it, or name a node with --node unix:/path/admin.sock"
        }
        Target::Unix(_) if why.contains("denied") => "run as root or as a member of the socket's group",
        Target::Unix(_) => "is the daemon running here? See its log",
        Target::Https(_) => "see whether the node runs, its [admin] listen, and the certificates",
    };
    CliError::new(format!("{address}: can't be reached ({why}); {action}"))
}

/// The innermost reason: the outer ones only say "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_or_explained() {
        assert_eq!(parse("unix:/a/b").unwrap(), Target::Unix("/a/b".into()));
        assert_eq!(parse("unix:///a/b").unwrap(), Target::Unix("/a/b".into()));
        assert_eq!(parse("https://lb1:7801").unwrap(), Target::Https("https://lb1:7801".into()));
        for (wrong, advice) in [("http://lb1:7801", "mutual TLS"), ("lb1", "unix:/path")] {
            let CliError::Failed(lines) = parse(wrong).unwrap_err() else { panic!("{wrong}") };
            assert!(lines[0].contains(wrong) && lines[0].contains(advice), "{lines:?}");
        }
    }

    #[test]
    fn the_local_socket_is_where_the_node_file_says() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.toml");
        assert_eq!(local_socket(&file), Path::new("/run/komainu/admin.sock"));
        std::fs::write(&file, "run_dir = \"/somewhere\"\nid = \"wrong\"\n").unwrap();
        assert_eq!(local_socket(&file), Path::new("/somewhere/admin.sock"));
    }

    #[test]
    fn tls_needs_all_three_files() {
        let args = ClientArgs { ca: Some("/nonexistent".into()), ..Default::default() };
        let CliError::Failed(lines) = tls(&args).unwrap_err() else { panic!("closed") };
        assert!(lines[0].starts_with("--ca /nonexistent: can't be read"), "{lines:?}");
        let CliError::Failed(lines) = tls(&ClientArgs::default()).unwrap_err() else { panic!("closed") };
        assert!(lines[0].contains("mutual TLS"), "{lines:?}");
    }

    #[tokio::test]
    async fn a_node_that_is_not_there_is_named_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let node = Some(format!("unix:{}/admin.sock", dir.path().display()));
        let error = Client::connect(&ClientArgs { node, ..Default::default() }).await.err().unwrap();
        let CliError::Failed(lines) = error else { panic!("closed") };
        assert!(
            lines[0].contains("admin.sock: can't be reached") && lines[0].contains("running"),
            "{lines:?}"
        );
    }
}
