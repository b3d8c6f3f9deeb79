//! `/metrics`, `/metric`, `/healthz`, `/readyz`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{ObservedSet, StatusLine, metrics};
use crate::api::status::Phase;

/// Where `--listen` points when it is not given.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9320);

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("--listen {address}: {source}; give another address, port 0 picks a free one")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("HTTP server stopped: {0}")]
    Serve(std::io::Error),
}

/// A socket that listens already, so that a taken port is known before the work begins.
pub struct Endpoints {
    listener: TcpListener,
    address: SocketAddr,
}

impl Endpoints {
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        let bind = |source| HttpError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, address })
    }

    /// With the port that was picked when 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` changes or its sender is gone.
    pub async fn serve(self, migrations: ObservedSet, stop: watch::Receiver<bool>) -> Result<(), HttpError> {
        let shown = Shown::new(migrations);
        self.serve_shown(shown, stop).await
    }

    /// As `serve`, with what else there is to show.
    pub async fn serve_shown(self, shown: Shown, mut stop: watch::Receiver<bool>) -> Result<(), HttpError> {
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        axum::serve(self.listener, router(shown))
            .with_graceful_shutdown(stopped)
            .await
            .map_err(HttpError::Serve)
    }
}

/// Why a probe fails.
pub type Probe = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What the endpoints show.
pub struct Shown {
    migrations: ObservedSet,
    pub registry: Registry,
    pub healthy: Probe,
    pub ready: Probe,
}

impl Shown {
    /// Healthy while it answers; ready once preflight of all is over, and for as long as nothing has failed.
    pub fn new(migrations: ObservedSet) -> Self {
        let registry = metrics::registry(migrations.clone());
        let of = migrations.clone();
        let ready = move || {
            let unready = of.list().into_iter().find_map(|migration| match migration.status.borrow().phase {
                phase @ (Phase::Pending | Phase::Preflight | Phase::Failed) => {
                    Some((migration.name.clone(), phase))
                }
                _ => None,
            });
            unready.map_or(Ok(()), |(name, phase)| Err(format!("{name}: {}", phase.as_str())))
        };
        Self { migrations, registry, healthy: Box::new(|| Ok(())), ready: Box::new(ready) }
    }
}

fn router(shown: Shown) -> Router {
    Router::new()
        .route("/metrics", get(prometheus))
        .route("/metric", get(statuses))
        .route("/healthz", get(async |State(shown): State<Arc<Shown>>| probed((shown.healthy)())))
        .route("/readyz", get(async |State(shown): State<Arc<Shown>>| probed((shown.ready)())))
        .with_state(Arc::new(shown))
}

async fn prometheus(State(shown): State<Arc<Shown>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &shown.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// A JSON array, its elements as the lines of `--output json`.
async fn statuses(State(shown): State<Arc<Shown>>) -> Response {
    let lines: Vec<String> = shown
        .migrations
        .list()
        .iter()
        .map(|migration| {
            let status = migration.status.borrow();
            StatusLine { name: &migration.name, namespace: &migration.namespace, status: &status }.to_json()
        })
        .collect();
    ([(header::CONTENT_TYPE, "application/json")], format!("[{}]\n", lines.join(","))).into_response()
}

fn probed(result: Result<(), String>) -> Response {
    match result {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status::{ShardStatus, Status};
    use crate::telemetry::{EngineGauges, Observed, ShardGauges};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let exchange = async {
            let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
            socket.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), exchange).await.unwrap()
    }

    #[tokio::test]
    async fn serves_metrics_statuses_and_probes() {
        let shard = ShardStatus {
            id: "10.0.0.1:6379".to_owned(),
            keys_applied: 7,
            lag_bytes: 11,
            lag_millis: 1500,
            ..ShardStatus::default()
        };
        let (status, status_seen) = watch::channel(Status { shards: vec![shard], ..Status::default() });
        let gauges = ShardGauges { id: "10.0.0.1:6379".to_owned(), batches: 3, ..ShardGauges::default() };
        let (_gauges, gauges_seen) = watch::channel(EngineGauges { shards: vec![gauges] });
        let observed = Observed {
            name: "orders".to_owned(),
            namespace: "shop".to_owned(),
            status: status_seen,
            gauges: gauges_seen,
        };
        let endpoints = Endpoints::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = endpoints.address();
        assert_ne!(address.port(), 0);
        let (stop, stop_seen) = watch::channel(false);
        let server = tokio::spawn(endpoints.serve(observed.into(), stop_seen));

        assert!(fetch(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let unready = fetch(address, "/readyz").await;
        assert!(unready.starts_with("HTTP/1.1 503") && unready.ends_with("orders: Pending\n"), "{unready}");
        status.send_modify(|status| status.phase = Phase::IncrementalSync);
        assert!(fetch(address, "/readyz").await.starts_with("HTTP/1.1 200"));

        let metrics = fetch(address, "/metrics").await;
        let labels = r#"namespace="shop",migration="orders",shard="10.0.0.1:6379""#;
        for line in [
            format!("redis_migration_keys_applied_total{{{labels}}} 7"),
            format!("redis_migration_lag_bytes{{{labels}}} 11"),
            format!("redis_migration_lag_milliseconds{{{labels}}} 1500"),
            format!("redis_migration_lag_seconds{{{labels}}} 1.5"),
            format!("redis_migration_batches_total{{{labels}}} 3"),
            r#"redis_migration_phase{namespace="shop",migration="orders",phase="IncrementalSync"} 1"#
                .to_owned(),
            r#"redis_migration_phase{namespace="shop",migration="orders",phase="Pending"} 0"#.to_owned(),
        ] {
            assert!(metrics.contains(&format!("\n{line}\n")), "{line} not in:\n{metrics}");
        }

        let statuses = fetch(address, "/metric").await;
        let body = statuses.split("\r\n\r\n").nth(1).unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body[0]["name"], "orders");
        assert_eq!(body[0]["namespace"], "shop");
        assert_eq!(body[0]["status"]["shards"][0]["lagBytes"], 11);

        stop.send(true).unwrap();
        tokio::time::timeout(std::time::Duration::from_secs(10), server).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_taken_port_is_told() {
        let first = Endpoints::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let error = Endpoints::bind(first.address()).await.err().unwrap().to_string();
        assert!(error.contains(&first.address().to_string()) && error.contains("port 0"), "{error}");
    }
}
