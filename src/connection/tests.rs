use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;

use super::test_server::{Certificates, Server, free_port, plain_access};
use super::*;
use crate::resp::Reply;

fn with_password(access: RedisAccess, username: Option<&str>, password: &str) -> RedisAccess {
    let password = Secret::Literal(password.as_bytes().to_vec());
    RedisAccess {
        credentials: Some(Credentials { username: username.map(str::to_owned), password }),
        ..access
    }
}

fn tls(certificates: &Certificates) -> TlsAccess {
    TlsAccess {
        ca: certificates.secret("ca.pem"),
        client_certificate: None,
        client_key: None,
        server_name: None,
        insecure_skip_verify: false,
    }
}

async fn refusal(access: RedisAccess) -> ConnectionError {
    let address = access.endpoints[0].clone();
    let begun = Instant::now();
    let error = Dialer::new(access, "test").connect(&address).await.expect_err("the connection must fail");
    assert!(begun.elapsed() < Duration::from_secs(5), "{error} took {:?}", begun.elapsed());
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    error
}

#[tokio::test]
async fn calls_pipelines_and_names_itself() {
    let server = Server::start(&[]);
    let mut connection = server.connect().await;
    assert!(connection.call(&[b"SET", b"k", b"v"]).await.unwrap().is_ok());
    for number in 0..1000 {
        connection.queue(&["RPUSH".to_owned(), "list".to_owned(), number.to_string()]);
    }
    connection.queue(&["LRANGE", "list", "0", "-1"]);
    connection.send_queued().await.unwrap();
    for number in 1..=1000 {
        assert_eq!(connection.receive().await.unwrap(), Reply::Integer(number));
    }
    assert_eq!(connection.receive().await.unwrap().items().len(), 1000);
    assert_eq!(connection.query_text(&[b"CLIENT", b"GETNAME"]).await.unwrap(), "test");
    let error = connection.query(&[b"LPUSH", b"k", b"hunter2"]).await.unwrap_err();
    assert!(error.to_string().contains("LPUSH: WRONGTYPE"), "{error}");
    assert!(!error.to_string().contains("hunter2"));
}

#[tokio::test]
async fn a_large_value_arrives_whole() {
    let server = Server::start(&[]);
    let mut connection = server.connect().await;
    let value: Vec<u8> = (0..20 << 20).map(|i: u32| (i.wrapping_mul(2654435761) >> 13) as u8).collect();
    connection.query(&[b"SET", b"big", &value]).await.unwrap();
    let reply = connection.query(&[b"GET", b"big"]).await.unwrap();
    assert_eq!(reply.bytes().map(|bytes| bytes.as_ref() == value.as_slice()), Some(true));
}

