//! The CLI's side of the local API: blocking, one request per connection.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::api::request::{EventLine, View};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no agent answers on {socket}: {reason} (is it running? is its run_dir another one? see --socket)"
    )]
    Down { socket: PathBuf, reason: &'static str },
    #[error("socket {socket}: permission denied (only root may ask the agent)")]
    Denied { socket: PathBuf },
    #[error("socket {socket}: {source}")]
    Io { socket: PathBuf, source: io::Error },
    #[error("the agent closed the connection without an answer")]
    NoAnswer,
    #[error("the agent went away")]
    Gone,
    #[error("agent: {0}")]
    Agent(String),
    #[error("the agent's answer is not understood (is it of another version?): {0}")]
    Answer(#[from] serde_json::Error),
}

/// A connection to the agent.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

/// How the agent answers a view.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Result(Value),
    Error(String),
}

impl Client {
    pub(super) fn connect(socket: &Path) -> Result<Self, ClientError> {
        let down = |reason| ClientError::Down { socket: socket.to_owned(), reason };
        match UnixStream::connect(socket) {
            Ok(stream) => Ok(Self { socket: socket.to_owned(), stream: BufReader::new(stream) }),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::NotFound => down("there is no such socket"),
                io::ErrorKind::ConnectionRefused => down("nobody listens"),
                io::ErrorKind::PermissionDenied => ClientError::Denied { socket: socket.to_owned() },
                _ => ClientError::Io { socket: socket.to_owned(), source: error },
            }),
        }
    }

    /// The answer as the agent wrote it.
    pub(super) fn ask(mut self, view: &View) -> Result<Value, ClientError> {
        self.send(view)?;
        match serde_json::from_str(&self.line()?.ok_or(ClientError::NoAnswer)?)? {
            Reply::Result(value) => Ok(value),
            Reply::Error(message) => Err(ClientError::Agent(message)),
        }
    }

    /// Hands each line to `take` until there are no more, or `take` says that it has had enough.
    pub(super) fn stream(
        mut self,
        view: &View,
        mut take: impl FnMut(EventLine) -> io::Result<()>,
    ) -> Result<(), ClientError> {
        self.send(view)?;
        while let Some(line) = self.line()? {
            match parse(&line)? {
                EventLine::End => return Ok(()),
                line => take(line).map_err(|source| self.failed(source))?,
            }
        }
        Err(ClientError::Gone)
    }

    fn send(&mut self, view: &View) -> Result<(), ClientError> {
        let mut line = serde_json::to_vec(view)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|source| self.failed(source))
    }

    fn line(&mut self) -> Result<Option<String>, ClientError> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).map_err(|source| self.failed(source))?;
        Ok((read != 0).then_some(line))
    }

    fn failed(&self, source: io::Error) -> ClientError {
        ClientError::Io { socket: self.socket.clone(), source }
    }
}

/// A line of a stream, or the error that came instead.
fn parse<T: DeserializeOwned>(line: &str) -> Result<T, ClientError> {
    match serde_json::from_str(line) {
        Ok(item) => Ok(item),
        Err(problem) => match serde_json::from_str(line) {
            Ok(Reply::Error(message)) => Err(ClientError::Agent(message)),
            _ => Err(problem.into()),
        },
    }
}
