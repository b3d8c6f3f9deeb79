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

use super::{Observed, StatusLine, metrics};
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
    pub async fn serve(
        self,
        migrations: Vec<Observed>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<(), HttpError> {
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        axum::serve(self.listener, router(migrations))
            .with_graceful_shutdown(stopped)
            .await
            .map_err(HttpError::Serve)
    }
}

struct Shown {
    migrations: Vec<Observed>,
    registry: Registry,
}

fn router(migrations: Vec<Observed>) -> Router {
    let registry = metrics::registry(migrations.clone());
    Router::new()
        .route("/metrics", get(prometheus))
        .route("/metric", get(statuses))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(Arc::new(Shown { migrations, registry }))
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
        .iter()
        .map(|migration| {
            let status = migration.status.borrow();
            StatusLine { name: &migration.name, namespace: &migration.namespace, status: &status }.to_json()
        })
        .collect();
    ([(header::CONTENT_TYPE, "application/json")], format!("[{}]\n", lines.join(","))).into_response()
}

/// Ready once preflight is over and for as long as nothing has failed.
async fn ready(State(shown): State<Arc<Shown>>) -> Response {
    let unready = shown.migrations.iter().find_map(|migration| match migration.status.borrow().phase {
        phase @ (Phase::Pending | Phase::Preflight | Phase::Failed) => Some((&migration.name, phase)),
        _ => None,
    });
    match unready {
        Some((name, phase)) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{name}: {}\n", phase.as_str())).into_response()
        }
        None => "ok\n".into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status::{ShardStatus, Status};
    use crate::telemetry::{EngineGauges, ShardGauges};
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
        let server = tokio::spawn(endpoints.serve(vec![observed], stop_seen));

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
