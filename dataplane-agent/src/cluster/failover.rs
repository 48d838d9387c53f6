//! A client of several API servers that switches to the next when one fails.
//!
//! A request that never reached a server, or that only reads, is sent to the next at once: its
//! sender sees no failure while one server works. A request that may have been executed is not
//! repeated. All users of the client share the current server.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Method, Request, Response, Uri};
use hyper_util::{
    client::legacy::{Builder, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::client::{Body, ClientBuilder, ConfigExt as _, middleware::BaseUriLayer};
use tower::{BoxError, ServiceExt as _};

use super::ClusterError;

/// Connect timeout. A near server answers a SYN in microseconds, a far one within 200 ms.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout until the response starts; the response itself may be a watch of many minutes.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);
/// A dead machine sends no reset: unacknowledged data fails the connection after this time...
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(6);
/// ...and an idle connection, such as a watch, is probed after this time,
const KEEPALIVE: Duration = Duration::from_secs(5);
/// at this interval,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// until this many probes were unanswered.
const KEEPALIVE_RETRIES: u32 = 3;
/// Many agents lose the same server at once: each waits a random time up to this before it
/// switches.
const SWITCH_DELAY_MAX: Duration = Duration::from_millis(200);

/// Counters of the client, for the metrics.
#[derive(Clone, Debug, Default)]
pub struct FailoverStats(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    failovers: AtomicU64,
}

impl FailoverStats {
    /// Number of switches to another server.
    pub fn failovers(&self) -> u64 {
        self.0.failovers.load(Ordering::Relaxed)
    }
}

/// No server could be reached.
#[derive(Debug, thiserror::Error)]
pub struct Unreachable {
    /// The servers tried, in order, each with the error.
    pub tried: Vec<(Uri, String)>,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot reach any API server: ")?;
        for (index, (url, reason)) in self.tried.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{url} ({reason})")?;
        }
        Ok(())
    }
}

/// Creates a client of all `urls` with the credentials of `config`.
pub(super) fn client(
    config: &kube::Config,
    urls: Vec<Uri>,
    failover_stats: &FailoverStats,
) -> Result<kube::Client, ClusterError> {
    let namespace = config.default_namespace.clone();
    let servers = urls.into_iter().map(|url| Server::new(config, url)).collect::<Result<Vec<_>, _>>()?;
    // spread agents over servers
    let first = AtomicUsize::new(random() as usize % servers.len().max(1));
    let servers = Arc::new(Servers { all: servers, current: first, failover_stats: failover_stats.clone() });
    let service = tower::service_fn(move |request| Arc::clone(&servers).send(request));
    Ok(ClientBuilder::new(service, namespace).build())
}

#[derive(Debug)]
struct Servers {
    all: Vec<Server>,
    /// Index of the server to use.
    current: AtomicUsize,
    failover_stats: FailoverStats,
}

struct Server {
    url: Uri,
    client: kube::Client,
}

/// A failed attempt to send a request to a server.
struct Failure {
    reason: String,
    /// The server cannot have received the request.
    unsent: bool,
    /// The error to return if there is no other server.
    error: Option<kube::Error>,
}

impl Servers {
    async fn send(self: Arc<Self>, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
        let (parts, body) = request.into_parts();
        let is_read = matches!(parts.method, Method::GET | Method::HEAD);
        let mut body = Some(body);
        let mut tried = Vec::new();
        loop {
            let index = self.current.load(Ordering::Relaxed);
            let server = &self.all[index];
            let retry_body = body.as_ref().and_then(Body::try_clone);
            let Some(current_body) = body.take() else { break };
            let failure = match server.send(Request::from_parts(parts.clone(), current_body)).await {
                // the server is failing: return its response, and use another server next time
                Ok(response) if response.status().is_server_error() => {
                    self.switch_from(index, &response.status());
                    return Ok(response);
                }
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            self.switch_from(index, &failure.reason);
            let (unsent, error) = (failure.unsent, failure.error);
            tried.push((server.url.clone(), failure.reason));
            if tried.len() >= self.all.len() || !(unsent || is_read) {
                // return a local error as it is
                if let Some(error) = error {
                    return Err(error);
                }
                break;
            }
            body = retry_body;
            tokio::time::sleep(SWITCH_DELAY_MAX.mul_f64(fraction())).await;
        }
        Err(kube::Error::Service(Box::new(Unreachable { tried })))
    }

    /// Switches to the next server, unless another request already did.
    fn switch_from(&self, index: usize, reason: &dyn fmt::Display) {
        let next = (index + 1) % self.all.len();
        let switched = next != index
            && self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if switched {
            self.failover_stats.0.failovers.fetch_add(1, Ordering::Relaxed);
            let (from, to) = (&self.all[index].url, &self.all[next].url);
            tracing::warn!(%from, %to, %reason, "API server failed; switching to the next");
        }
    }
}

impl Server {
    fn new(config: &kube::Config, url: Uri) -> Result<Self, ClusterError> {
        let invalid = |source| ClusterError::Client { url: url.clone(), source: Box::new(source) };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        let connector = config.rustls_https_connector_with_connector(tcp).map_err(invalid)?;
        let http = Builder::new(TokioExecutor::new()).build::<_, Body>(connector).map_err(BoxError::from);
        let base = BaseUriLayer::new(url.clone());
        let builder = ClientBuilder::new(http, config.default_namespace.clone())
            .with_layer(&config.extra_headers_layer().map_err(invalid)?);
        let client = match config.auth_layer().map_err(invalid)? {
            Some(auth) => builder.with_layer(&auth).with_layer(&base).build(),
            None => builder.with_layer(&base).build(),
        };
        Ok(Self { url, client })
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Failure> {
        let Ok(sent) = tokio::time::timeout(RESPONSE_TIMEOUT, self.client.send(request)).await else {
            let reason = format!("no response within {} s", RESPONSE_TIMEOUT.as_secs());
            return Err(Failure { reason, unsent: false, error: None });
        };
        sent.map_err(|error| match http_error(&error) {
            Some(http) => {
                let (reason, unsent) = (innermost(http), http.is_connect());
                Failure { reason, unsent, error: None }
            }
            None => Failure { reason: innermost(&error), unsent: true, error: Some(error) },
        })
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.url)
    }
}

fn http_error(error: &kube::Error) -> Option<&hyper_util::client::legacy::Error> {
    match error {
        kube::Error::Service(error) => error.downcast_ref(),
        _ => None,
    }
}

/// The innermost cause, the most specific one: "connection refused", not "client error (Connect)".
pub(super) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Good enough to spread agents; not for security.
fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// 0 to 1.
fn fraction() -> f64 {
    f64::from(random() as u32) / f64::from(u32::MAX)
}
