//! The way between two hosts: TLS 1.3 alone, and each end shows a certificate of the same authority.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::Shutdown;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig};

use super::args::MigrateArgs;
use super::ends::{End, Socket};

/// What is spoken inside: of another version nothing is to be understood.
const PROTOCOL: &[u8] = b"casemate-migration/1";
/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 20;

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option is missing.
    #[error("to or from another host a machine goes by TLS alone: give --cert, --key and --ca")]
    Missing,
    /// A file.
    #[error("{}: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// They do not go together.
    #[error("the certificate, its key and the authority: {0}")]
    Config(String),
    /// Not a name.
    #[error("{0} is no name that a certificate could have: give --peer-name")]
    Name(String),
}

/// Which certificates, read before there is anything to distrust.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |why: String| Error::File {
        path: path.to_path_buf(),
        why,
    };
    let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_FILE).read_to_end(&mut bytes);
    read.map_err(|error| failed(error.to_string()))?;
    Ok(bytes)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let failed = |why: String| Error::File {
        path: path.to_path_buf(),
        why,
    };
    let bytes = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let all = all.map_err(|error| failed(error.to_string()))?;
    match all.is_empty() {
        true => Err(failed("no certificate is in it, as PEM".to_string())),
        false => Ok(all),
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// What rustls does not like.
pub fn config(error: impl std::fmt::Display) -> Error {
    Error::Config(error.to_string())
}

impl Identity {
    /// From the files that are named.
    pub fn read(args: &MigrateArgs) -> Result<Self, Error> {
        let (Some(cert), Some(key), Some(ca)) = (&args.cert, &args.key, &args.ca) else {
            return Err(Error::Missing);
        };
        let mut roots = RootCertStore::empty();
        for root in certificates(ca)? {
            roots.add(root).map_err(|error| Error::File {
                path: ca.clone(),
                why: error.to_string(),
            })?;
        }
        let private = PrivateKeyDer::from_pem_slice(&read(key)?);
        Ok(Self {
            chain: certificates(cert)?,
            key: private.map_err(|error| Error::File {
                path: key.clone(),
                why: error.to_string(),
            })?,
            roots: Arc::new(roots),
        })
    }

    /// For who connects, to an end with this name.
    pub fn client(self, name: &str) -> Result<Connection, Error> {
        let name = ServerName::try_from(name.to_string())
            .map_err(|_| Error::Name(crate::api::plain(name)))?;
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(config)?
            .with_root_certificates(self.roots)
            .with_client_auth_cert(self.chain, self.key)
            .map_err(config)?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        client.resumption = Resumption::disabled();
        let connection = ClientConnection::new(Arc::new(client), name).map_err(config)?;
        Ok(connection.into())
    }

    /// For who listens.
    pub fn server(self) -> Result<Arc<ServerConfig>, Error> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots, provider())
            .build()
            .map_err(config)?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(config)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain, self.key)
            .map_err(config)?;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Arc::new(server))
    }
}

/// An end that speaks TLS.
pub struct Tls {
    socket: Socket,
    connection: Connection,
}

impl Tls {
    /// Over a connection.
    pub fn new(socket: Socket, connection: Connection) -> Self {
        Self { socket, connection }
    }

    /// Goes on with the handshake, and says whether it is over. Then the other end has shown who it is.
    pub fn shake(&mut self) -> io::Result<bool> {
        while self.connection.is_handshaking() {
            self.flush()?;
            match self.take() {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.flush()
    }

    /// Takes what has come from the network.
    fn take(&mut self) -> io::Result<()> {
        let count = self.connection.read_tls(&mut self.socket)?;
        if let Err(error) = self.connection.process_new_packets() {
            // It is told what was wrong.
            let _ = self.flush();
            return Err(io::Error::new(ErrorKind::InvalidData, error));
        }
        match count {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

impl AsFd for Tls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl End for Tls {
    fn receive(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(room) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.take()?,
                result => return result,
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.connection.writer().write(bytes)?;
        self.flush()?;
        match count {
            0 => Err(ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn finish(&mut self) {
        self.connection.send_close_notify();
        // What it still keeps then is not to be had any more: whoever has not read so much does not wait for the end.
        let _ = self.flush();
        self.socket.shut(Shutdown::Write);
    }
}
