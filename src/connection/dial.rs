use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::error::without_arguments;
use super::tls::{self, TlsMaterial};
use super::{Address, Connection, ConnectionError, Credentials, RedisAccess, Stream, TlsAccess};
use crate::resp::Reply;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A plain-text server may wait for the end of a line that a TLS hello does not hold, so silence is
/// the usual sign; with the probe that follows it must fit into preflight's 5 s.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// A dead peer shows within about a minute also where nothing is being sent.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Opens connections to the servers of one deployment. Secrets are read at each connect. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    settings: Arc<Settings>,
}

struct Settings {
    access: RedisAccess,
    client_name: String,
    connect_timeout: Duration,
    /// `None`: the default of a connection.
    response_timeout: Option<Duration>,
    /// The last TLS client and what it was made of.
    tls: Mutex<Option<(TlsMaterial, Arc<ClientConfig>)>>,
}

impl Dialer {
    /// `client_name` appears in the server's CLIENT LIST; it must hold no spaces.
    pub fn new(access: RedisAccess, client_name: impl Into<String>) -> Dialer {
        Dialer::build(access, client_name.into(), CONNECT_TIMEOUT, None)
    }

    pub fn with_connect_timeout(&self, connect_timeout: Duration) -> Dialer {
        let Settings { access, client_name, response_timeout, .. } = &*self.settings;
        Dialer::build(access.clone(), client_name.clone(), connect_timeout, *response_timeout)
    }

    /// Connections give up after so long without a byte of an answer that is due.
    pub fn with_response_timeout(&self, response_timeout: Duration) -> Dialer {
        let Settings { access, client_name, connect_timeout, .. } = &*self.settings;
        Dialer::build(access.clone(), client_name.clone(), *connect_timeout, Some(response_timeout))
    }

    /// The same under another name in CLIENT LIST; it must hold no spaces.
    pub fn with_client_name(&self, client_name: impl Into<String>) -> Dialer {
        let Settings { access, connect_timeout, response_timeout, .. } = &*self.settings;
        let dialer = Dialer::build(access.clone(), client_name.into(), *connect_timeout, *response_timeout);
        // What was read of the certificates is good for it, too.
        let tls = self.settings.tls.lock().unwrap_or_else(PoisonError::into_inner).clone();
        *dialer.settings.tls.lock().unwrap_or_else(PoisonError::into_inner) = tls;
        dialer
    }

    /// For the Sentinels of this deployment: their own credentials, the same TLS.
    pub fn for_sentinels(&self) -> Dialer {
        let mut access = self.settings.access.clone();
        access.credentials = access.sentinel.as_ref().and_then(|sentinel| sentinel.credentials.clone());
        let Settings { client_name, connect_timeout, response_timeout, .. } = &*self.settings;
        Dialer::build(access, client_name.clone(), *connect_timeout, *response_timeout)
    }

    pub fn access(&self) -> &RedisAccess {
        &self.settings.access
    }

    /// Where an address that a server announced can be reached from here.
    pub fn reachable(&self, announced: &Address) -> Address {
        self.settings.access.endpoint_map.get(announced).unwrap_or(announced).clone()
    }

    /// A conversation with the server at `address`, announced or reachable: the endpoint map is
    /// applied unless the address is one that the map leads to.
    pub async fn connect(&self, address: &Address) -> Result<Connection, ConnectionError> {
        let map = &self.settings.access.endpoint_map;
        let address = if map.values().any(|known| known == address) {
            address.clone()
        } else {
            self.reachable(address)
        };
        let stream = self.open(&address).await?;
        let secured = stream.is_tls();
        let mut connection = Connection::new(stream, address);
        if let Some(timeout) = self.settings.response_timeout {
            connection.set_response_timeout(timeout);
        }
        match self.introduce(&mut connection).await {
            Ok(()) => Ok(connection),
            // Redis 7 hangs up on plain text at its TLS port without a word.
            Err(error @ (ConnectionError::Closed { .. } | ConnectionError::ResponseTimeout { .. }))
                if !secured =>
            {
                let address = connection.address().clone();
                Err(if answers_tls(&address).await { ConnectionError::TlsServer { address } } else { error })
            }
            Err(error) => Err(error),
        }
    }

