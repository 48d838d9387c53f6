//! Splits a streamed response into lines.

use futures::{AsyncBufRead, AsyncBufReadExt as _};

/// The lines of a streamed response.
pub(super) struct Lines<S> {
    stream: S,
    line: Vec<u8>,
}

impl<S: AsyncBufRead + Unpin> Lines<S> {
    pub(super) const fn new(stream: S) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// The next line; `None` at the end. An unterminated last line is dropped.
    pub(super) async fn next(&mut self) -> std::io::Result<Option<&[u8]>> {
        self.line.clear();
        self.stream.read_until(b'\n', &mut self.line).await?;
        Ok(self.line.strip_suffix(b"\n"))
    }
}
