//! The socket server: connections, request lines, limits. Requests are handled by
//! [`super::answer`].
//!
//! Every connection has its own task, and every wait for a client has a timeout: a client that
//! hangs blocks only its own connection. Only root and the user of the agent are accepted.

use std::{io, sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Semaphore,
    time::timeout,
};

use super::{
    answer::{Answer, Api},
    events::EventStream,
};

/// Limits of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest request line in bytes.
    pub line: u64,
    /// Most connections at a time.
    pub connections: usize,
    /// Longest wait for a request line, and for the client to read an answer line.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { line: 1 << 20, connections: 256, timeout: Duration::from_secs(30) }
    }
}

/// Error that closes a connection.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("cannot read the credentials of the client: {0}")]
    Credentials(#[source] io::Error),
    #[error("user {0} is not root: only root may use the API socket")]
    NotRoot(u32),
    #[error("the request line is longer than {0} bytes")]
    TooLong(u64),
    #[error("no complete request line within {0:?}")]
    RequestTimeout(Duration),
    #[error("the client did not read the answer within {0:?}")]
    AnswerTimeout(Duration),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, api: Arc<Api>, limits: Limits) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    loop {
        // at the limit, new connections wait in the kernel's queue
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let api = Arc::clone(&api);
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, &api, limits).await {
                        tracing::debug!(%error, "API socket: connection closed with an error");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                // out of file descriptors, or the client has gone: go on after a pause
                tracing::warn!(%error, "API socket: cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, api: &Arc<Api>, limits: Limits) -> Result<(), ConnectionError> {
    let user = stream.peer_cred().map_err(ConnectionError::Credentials)?.uid();
    let (reader, writer) = stream.into_split();
    let mut client = Client { reader: BufReader::new(reader), writer, limits };
    if user != 0 && user != nix::unistd::geteuid().as_raw() {
        return client.refuse(ConnectionError::NotRoot(user)).await;
    }
    loop {
        let line = match client.read_line().await {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) => return client.refuse(error).await,
        };
        match api.answer(&line).await {
            Answer::One(value) => client.write_line(&value).await?,
            Answer::Stream(stream) => return client.forward(stream).await,
        }
    }
}

struct Client {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    limits: Limits,
}

impl Client {
    /// The next request line without its newline; `None`: the client has closed the connection.
    async fn read_line(&mut self) -> Result<Option<Vec<u8>>, ConnectionError> {
        let Limits { line: limit, timeout: longest, .. } = self.limits;
        let mut line = Vec::new();
        // one byte more than allowed, to detect a line that is too long
        let mut allowed = (&mut self.reader).take(limit + 1);
        timeout(longest, allowed.read_until(b'\n', &mut line))
            .await
            .map_err(|_elapsed| ConnectionError::RequestTimeout(longest))??;
        if line.pop_if(|last| *last == b'\n').is_none() {
            if line.len() as u64 > limit {
                return Err(ConnectionError::TooLong(limit));
            }
            // end of file: a last line without a newline is a request, too
            return Ok(Some(line).filter(|line| !line.is_empty()));
        }
        Ok(Some(line))
    }

    async fn write_line(&mut self, value: &impl Serialize) -> Result<(), ConnectionError> {
        let mut line = serde_json::to_vec(value).map_err(io::Error::from)?;
        line.push(b'\n');
        let longest = self.limits.timeout;
        timeout(longest, self.writer.write_all(&line))
            .await
            .map_err(|_elapsed| ConnectionError::AnswerTimeout(longest))??;
        Ok(())
    }

    /// Sends the error to the client before the connection is closed.
    async fn refuse(&mut self, error: ConnectionError) -> Result<(), ConnectionError> {
        self.write_line(&super::answer::error(&error.to_string())).await?;
        Err(error)
    }

    /// Sends lines until the stream ends or the client disconnects.
    async fn forward(&mut self, mut stream: EventStream) -> Result<(), ConnectionError> {
        let mut ignored = [0; 64];
        loop {
            tokio::select! {
                // detects that the client has disconnected; input is ignored
                read = self.reader.read(&mut ignored) => if read? == 0 { return Ok(()) },
                line = stream.next() => match line {
                    Some(line) => self.write_line(&line).await?,
                    None => return Ok(()),
                }
            }
        }
    }
}
