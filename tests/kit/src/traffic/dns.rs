//! A minimal DNS client (RFC 1035): one question, the addresses of its answer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{print, report::Resolved};

/// The record type to query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RecordType {
    A,
    Aaaa,
}

impl RecordType {
    const fn number(self) -> u16 {
        match self {
            Self::A => 1,
            Self::Aaaa => 28,
        }
    }
}

pub(super) async fn run(
    server: SocketAddr,
    name: &str,
    record: RecordType,
    tcp: bool,
    deadline: Duration,
) -> Result<()> {
    let question = question(std::process::id() as u16, name, record);
    let answer =
        async { if tcp { over_tcp(server, &question).await } else { over_udp(server, &question).await } };
    let answer = timeout(deadline, answer).await.context("no response in time")??;
    let addresses = addresses(&question, &answer).context("the response is malformed")??;
    print(&Resolved { addresses })
}

async fn over_udp(server: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.send_to(question, server).await?;
    let mut answer = vec![0; 4_096];
    let (read, from) = socket.recv_from(&mut answer).await?;
    if from != server {
        bail!("sent a query to {server}, received a response from {from}");
    }
    answer.truncate(read);
    Ok(answer)
}

async fn over_tcp(server: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let mut message = u16::try_from(question.len())?.to_be_bytes().to_vec();
    message.extend_from_slice(question);
    stream.write_all(&message).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

fn question(id: u16, name: &str, record: RecordType) -> Vec<u8> {
    let mut message = Vec::new();
    // recursion desired, one question
    for word in [id, 0x0100, 1, 0, 0, 0] {
        message.extend_from_slice(&word.to_be_bytes());
    }
    for label in name.split('.').filter(|label| !label.is_empty()) {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    for word in [record.number(), 1] {
        message.extend_from_slice(&word.to_be_bytes());
    }
    message
}

/// `None`: the message is truncated.
fn addresses(question: &[u8], answer: &[u8]) -> Option<Result<Vec<IpAddr>>> {
    let word = |at: usize| Some(u16::from_be_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    if answer.get(..2)? != &question[..2] {
        return Some(Err(anyhow::anyhow!("the response has another ID")));
    }
    let code = word(2)? & 0xf;
    if code != 0 {
        return Some(Err(anyhow::anyhow!("the server returned error {code}")));
    }
    let mut at = question.len();
    let mut found = Vec::new();
    for _ in 0..word(6)? {
        at = skip_name(answer, at)?;
        let (record, length) = (word(at)?, usize::from(word(at + 8)?));
        let value = answer.get(at + 10..at + 10 + length)?;
        match record {
            1 => found.push(IpAddr::from(<[u8; 4]>::try_from(value).ok()?)),
            28 => found.push(IpAddr::from(<[u8; 16]>::try_from(value).ok()?)),
            _ => {}
        }
        at += 10 + length;
    }
    Some(Ok(found))
}

/// Skips a name: labels up to an empty one or a pointer.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_after_a_compressed_name_are_read() {
        let question = question(7, "web.test", RecordType::A);
        let mut answer = question.clone();
        answer[2] = 0x81;
        answer[7] = 1;
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3]);
        let found = addresses(&question, &answer).unwrap().unwrap();
        assert_eq!(found, [IpAddr::from([10, 1, 2, 3])]);
        assert!(addresses(&question, &answer[..answer.len() - 1]).is_none());
    }
}
