//! One question to the agent: a Unix socket, a line each way. Knows no CNI.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

use crate::protocol::{Request, Response};

/// For the agent to answer. Runtimes give up after a few minutes; who waits longer is not asked again.
const PATIENCE: Duration = Duration::from_mins(1);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the agent cannot be reached at {path}: {source}")]
    Connect { path: String, source: io::Error },
    #[error("the agent at {path} did not answer: {source}")]
    Exchange { path: String, source: io::Error },
    #[error("the agent at {path} went away before it answered")]
    Closed { path: String },
    /// The agent answers, but not to this.
    #[error("{0}")]
    Refused(String),
    #[error("the agent at {path} answered what this plugin does not understand: {detail}")]
    Answer { path: String, detail: String },
}

impl ClientError {
    /// There is no agent: not one that is busy, starting or out of reach for this user.
    pub fn is_nobody_there(&self) -> bool {
        let kinds = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        matches!(self, Self::Connect { source, .. } if kinds.contains(&source.kind()))
    }
}

/// Asks, and waits for the answer.
pub fn ask(socket: &Path, request: &Request) -> Result<Response, ClientError> {
    let path = || socket.display().to_string();
    let stream =
        UnixStream::connect(socket).map_err(|source| ClientError::Connect { path: path(), source })?;
    let line = exchange(stream, request).map_err(|source| ClientError::Exchange { path: path(), source })?;
    if line.is_empty() {
        return Err(ClientError::Closed { path: path() });
    }
    let answer = |detail: serde_json::Error| ClientError::Answer { path: path(), detail: detail.to_string() };
    let value: Value = serde_json::from_str(&line).map_err(answer)?;
    // what the agent says when it cannot even look at a request: it is starting, or does not serve this user
    if let Some(refusal) = value.get("error").and_then(Value::as_str) {
        return Err(ClientError::Refused(refusal.to_owned()));
    }
    serde_json::from_value(value).map_err(answer)
}

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<String> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}