    fn build(
        access: RedisAccess,
        client_name: String,
        connect_timeout: Duration,
        response_timeout: Option<Duration>,
    ) -> Dialer {
        let tls = Mutex::new(None);
        let settings = Settings { access, client_name, connect_timeout, response_timeout, tls };
        Dialer { settings: Arc::new(settings) }
    }

    async fn open(&self, address: &Address) -> Result<Stream, ConnectionError> {
        let tls = match &self.settings.access.tls {
            Some(access) => Some((access, self.tls_client(access).await?)),
            None => None,
        };
        let tcp = tcp(address, self.settings.connect_timeout).await?;
        match tls {
            None => Ok(Stream::Tcp(tcp)),
            Some((access, client)) => secure(tcp, address, access, client).await,
        }
    }

    async fn tls_client(&self, access: &TlsAccess) -> Result<Arc<ClientConfig>, ConnectionError> {
        let material = TlsMaterial::read(access).await?;
        let mut last = self.settings.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_of, client)) = last.as_ref()
            && *made_of == material
        {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(material.client_config(access)?);
        *last = Some((material, Arc::clone(&client)));
        Ok(client)
    }

    async fn introduce(&self, connection: &mut Connection) -> Result<(), ConnectionError> {
        if let Some(credentials) = &self.settings.access.credentials {
            authenticate(connection, credentials).await?;
        }
        let name = self.settings.client_name.as_bytes();
        match connection.call(&[b"CLIENT", b"SETNAME", name]).await? {
            // The name is a courtesy: clouds and ACLs may forbid CLIENT, Redis before 2.6.9 lacks it.
            Reply::Error(text) => match ConnectionError::from_reply(connection.address(), b"CLIENT", &text) {
                ConnectionError::Server { .. } => Ok(()),
                refused => Err(refused),
            },
            _ => Ok(()),
        }
    }
}

/// AUTH with one argument for the default user, so that servers before 6.0 understand it.
async fn authenticate(connection: &mut Connection, credentials: &Credentials) -> Result<(), ConnectionError> {
    let password = credentials.password.read().await?;
    let user = credentials.username.as_deref().unwrap_or("default");
    let mut reply = match credentials.username.as_deref() {
        Some(user) => connection.call(&[b"AUTH", user.as_bytes(), &password]).await?,
        None => connection.call(&[b"AUTH", &password]).await?,
    };
    let too_many =
        |reply: &Reply| matches!(reply, Reply::Error(text) if text.starts_with(b"ERR wrong number"));
    if user == "default" && credentials.username.is_some() && too_many(&reply) {
        reply = connection.call(&[b"AUTH", &password]).await?;
    }
    let Reply::Error(text) = &reply else { return Ok(()) };
    let failed = |text: String| ConnectionError::AuthFailed {
        address: connection.address().clone(),
        user: user.into(),
        text,
    };
    match ConnectionError::from_reply(connection.address(), b"AUTH", text) {
        ConnectionError::Server { .. } if too_many(&reply) => {
            Err(failed("the server is older than 6.0 and knows no users; leave username out".into()))
        }
        ConnectionError::Server { .. }
            if mentions(text, "without any password") || mentions(text, "no password is set") =>
        {
            Err(failed("the server has no password set; leave auth out, or set one".into()))
        }
        ConnectionError::Server { text, .. } => Err(failed(text)),
        ConnectionError::NoAuth { .. } => Err(failed(without_arguments(text))),
        refused => Err(refused),
    }
}

fn mentions(text: &[u8], part: &str) -> bool {
    memchr::memmem::find(text, part.as_bytes()).is_some()
}

