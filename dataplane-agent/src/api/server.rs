//! The socket server: connections, lines, limits. What a line means is [`super::answer`]'s business.
//!
//! Every connection is a task of its own and every wait on a client has a limit, so that a client that hangs costs its
//! own connection and nothing else. Only root (and the user the agent runs as) is heard.

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

/// Limits on what a client may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request line.
    pub line: u64,
    /// Connections at a time.
    pub connections: usize,
    /// For a whole request line to arrive, and for a line of the answer to be taken.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { line: 1 << 20, connections: 256, patience: Duration::from_secs(30) }
    }
}

/// What ends a connection early.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("peer credentials: {0}")]
    Credentials(#[source] io::Error),
    #[error("user {0} is not root")]
    NotRoot(u32),
    #[error("the request line is longer than {0} bytes")]
    TooLong(u64),
    #[error("no whole request line within {0:?}")]
    Silent(Duration),
    #[error("the client did not take the answer within {0:?}")]
    Stuck(Duration),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, api: Arc<Api>, limits: Limits) {
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        // waiting for a place leaves newcomers in the kernel's queue; places come free, because patience ends
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let api = Arc::clone(&api);
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, &api, limits).await {
                        tracing::debug!(%error, "local API: connection ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // out of descriptors, or a client that went: neither is a reason to stop, nor to spin
                tracing::warn!(%error, "local API: accept");
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
    /// The next line without its end; `None`: the client has no more requests.
    async fn read_line(&mut self) -> Result<Option<Vec<u8>>, ConnectionError> {
        let Limits { line: limit, patience, .. } = self.limits;
        let mut line = Vec::new();
        // one byte more than allowed, to tell a line that is too long from one that just fits
        let mut allowed = (&mut self.reader).take(limit + 1);
        timeout(patience, allowed.read_until(b'\n', &mut line))
            .await
            .map_err(|_elapsed| ConnectionError::Silent(patience))??;
        if line.pop_if(|last| *last == b'\n').is_none() {
            if line.len() as u64 > limit {
                return Err(ConnectionError::TooLong(limit));
            }
            // the client closed its side; what it left without an end of line is a request all the same
            return Ok(Some(line).filter(|line| !line.is_empty()));
        }
        Ok(Some(line))
    }

    async fn write_line(&mut self, value: &impl Serialize) -> Result<(), ConnectionError> {
        let mut line = serde_json::to_vec(value).map_err(io::Error::from)?;
        line.push(b'\n');
        let patience = self.limits.patience;
        timeout(patience, self.writer.write_all(&line))
            .await
            .map_err(|_elapsed| ConnectionError::Stuck(patience))??;
        Ok(())
    }

    /// Tells the client why it is not heard any more.
    async fn refuse(&mut self, error: ConnectionError) -> Result<(), ConnectionError> {
        self.write_line(&super::answer::error(&error.to_string())).await?;
        Err(error)
    }

    /// Lines until the stream ends or the client leaves.
    async fn forward(&mut self, mut stream: EventStream) -> Result<(), ConnectionError> {
        let mut left = [0; 64];
        loop {
            tokio::select! {
                // a client of a stream says nothing more; end of file is its goodbye
                read = self.reader.read(&mut left) => if read? == 0 { return Ok(()) },
                line = stream.next() => match line {
                    Some(line) => self.write_line(&line).await?,
                    None => return Ok(()),
                }
            }
        }
    }
}
