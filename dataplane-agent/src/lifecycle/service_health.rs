//! `healthCheckNodePort`: load balancers probe every node for local endpoints of a Service with
//! traffic policy Local.
//!
//! Same codes, headers and body as kube-proxy's (`pkg/proxy/healthcheck/service_health.go`). Owns a
//! listener per port; the node task publishes the numbers of local endpoints.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::sleep};

use super::{
    problems::{NodeProblems, problem},
    proxy_health::{SharedLag, is_healthy},
};
use crate::state::NamespacedName;

/// Wait before a port in use is tried again.
const RETRY: Duration = Duration::from_secs(5);
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The health check of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node.
    pub endpoints: usize,
}

/// Health checks by service.
pub type HealthChecks = Arc<BTreeMap<NamespacedName, HealthCheck>>;

/// Serves every health check port; opens and closes listeners as `checks` changes.
pub(super) async fn serve(
    mut checks: watch::Receiver<HealthChecks>,
    lag: SharedLag,
    node_problems: NodeProblems,
) {
    let mut listening: BTreeMap<u16, JoinHandle<()>> = BTreeMap::new();
    loop {
        let wanted = Arc::clone(&checks.borrow_and_update());
        listening.retain(|port, server| {
            let is_wanted = wanted.values().any(|check| check.port == *port);
            if !is_wanted {
                server.abort();
            }
            is_wanted
        });
        let mut problems = Vec::new();
        for (name, HealthCheck { port, .. }) in wanted.iter() {
            if listening.contains_key(port) {
                continue;
            }
            match listen(*port).await {
                Ok(listener) => {
                    let router =
                        Router::new().fallback(check).with_state((*port, checks.clone(), Arc::clone(&lag)));
                    let server = async move {
                        if let Err(error) = axum::serve(listener, router).await {
                            tracing::error!(%error, "health check server of a Service stopped");
                        }
                    };
                    listening.insert(*port, tokio::spawn(server));
                }
                Err(error) => problems.push(problem(
                    &format!("Service {name}"),
                    format!("spec.healthCheckNodePort: cannot listen on port {port}, retrying: {error}"),
                )),
            }
        }
        let must_retry = !problems.is_empty();
        node_problems.set("health_checks", problems);
        tokio::select! {
            changed = checks.changed() => if changed.is_err() { return std::future::pending().await },
            () = sleep(RETRY), if must_retry => {}
        }
    }
}

/// Listens on all addresses of both families, or of IPv4 if the node has no IPv6.
async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))).await
        }
        done => done,
    }
}

/// State of the handler of one port.
type HandlerState = (u16, watch::Receiver<HealthChecks>, SharedLag);

async fn check(State((port, checks, lag)): State<HandlerState>) -> Response {
    let checks = Arc::clone(&checks.borrow());
    let Some((name, check)) = checks.iter().find(|(_, check)| check.port == port) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let healthy = is_healthy(&lag);
    let code = if healthy && check.endpoints > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (WEIGHT, check.endpoints.to_string()),
    ];
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\t\"localEndpoints\": \
         {},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
        name.namespace, name.name, check.endpoints
    );
    (code, headers, Body::from(body)).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::lifecycle::proxy_health::Lag;

    fn checks(entries: &[(&str, u16, usize)]) -> HealthChecks {
        let entries = entries.iter().map(|(name, port, endpoints)| {
            let name = NamespacedName { namespace: "default".into(), name: (*name).into() };
            (name, HealthCheck { port: *port, endpoints: *endpoints })
        });
        Arc::new(entries.collect())
    }

    /// A free port.
    fn free_port() -> u16 {
        std::net::TcpListener::bind(("::", 0)).unwrap().local_addr().unwrap().port()
    }

    async fn probe(port: u16) -> Option<String> {
        probe_at("127.0.0.1", port).await
    }

    async fn probe_at(address: &str, port: u16) -> Option<String> {
        let mut stream = tokio::net::TcpStream::connect((address, port)).await.ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    async fn until(port: u16, what: &str, good: impl Fn(Option<&str>) -> bool) {
        for _ in 0..500 {
            if good(probe(port).await.as_deref()) {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?}", probe(port).await);
    }

    #[tokio::test]
    async fn port_is_served_while_its_service_exists() {
        let (one, other) = (free_port(), free_port());
        let (sender, receiver) = watch::channel(checks(&[("web", one, 2)]));
        let (node_problems, problems) = NodeProblems::new();
        tokio::spawn(serve(receiver, SharedLag::default(), node_problems));
        until(one, "an answer", |answer| answer.is_some()).await;
        let response = probe(one).await.unwrap();
        assert!(response.starts_with("HTTP/1.0 200 "), "{response}");
        assert!(response.contains("x-load-balancing-endpoint-weight: 2\r\n"), "{response}");
        assert!(
            response.ends_with(
                "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\
                 \"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
            ),
            "{response}"
        );
        sender.send_replace(checks(&[("web", one, 0), ("too", other, 1)]));
        until(other, "the other service", |answer| answer.is_some()).await;
        let response = probe(one).await.unwrap();
        assert!(response.starts_with("HTTP/1.0 503 "), "without endpoints: {response}");
        sender.send_replace(checks(&[("too", other, 1)]));
        until(one, "no server", |answer| answer.is_none()).await;
        assert!(problems.now().is_empty());
    }

    /// kube-proxy's `hcHandler.ServeHTTP`: the weight header has the number of endpoints for every
    /// code.
    #[tokio::test]
    async fn answer_equals_kube_proxys_over_both_families() {
        let port = free_port();
        let (sender, receiver) = watch::channel(checks(&[("web", port, 2)]));
        let (node_problems, _problems) = NodeProblems::new();
        let lag = SharedLag::default();
        tokio::spawn(serve(receiver, Arc::clone(&lag), node_problems));
        until(port, "an answer", |answer| answer.is_some()).await;
        for (endpoints, late, code) in [(2, false, 200), (0, false, 503), (2, true, 503), (0, true, 503)] {
            sender.send_replace(checks(&[("web", port, endpoints)]));
            *lag.lock().unwrap() = if late { Lag::late() } else { Lag::default() };
            for address in ["127.0.0.1", "::1"] {
                let response = probe_at(address, port).await.unwrap();
                assert!(response.starts_with(&format!("HTTP/1.0 {code} ")), "{response}");
                for header in [
                    "content-type: application/json",
                    "x-content-type-options: nosniff",
                    format!("x-load-balancing-endpoint-weight: {endpoints}").as_str(),
                ] {
                    assert!(response.lines().any(|line| line == header), "{header}: {response}");
                }
                let body =
                    format!("\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {}\n}}", !late);
                assert!(response.ends_with(&body), "{response}");
            }
        }
    }

    #[tokio::test]
    async fn port_in_use_is_reported_with_its_service() {
        let taken = std::net::TcpListener::bind(("::", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let (_sender, receiver) = watch::channel(checks(&[("web", port, 2)]));
        let (node_problems, mut problems) = NodeProblems::new();
        tokio::spawn(serve(receiver, SharedLag::default(), node_problems));
        problems.changed().await;
        let problem = &problems.now()[0];
        assert_eq!(problem.subject, "Service default/web");
        assert!(
            problem.message.starts_with(&format!("spec.healthCheckNodePort: cannot listen on port {port}"))
        );
    }
}