/// Tries each address the name stands for; `limit` is for all of them together.
async fn tcp(address: &Address, limit: Duration) -> Result<TcpStream, ConnectionError> {
    let attempt = async {
        let found = tokio::net::lookup_host((address.host.as_str(), address.port)).await;
        let found =
            found.map_err(|source| ConnectionError::Unresolved { address: address.clone(), source })?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name stands for no address");
        for socket in found {
            match TcpStream::connect(socket).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(match last.kind() {
            io::ErrorKind::ConnectionRefused => ConnectionError::Refused { address: address.clone() },
            _ => ConnectionError::Unreachable { address: address.clone(), source: last },
        })
    };
    let late = |_| ConnectionError::ConnectTimeout { address: address.clone(), after: limit };
    let stream = timeout(limit, attempt).await.map_err(late)??;
    let unusable = |source| ConnectionError::Unreachable { address: address.clone(), source };
    stream.set_nodelay(true).map_err(unusable)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive).map_err(unusable)?;
    Ok(stream)
}

async fn secure(
    tcp: TcpStream,
    address: &Address,
    access: &TlsAccess,
    client: Arc<ClientConfig>,
) -> Result<Stream, ConnectionError> {
    let name = access.server_name.as_deref().unwrap_or(&address.host).to_owned();
    let name = ServerName::try_from(name).map_err(|error| tls::fault("server name", error))?;
    let handshake = timeout(HANDSHAKE_TIMEOUT, TlsConnector::from(client).connect(name, tcp)).await;
    let error = match handshake {
        Ok(Ok(stream)) => return Ok(Stream::Tls(Box::new(stream))),
        Ok(Err(source)) => ConnectionError::TlsHandshake { address: address.clone(), source },
        Err(_) => ConnectionError::TlsTimeout { address: address.clone(), after: HANDSHAKE_TIMEOUT },
    };
    // A certificate that was shown and refused needs no further question.
    let plain = !is_certificate_fault(&error) && answers_plain_text(address).await;
    Err(if plain { ConnectionError::PlainTextServer { address: address.clone() } } else { error })
}

fn is_certificate_fault(error: &ConnectionError) -> bool {
    let ConnectionError::TlsHandshake { source, .. } = error else { return false };
    let tls = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        tls,
        Some(
            rustls::Error::InvalidCertificate(_)
                | rustls::Error::NoCertificatesPresented
                | rustls::Error::AlertReceived(_)
        )
    )
}

/// Whether PING in the clear is answered in RESP.
async fn answers_plain_text(address: &Address) -> bool {
    let probe = async {
        let mut stream = tcp(address, PROBE_TIMEOUT).await.ok()?;
        stream.write_all(b"PING\r\n").await.ok()?;
        let mut first = [0];
        stream.read_exact(&mut first).await.ok()?;
        Some(matches!(first, [b'+' | b'-']))
    };
    matches!(timeout(PROBE_TIMEOUT, probe).await, Ok(Some(true)))
}

/// Whether a TLS hello is answered in TLS; nothing is verified, nothing is sent.
async fn answers_tls(address: &Address) -> bool {
    let access = TlsAccess {
        ca: None,
        client_certificate: None,
        client_key: None,
        server_name: None,
        insecure_skip_verify: true,
    };
    let probe = async {
        let client = TlsMaterial::read(&access).await.ok()?.client_config(&access).ok()?;
        let name = ServerName::try_from(address.host.clone()).ok()?;
        let stream = tcp(address, PROBE_TIMEOUT).await.ok()?;
        match TlsConnector::from(Arc::new(client)).connect(name, stream).await {
            Ok(_) => Some(true),
            Err(error) => {
                let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                Some(tls.is_some_and(|error| !matches!(error, rustls::Error::InvalidMessage(_))))
            }
        }
    };
    matches!(timeout(PROBE_TIMEOUT, probe).await, Ok(Some(true)))
}
