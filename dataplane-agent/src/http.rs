//! HTTP for machines: a listener on a thread and runtime of its own, so that whoever is stuck elsewhere still answers,
//! and the forms of the answers.

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

/// Why there is no HTTP.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("http: listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("http: start its thread: {0}")]
    Thread(#[source] io::Error),
}

/// Answers on `address` until the process ends, and runs `beside` on the same runtime. Returns where: the kernel
/// chooses for port 0.
pub fn serve(
    address: SocketAddr,
    router: Router,
    beside: impl Future<Output = ()> + Send + 'static,
) -> Result<SocketAddr, HttpError> {
    let listen = |source| HttpError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(HttpError::Thread)?;
    let answer = async move {
        tokio::spawn(beside);
        let listener = tokio::net::TcpListener::from_std(listener)?;
        axum::serve(listener, router).await
    };
    thread::Builder::new()
        .name("http".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(answer) {
                tracing::error!(%error, "http: stopped");
            }
        })
        .map_err(HttpError::Thread)?;
    Ok(bound)
}

/// 200 if all is good, else 503, with the reasons.
pub fn judgement(good: bool, body: &Value) -> Response {
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, [(header::CONTENT_TYPE, "application/json")], Body::from(format!("{body}\n"))).into_response()
}

/// Metrics in the OpenMetrics text format.
pub fn openmetrics(text: String) -> Response {
    let form = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, form)], text).into_response()
}

/// What was asked for could not be made.
pub fn failure(what: &str, error: &dyn std::fmt::Display) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{what}: {error}\n")).into_response()
}
