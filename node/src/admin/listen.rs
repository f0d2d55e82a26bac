//! The sockets of the administration.
//!
//! They are opened before anything else is started, so that what is wrong with them is said at once.

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use komainu_proto::FILE_DESCRIPTOR_SET;
use komainu_proto::admin::admin_server::{AdminServer, SERVICE_NAME};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use super::Context;
use super::doorway::Doorway;
use super::service::Administration;
use crate::cli::connect::MAX_MESSAGE_LEN;
use crate::config::node::{NodeConfig, RemoteAdmin};

/// Owner and group may administrate.
const SOCKET_MODE: u32 = 0o660;
/// Calls under way on one connection: more than any client of ours makes, few enough to bound memory.
const MAX_CALLS_PER_CONNECTION: usize = 64;
/// Time that calls under way have to end when the node stops.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Why the administration can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The local socket.
    #[error("{}: {reason}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The remote listener.
    #[error("admin.listen: {address}: {reason}")]
    Remote {
        /// Its address.
        address: SocketAddr,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Serving ended although nobody asked for it.
    #[error("the admin server ended: {0}")]
    Ended(#[from] tonic::transport::Error),
    /// The system refused something.
    #[error("the admin server can't go on: {0}")]
    System(#[from] std::io::Error),
}

/// The local socket's place in the file system. Removed with the listener, also when serving is aborted: nobody is to
/// find a socket that doesn't answer.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        // A missing one is as well.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The sockets, open.
pub struct Listeners {
    socket: UnixListener,
    place: Place,
    remote: Option<Doorway>,
}

impl Listeners {
    /// Opens the local socket and, where configured, the remote listener.
    ///
    /// # Errors
    /// The socket is another process's, its directory can't be made, the address is taken, or the certificates are unusable.
    pub async fn open(config: &NodeConfig) -> Result<Self, ServeError> {
        let open = |remote: &RemoteAdmin| {
            Doorway::open(remote).map_err(|reason| ServeError::Remote { address: remote.listen, reason })
        };
        let remote = config.admin.as_ref().map(open).transpose()?;
        let path = config.socket();
        let socket = open_socket(&path).await?;
        Ok(Listeners { socket, place: Place(path), remote })
    }

    /// Serves until `stop` becomes true, or its sender is gone.
    ///
    /// # Errors
    /// A listener broke.
    pub async fn serve(self, context: Context, stop: watch::Receiver<bool>) -> Result<(), ServeError> {
        let Listeners { socket, place: _place, remote } = self;
        serve(socket, remote, context, stop).await
    }
}

async fn serve(
    socket: UnixListener,
    remote: Option<Doorway>,
    context: Context,
    stop: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let (mut health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status("", ServingStatus::Serving).await;
    health.set_service_status(SERVICE_NAME, ServingStatus::Serving).await;
    let admin = AdminServer::new(Administration::new(context, stop.clone()))
        .max_decoding_message_size(MAX_MESSAGE_LEN)
        .max_encoding_message_size(MAX_MESSAGE_LEN);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(SERVICE_NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    let built_in = "the descriptor sets are built in and well formed";
    let routes = Routes::new(admin)
        .add_service(health_service)
        .add_service(reflection().build_v1().expect(built_in))
        .add_service(reflection().build_v1alpha().expect(built_in));
    let server = || Server::builder().concurrency_limit_per_connection(MAX_CALLS_PER_CONNECTION);

    let local = server()
        .add_routes(routes.clone())
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket), stopped(stop.clone()));
    let remote = async {
        match remote {
            None => Ok(()),
            Some(doorway) => {
                server()
                    .add_routes(routes)
                    .serve_with_incoming_shutdown(doorway.incoming()?, stopped(stop.clone()))
                    .await?;
                Ok(())
            }
        }
    };
    let local = async { Ok(local.await?) };
    // Who watches the health service is told, and its streams end.
    let say_goodbye = async {
        stopped(stop.clone()).await;
        for service in ["", SERVICE_NAME] {
            health.set_service_status(service, ServingStatus::NotServing).await;
            health.clear_service_status(service).await;
        }
        Ok(())
    };
    let give_up = async {
        stopped(stop.clone()).await;
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        ended = async { tokio::try_join!(local, remote, say_goodbye) } => ended.map(|_| ()),
        () = give_up => Ok(()),
    }
}

/// Returns when the node is to stop.
pub(super) async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone: that is a stop, too.
    let _ = stop.wait_for(|&stop| stop).await;
}

async fn open_socket(path: &Path) -> Result<UnixListener, ServeError> {
    let wrong = |reason: String| ServeError::Socket { path: path.to_owned(), reason };
    let Some(dir) = path.parent() else { return Err(wrong("has no directory; set run_dir".to_owned())) };
    std::fs::create_dir_all(dir).map_err(|error| {
        wrong(format!(
            "{} can't be made: {error}; run as root, or set run_dir to a directory of this user",
            dir.display()
        ))
    })?;
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(wrong("is there and is no socket; remove it, or set another run_dir".to_owned()));
        }
        Ok(_) if tokio::net::UnixStream::connect(path).await.is_ok() => {
            return Err(wrong("another komainu answers there; stop it, or set another run_dir".to_owned()));
        }
        // Absent, or left behind by a process that was killed.
        _ => {}
    }
    // Bound beside its place, given its mode, then moved: nobody sees a socket with another mode, and a stale one is
    // replaced in one step.
    let new = dir.join("admin.new");
    let bind = || {
        let _ = std::fs::remove_file(&new);
        let listener = UnixListener::bind(&new)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(SOCKET_MODE))?;
        std::fs::rename(&new, path)?;
        Ok(listener)
    };
    bind().map_err(|error: std::io::Error| {
        wrong(format!("can't be listened on: {error}; see whether this user may write to {}", dir.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        let first = open_socket(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, SOCKET_MODE);
        let error = open_socket(&path).await.unwrap_err().to_string();
        assert!(error.contains("another komainu answers"), "{error}");
        drop(first);
        open_socket(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = open_socket(&path).await.unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
