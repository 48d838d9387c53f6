//! An HTTP server for probes and metrics on its own thread and runtime, independent of the main
//! runtime.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    thread,
};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde_json::Value;

/// Error while the HTTP server starts.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("cannot listen on http://{address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot start the HTTP server thread: {0}")]
    Thread(#[source] io::Error),
}

/// Serves `router` on `address` until the process ends, and runs `background` on the same runtime.
/// Returns the bound address.
pub fn serve(
    address: SocketAddr,
    router: Router,
    background: impl Future<Output = ()> + Send + 'static,
) -> Result<SocketAddr, HttpError> {
    let listen = |source| HttpError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(HttpError::Thread)?;
    let server = async move {
        tokio::spawn(background);
        let listener = tokio::net::TcpListener::from_std(listener)?;
        axum::serve(listener, router).await
    };
    thread::Builder::new()
        .name("http".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(server) {
                tracing::error!(%error, "HTTP server on {bound} stopped; restart the process to get it back");
            }
        })
        .map_err(HttpError::Thread)?;
    Ok(bound)
}

/// The answer to a probe: 200 or 503, with `body` as JSON.
pub fn probe_response(ok: bool, body: &Value) -> Response {
    let code = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, [(header::CONTENT_TYPE, "application/json")], Body::from(format!("{body}\n"))).into_response()
}

/// Metrics in the OpenMetrics text format.
pub fn openmetrics(text: String) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

/// An internal error.
pub fn failure(what: &str, error: &dyn std::fmt::Display) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{what}: {error}\n")).into_response()
}
