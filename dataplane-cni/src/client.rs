//! The client of the agent's Unix socket: one line of JSON each way. Knows nothing of CNI.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

use crate::protocol::{Request, Response};

/// How long to wait for the agent. Runtimes give up after a few minutes.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the agent cannot be reached at {path}: {source}")]
    Connect { path: String, source: io::Error },
    #[error("no response from the agent at {path}: {source}")]
    Exchange { path: String, source: io::Error },
    #[error("the agent at {path} closed the connection without a response")]
    Closed { path: String },
    /// The agent runs and refused the request, with this reason.
    #[error("the agent refused the request: {0}")]
    Refused(String),
    #[error(
        "the plugin cannot decode the response of the agent at {path}: {detail}; are both of the same version?"
    )]
    Response { path: String, detail: String },
}

impl ClientError {
    /// Whether no agent listens on the socket. An agent that is busy, starting, or not accessible
    /// for this user is not meant.
    pub fn agent_not_running(&self) -> bool {
        let kinds = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        matches!(self, Self::Connect { source, .. } if kinds.contains(&source.kind()))
    }
}

/// Sends a request and waits for the response.
pub fn call(socket: &Path, request: &Request) -> Result<Response, ClientError> {
    let path = || socket.display().to_string();
    let stream =
        UnixStream::connect(socket).map_err(|source| ClientError::Connect { path: path(), source })?;
    let line = exchange(stream, request).map_err(|source| ClientError::Exchange { path: path(), source })?;
    if line.is_empty() {
        return Err(ClientError::Closed { path: path() });
    }
    let invalid =
        |detail: serde_json::Error| ClientError::Response { path: path(), detail: detail.to_string() };
    let value: Value = serde_json::from_str(&line).map_err(invalid)?;
    // the agent refuses before it decodes a request: it is starting, or this user may not call it
    if let Some(refusal) = value.get("error").and_then(Value::as_str) {
        return Err(ClientError::Refused(refusal.to_owned()));
    }
    serde_json::from_value(value).map_err(invalid)
}

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<String> {
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut response = String::new();
    BufReader::new(stream).read_line(&mut response)?;
    Ok(response)
}
