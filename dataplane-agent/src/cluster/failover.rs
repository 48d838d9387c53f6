//! A client that sends to one of several servers, and to the next when that one fails.
//!
//! A request that never reached a server, or that only reads, is sent to the next at once: its sender sees no failure
//! as long as one server works. What might have been done is not done twice. The server that worked last is asked
//! first, by everyone who shares the client.

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

/// A server in the same site answers a SYN in microseconds, one far away in a fifth of a second.
const CONNECT: Duration = Duration::from_secs(2);
/// A server that is there, but does not begin to answer. Not the whole answer: a watch goes on for minutes.
const RESPONSE: Duration = Duration::from_secs(15);
/// A machine that died sends nothing, not even a reset: what we send is acknowledged within this time...
const UNACKNOWLEDGED: Duration = Duration::from_secs(6);
/// ...and where we send nothing, because we watch, the kernel asks after this time,
const KEEPALIVE: Duration = Duration::from_secs(5);
/// as often as this,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// until so many went unanswered.
const KEEPALIVE_RETRIES: u32 = 3;
/// Thousands of agents lose the same server in the same moment: each waits up to this long before it goes on.
const SPREAD: Duration = Duration::from_millis(200);

/// What becomes of the way to the servers, for those who show it.
#[derive(Clone, Debug, Default)]
pub struct FailoverStats(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    failovers: AtomicU64,
}

impl FailoverStats {
    /// How often another server was taken.
    pub fn failovers(&self) -> u64 {
        self.0.failovers.load(Ordering::Relaxed)
    }
}

/// No server could be asked.
#[derive(Debug, thiserror::Error)]
pub struct Unreachable {
    /// Each that was tried, in this order, with what went wrong.
    pub tried: Vec<(Uri, String)>,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no API server can be asked: ")?;
        for (index, (url, reason)) in self.tried.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{url} ({reason})")?;
        }
        Ok(())
    }
}

/// A client of all `urls`, with the credentials of `config`.
pub(super) fn client(
    config: &kube::Config,
    urls: Vec<Uri>,
    failover_stats: &FailoverStats,
) -> Result<kube::Client, ClusterError> {
    let namespace = config.default_namespace.clone();
    let servers = urls.into_iter().map(|url| Server::new(config, url)).collect::<Result<Vec<_>, _>>()?;
    // not all agents of a cluster begin with the same server
    let first = AtomicUsize::new(random() as usize % servers.len().max(1));
    let servers = Arc::new(Servers { all: servers, current: first, failover_stats: failover_stats.clone() });
    let service = tower::service_fn(move |request| Arc::clone(&servers).send(request));
    Ok(ClientBuilder::new(service, namespace).build())
}

#[derive(Debug)]
struct Servers {
    all: Vec<Server>,
    /// Index of the server that is asked first.
    current: AtomicUsize,
    failover_stats: FailoverStats,
}

struct Server {
    url: Uri,
    client: kube::Client,
}

/// What came of sending a request to a server.
struct Failure {
    reason: String,
    /// The server cannot have seen the request.
    unsent: bool,
    /// What to say if there is no other server to ask.
    error: Option<kube::Error>,
}

impl Servers {
    async fn send(self: Arc<Self>, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
        let (parts, body) = request.into_parts();
        let reads = matches!(parts.method, Method::GET | Method::HEAD);
        let mut body = Some(body);
        let mut tried = Vec::new();
        loop {
            let index = self.current.load(Ordering::Relaxed);
            let server = &self.all[index];
            let again = body.as_ref().and_then(Body::try_clone);
            let Some(this_time) = body.take() else { break };
            let failure = match server.send(Request::from_parts(parts.clone(), this_time)).await {
                // the server says that it is in trouble: its sender hears that, and everyone asks another next time
                Ok(response) if response.status().is_server_error() => {
                    self.leave(index, &response.status());
                    return Ok(response);
                }
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            self.leave(index, &failure.reason);
            let (unsent, error) = (failure.unsent, failure.error);
            tried.push((server.url.clone(), failure.reason));
            if tried.len() >= self.all.len() || !(unsent || reads) {
                // what is wrong with us, and with no server, is said as it is
                if let Some(error) = error {
                    return Err(error);
                }
                break;
            }
            body = again;
            tokio::time::sleep(SPREAD.mul_f64(fraction())).await;
        }
        Err(kube::Error::Service(Box::new(Unreachable { tried })))
    }

    /// Asks another server from now on, unless someone else has seen to that already.
    fn leave(&self, index: usize, reason: &dyn fmt::Display) {
        let next = (index + 1) % self.all.len();
        let left = next != index
            && self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if left {
            self.failover_stats.0.failovers.fetch_add(1, Ordering::Relaxed);
            let (from, to) = (&self.all[index].url, &self.all[next].url);
            tracing::warn!(%from, %to, %reason, "API server fails: going to the next");
        }
    }
}

impl Server {
    fn new(config: &kube::Config, url: Uri) -> Result<Self, ClusterError> {
        let wrong = |source| ClusterError::Client { url: url.clone(), source: Box::new(source) };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        let connector = config.rustls_https_connector_with_connector(tcp).map_err(wrong)?;
        let http = Builder::new(TokioExecutor::new()).build::<_, Body>(connector).map_err(BoxError::from);
        let base = BaseUriLayer::new(url.clone());
        let builder = ClientBuilder::new(http, config.default_namespace.clone())
            .with_layer(&config.extra_headers_layer().map_err(wrong)?);
        let client = match config.auth_layer().map_err(wrong)? {
            Some(auth) => builder.with_layer(&auth).with_layer(&base).build(),
            None => builder.with_layer(&base).build(),
        };
        Ok(Self { url, client })
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Failure> {
        let Ok(sent) = tokio::time::timeout(RESPONSE, self.client.send(request)).await else {
            let reason = format!("no answer within {} s", RESPONSE.as_secs());
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

/// The last cause, which is the one that says something: "connection refused", not "client error (Connect)".
pub(super) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Good enough to keep agents apart; nothing depends on nobody guessing it.
fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// 0 to 1.
fn fraction() -> f64 {
    f64::from(random() as u32) / f64::from(u32::MAX)
}
