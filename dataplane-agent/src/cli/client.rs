//! Client of the local API: blocking, one request per connection.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::api::request::{EventLine, View};

/// Error of a request to the agent.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "cannot connect to the agent at {socket}: {reason}; check that it runs, and --socket against its run_dir"
    )]
    Down { socket: PathBuf, reason: &'static str },
    #[error("cannot connect to the agent at {socket}: permission denied; run the command as root")]
    Denied { socket: PathBuf },
    #[error("connection to the agent at {socket} failed: {source}")]
    Io { socket: PathBuf, source: io::Error },
    #[error("the agent closed the connection without an answer")]
    NoAnswer,
    #[error("the agent closed the connection before the end of the stream; it may have been restarted")]
    Gone,
    #[error("the agent returned an error: {0}")]
    Agent(String),
    #[error("cannot read the agent's answer; it may have another version than this command: {0}")]
    Answer(#[from] serde_json::Error),
}

/// A connection to the agent.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

/// Form of an answer.
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
                io::ErrorKind::NotFound => down("the socket does not exist"),
                io::ErrorKind::ConnectionRefused => down("connection refused"),
                io::ErrorKind::PermissionDenied => ClientError::Denied { socket: socket.to_owned() },
                _ => ClientError::Io { socket: socket.to_owned(), source: error },
            }),
        }
    }

    /// Sends a request and returns its answer.
    pub(super) fn request(mut self, view: &View) -> Result<Value, ClientError> {
        self.send(view)?;
        match serde_json::from_str(&self.line()?.ok_or(ClientError::NoAnswer)?)? {
            Reply::Result(value) => Ok(value),
            Reply::Error(message) => Err(ClientError::Agent(message)),
        }
    }

    /// Passes each line to `on_line` until the stream ends or `on_line` fails.
    pub(super) fn stream(
        mut self,
        view: &View,
        mut on_line: impl FnMut(EventLine) -> io::Result<()>,
    ) -> Result<(), ClientError> {
        self.send(view)?;
        while let Some(line) = self.line()? {
            match parse(&line)? {
                EventLine::End => return Ok(()),
                line => on_line(line).map_err(|source| self.failed(source))?,
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

/// Parses a line of a stream, which may be an error.
fn parse<T: DeserializeOwned>(line: &str) -> Result<T, ClientError> {
    match serde_json::from_str(line) {
        Ok(item) => Ok(item),
        Err(problem) => match serde_json::from_str(line) {
            Ok(Reply::Error(message)) => Err(ClientError::Agent(message)),
            _ => Err(problem.into()),
        },
    }
}
