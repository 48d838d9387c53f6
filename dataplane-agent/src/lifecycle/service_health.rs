//! `healthCheckNodePort`: a load balancer asks every node whether it has endpoints of a service whose policy is Local, and
//! sends its packets only to those that do.
//!
//! Same code, headers and body as kube-proxy's (`pkg/proxy/healthcheck/service_health.go`). Owns a listener for each port;
//! who has endpoints comes from the task that owns the state.

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
    proxy_health::{Shared, is_healthy},
};
use crate::state::NamespacedName;

/// A port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(5);
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is answered for a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Endpoints on this node that are ready.
    pub endpoints: usize,
}

/// Those of all services that have one.
pub type HealthChecks = Arc<BTreeMap<NamespacedName, HealthCheck>>;

/// Answers at the ports as they come and go, until nobody tells of them any more.
pub(super) async fn answer(
    mut checks: watch::Receiver<HealthChecks>,
    lag: Shared,
    node_problems: NodeProblems,
) {
    let mut listening: BTreeMap<u16, JoinHandle<()>> = BTreeMap::new();
    loop {
        let wanted = Arc::clone(&checks.borrow_and_update());
        listening.retain(|port, server| {
            let stays = wanted.values().any(|check| check.port == *port);
            if !stays {
                server.abort();
            }
            stays
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
                            tracing::error!(%error, "health check of a service: stopped");
                        }
                    };
                    listening.insert(*port, tokio::spawn(server));
                }
                Err(error) => problems.push(problem(
                    &format!("Service {name}"),
                    format!("spec.healthCheckNodePort: {port} cannot be listened on: {error}"),
                )),
            }
        }
        let again = !problems.is_empty();
        node_problems.set("health_checks", problems);
        tokio::select! {
            changed = checks.changed() => if changed.is_err() { return std::future::pending().await },
            () = sleep(RETRY), if again => {}
        }
    }
}

/// On every address of both families, as far as the node has both.
async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))).await
        }
        done => done,
    }
}

/// The port, what is known, and whether the tables follow it.
type Asked = (u16, watch::Receiver<HealthChecks>, Shared);

async fn check(State((port, checks, lag)): State<Asked>) -> Response {
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

    /// A port nobody listens on.
    fn free() -> u16 {
        std::net::TcpListener::bind(("::", 0)).unwrap().local_addr().unwrap().port()
    }

    async fn ask(port: u16) -> Option<String> {
        ask_at("127.0.0.1", port).await
    }

    async fn ask_at(address: &str, port: u16) -> Option<String> {
        let mut stream = tokio::net::TcpStream::connect((address, port)).await.ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    async fn until(port: u16, what: &str, good: impl Fn(Option<&str>) -> bool) {
        for _ in 0..500 {
            if good(ask(port).await.as_deref()) {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?}", ask(port).await);
    }

    #[tokio::test]
    async fn a_port_answers_for_its_service_as_long_as_there_is_one() {
        let (one, other) = (free(), free());
        let (sender, receiver) = watch::channel(checks(&[("web", one, 2)]));
        let (node_problems, problems) = NodeProblems::new();
        tokio::spawn(answer(receiver, Shared::default(), node_problems));
        until(one, "an answer", |answer| answer.is_some()).await;
        let said = ask(one).await.unwrap();
        assert!(said.starts_with("HTTP/1.0 200 "), "{said}");
        assert!(said.contains("x-load-balancing-endpoint-weight: 2\r\n"), "{said}");
        assert!(
            said.ends_with(
                "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\
                 \"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
            ),
            "{said}"
        );
        sender.send_replace(checks(&[("web", one, 0), ("too", other, 1)]));
        until(other, "the other service", |answer| answer.is_some()).await;
        let said = ask(one).await.unwrap();
        assert!(said.starts_with("HTTP/1.0 503 "), "without endpoints: {said}");
        sender.send_replace(checks(&[("too", other, 1)]));
        until(one, "nobody", |answer| answer.is_none()).await;
        assert!(problems.now().is_empty());
    }

    /// kube-proxy's `hcHandler.ServeHTTP`: the number of endpoints is told whatever the code is.
    #[tokio::test]
    async fn an_answer_is_kube_proxys_over_both_families() {
        let port = free();
        let (sender, receiver) = watch::channel(checks(&[("web", port, 2)]));
        let (node_problems, _problems) = NodeProblems::new();
        let lag = Shared::default();
        tokio::spawn(answer(receiver, Arc::clone(&lag), node_problems));
        until(port, "an answer", |answer| answer.is_some()).await;
        for (endpoints, late, code) in [(2, false, 200), (0, false, 503), (2, true, 503), (0, true, 503)] {
            sender.send_replace(checks(&[("web", port, endpoints)]));
            *lag.lock().unwrap() = if late { Lag::late() } else { Lag::default() };
            for address in ["127.0.0.1", "::1"] {
                let said = ask_at(address, port).await.unwrap();
                assert!(said.starts_with(&format!("HTTP/1.0 {code} ")), "{said}");
                for header in [
                    "content-type: application/json",
                    "x-content-type-options: nosniff",
                    format!("x-load-balancing-endpoint-weight: {endpoints}").as_str(),
                ] {
                    assert!(said.lines().any(|line| line == header), "{header}: {said}");
                }
                let body =
                    format!("\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {}\n}}", !late);
                assert!(said.ends_with(&body), "{said}");
            }
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_named_with_its_service() {
        let taken = std::net::TcpListener::bind(("::", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let (_sender, receiver) = watch::channel(checks(&[("web", port, 2)]));
        let (node_problems, mut problems) = NodeProblems::new();
        tokio::spawn(answer(receiver, Shared::default(), node_problems));
        problems.changed().await;
        let problem = &problems.now()[0];
        assert_eq!(problem.subject, "Service default/web");
        assert!(problem.message.starts_with(&format!("spec.healthCheckNodePort: {port} cannot")));
    }
}