#[tokio::test]
async fn nobody_there() {
    let address = Address::new("127.0.0.1", free_port());
    let error = refusal(plain_access(&address)).await;
    assert!(matches!(error, ConnectionError::Refused { .. }) && error.is_transient(), "{error}");
    let error = refusal(plain_access(&Address::new("no-such-host.invalid", 6379))).await;
    assert!(matches!(error, ConnectionError::Unresolved { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_that_says_nothing_times_out() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::new("127.0.0.1", listener.local_addr().unwrap().port());
    let stream = Stream::Tcp(tokio::net::TcpStream::connect(("127.0.0.1", address.port)).await.unwrap());
    let mut connection = Connection::new(stream, address);
    connection.set_response_timeout(Duration::from_millis(50));
    let error = connection.call(&[b"PING"]).await.unwrap_err();
    assert!(matches!(error, ConnectionError::ResponseTimeout { .. }) && error.is_transient(), "{error}");
}

#[tokio::test]
async fn not_a_redis_server() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::new("127.0.0.1", listener.local_addr().unwrap().port());
    let web = tokio::spawn(async move {
        let (mut peer, _) = listener.accept().await.unwrap();
        peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        peer
    });
    let error = refusal(plain_access(&address)).await;
    assert!(matches!(error, ConnectionError::Protocol { .. }) && !error.is_transient(), "{error}");
    drop(web.await);
}

#[tokio::test]
async fn passwords_and_users() {
    let server =
        Server::start(&["--requirepass", "secret", "--user", "migrator", "on", ">pw", "~*", "&*", "+@all"]);
    let access = || server.access();
    for (user, password) in [(None, "secret"), (Some("default"), "secret"), (Some("migrator"), "pw")] {
        let dialer = Dialer::new(with_password(access(), user, password), "test");
        let mut connection = dialer.connect(&server.address).await.unwrap();
        assert!(connection.call(&[b"SET", b"k", b"v"]).await.unwrap().is_ok());
    }
    for user in [None, Some("default"), Some("migrator"), Some("nobody")] {
        let error = refusal(with_password(access(), user, "hunter2")).await;
        assert!(matches!(error, ConnectionError::AuthFailed { .. }), "{error:?}");
        assert!(error.is_auth() && !error.is_transient());
    }
    assert!(matches!(refusal(access()).await, ConnectionError::NoAuth { .. }));
}

#[tokio::test]
async fn a_password_the_server_does_not_know_of() {
    let server = Server::start(&[]);
    let error = refusal(with_password(server.access(), None, "hunter2")).await;
    assert!(error.to_string().contains("no password set"), "{error}");
}

#[tokio::test]
async fn a_renamed_auth_does_not_leak_the_password() {
    let server = Server::start(&["--rename-command", "AUTH", "LOGIN"]);
    let error = refusal(with_password(server.access(), None, "hunter2")).await;
    assert!(matches!(error, ConnectionError::AuthFailed { .. }), "{error:?}");
}

#[tokio::test]
async fn too_many_clients() {
    let server = Server::start(&[]);
    let mut first = server.connect().await;
    first.query(&[b"CONFIG", b"SET", b"maxclients", b"1"]).await.unwrap();
    let error = refusal(server.access()).await;
    assert!(matches!(error, ConnectionError::MaxClients { .. }) && error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn tls_is_verified() {
    let certificates = Certificates::make();
    let server = Server::start_tls(&certificates, &["--tls-auth-clients", "no"]);
    let trusting = RedisAccess { tls: Some(tls(&certificates)), ..server.access() };
    let dialer = Dialer::new(trusting.clone(), "test");
    let mut connection = dialer.connect(&server.address).await.unwrap();
    assert!(connection.call(&[b"SET", b"k", b"v"]).await.unwrap().is_ok());
    drop(connection);
    dialer.connect(&server.address).await.expect("the TLS client is used again");

    let named = |name: &str| RedisAccess {
        tls: Some(TlsAccess { server_name: Some(name.into()), ..tls(&certificates) }),
        ..server.access()
    };
    Dialer::new(named("redis.test"), "test").connect(&server.address).await.unwrap();
    let error = refusal(named("other.test")).await;
    assert!(matches!(error, ConnectionError::TlsHandshake { .. }) && !error.is_transient(), "{error:?}");

    let strangers = Certificates::make();
    let error = refusal(RedisAccess { tls: Some(tls(&strangers)), ..server.access() }).await;
    assert!(matches!(error, ConnectionError::TlsHandshake { .. }), "{error:?}");
    let careless = TlsAccess { insecure_skip_verify: true, ..tls(&strangers) };
    let careless = RedisAccess { tls: Some(careless), ..server.access() };
    Dialer::new(careless, "test").connect(&server.address).await.unwrap();
}

#[tokio::test]
async fn mutual_tls() {
    let certificates = Certificates::make();
    let server = Server::start_tls(&certificates, &[]);
    let known = TlsAccess {
        client_certificate: certificates.secret("client.pem"),
        client_key: certificates.secret("client.key"),
        ..tls(&certificates)
    };
    let access = RedisAccess { tls: Some(known), ..server.access() };
    Dialer::new(access, "test").connect(&server.address).await.unwrap();

    let error = refusal(RedisAccess { tls: Some(tls(&certificates)), ..server.access() }).await;
    assert!(error.to_string().to_lowercase().contains("certificate"), "{error}");
}

#[tokio::test]
async fn tls_spoken_to_a_plain_text_server() {
    let certificates = Certificates::make();
    let server = Server::start(&[]);
    let error = refusal(RedisAccess { tls: Some(tls(&certificates)), ..server.access() }).await;
    assert!(matches!(error, ConnectionError::PlainTextServer { .. }) && !error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn plain_text_spoken_to_a_tls_server() {
    let certificates = Certificates::make();
    let server = Server::start_tls(&certificates, &[]);
    let error = refusal(server.access()).await;
    assert!(matches!(error, ConnectionError::TlsServer { .. }) && !error.is_transient(), "{error:?}");
    let error = refusal(with_password(server.access(), None, "hunter2")).await;
    assert!(matches!(error, ConnectionError::TlsServer { .. }), "{error:?}");
}

#[tokio::test]
async fn a_bad_ca_is_named() {
    let access = TlsAccess {
        ca: Some(Secret::Literal(b"not pem".to_vec())),
        client_certificate: None,
        client_key: None,
        server_name: None,
        insecure_skip_verify: false,
    };
    let address = Address::new("127.0.0.1", 1);
    let error = refusal(RedisAccess { tls: Some(access), ..plain_access(&address) }).await;
    assert!(error.to_string().contains("CA certificate"), "{error}");
}

#[tokio::test]
async fn the_endpoint_map_is_applied_once() {
    let server = Server::start(&[]);
    let announced = Address::new("10.255.255.1", 6379);
    let mut access = server.access();
    access.endpoint_map = BTreeMap::from([
        (announced.clone(), server.address.clone()),
        (server.address.clone(), Address::new("127.0.0.1", 1)),
    ]);
    let dialer = Dialer::new(access, "test");
    assert_eq!(dialer.reachable(&announced), server.address);
    for address in [&announced, &server.address] {
        assert_eq!(dialer.connect(address).await.unwrap().address(), &server.address);
    }
}

#[tokio::test]
async fn a_rotated_password_file_needs_no_new_dialer() {
    let server = Server::start(&["--requirepass", "old"]);
    let path = server.dir.path().join("password");
    std::fs::write(&path, "old\n").unwrap();
    let credentials = Credentials { username: None, password: Secret::File(path.clone()) };
    let dialer = Dialer::new(RedisAccess { credentials: Some(credentials), ..server.access() }, "test");
    let mut connection = dialer.connect(&server.address).await.unwrap();
    connection.query(&[b"CONFIG", b"SET", b"requirepass", b"new"]).await.unwrap();
    assert!(dialer.connect(&server.address).await.is_err());
    std::fs::write(&path, "new\n").unwrap();
    dialer.connect(&server.address).await.unwrap();
}
