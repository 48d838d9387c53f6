//! The SCTP packets of a handshake (RFC 9260 §3.3): INIT, INIT ACK and ABORT, each as the only
//! chunk of its packet. Opens no socket.

use dataplane_common::crc32c;

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;

/// Bytes of the common header.
const HEADER: usize = 12;
/// Bytes of a chunk header, and of the fixed fields of INIT and INIT ACK.
const CHUNK: usize = 4;
const FIXED: usize = 16;

/// The parameter that every INIT ACK must have.
const STATE_COOKIE: u16 = 7;
/// An unassigned parameter type for our response. Its highest bits tell receivers that do not know
/// it to skip it silently.
const ANSWER: u16 = 0xbf_5a;

/// A parsed packet with valid length and checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) from: u16,
    pub(super) to: u16,
    /// The verification tag.
    pub(super) tag: u32,
    pub(super) chunk: Chunk,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// `tag`: verification tag of packets to the sender.
    Init {
        tag: u32,
    },
    /// `answer`: the traffic server's response.
    InitAck {
        tag: u32,
        answer: String,
    },
    Abort,
    /// Any other chunk type.
    Other(u8),
}

/// Source and destination port of a packet, or of its beginning as quoted in an ICMP error.
pub(super) fn ports(packet: &[u8]) -> Option<(u16, u16)> {
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    Some((port(0)?, port(2)?))
}

impl Packet {
    pub(super) fn write(&self) -> Vec<u8> {
        let mut bytes = [self.from.to_be_bytes(), self.to.to_be_bytes()].concat();
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.chunk.write());
        let sum = crc32c::of(&bytes).to_le_bytes();
        bytes[8..HEADER].copy_from_slice(&sum);
        bytes
    }

    /// The error describes what is wrong with the packet.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let (from, to) = ports(bytes).ok_or("an SCTP packet without ports")?;
        let word = |at: usize| {
            let found = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
            found.map(u32::from_be_bytes).ok_or("an SCTP packet that is cut off")
        };
        let (tag, sum) = (word(4)?, word(8)?);
        let mut summed = bytes.to_vec();
        summed[8..HEADER].fill(0);
        if sum.to_be_bytes() != crc32c::of(&summed).to_le_bytes() {
            return Err("an SCTP packet with a wrong checksum");
        }
        let [kind, _flags, high, low] = word(HEADER)?.to_be_bytes();
        let len = usize::from(u16::from_be_bytes([high, low]));
        let body = bytes.get(HEADER + CHUNK..HEADER + len).ok_or("an SCTP chunk that is cut off")?;
        let chunk = match kind {
            INIT => Chunk::Init { tag: word(HEADER + CHUNK)? },
            INIT_ACK => Chunk::InitAck { tag: word(HEADER + CHUNK)?, answer: answer(body)? },
            ABORT => Chunk::Abort,
            kind => Chunk::Other(kind),
        };
        Ok(Self { from, to, tag, chunk })
    }
}

impl Chunk {
    fn write(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Init { tag } => (INIT, fixed(*tag)),
            Self::InitAck { tag, answer } => {
                // the client never returns the cookie
                let parameters = [parameter(STATE_COOKIE, &[0; 4]), parameter(ANSWER, answer.as_bytes())];
                (INIT_ACK, [fixed(*tag), parameters.concat()].concat())
            }
            Self::Abort => (ABORT, Vec::new()),
            Self::Other(kind) => (*kind, Vec::new()),
        };
        let len = (CHUNK + body.len()) as u16;
        let mut bytes = vec![kind, 0];
        bytes.extend(len.to_be_bytes());
        bytes.extend(body);
        bytes
    }
}

/// Initiate tag, receiver window, one stream in each direction, initial TSN.
fn fixed(tag: u32) -> Vec<u8> {
    let mut bytes = tag.to_be_bytes().to_vec();
    bytes.extend(0x1_0000_u32.to_be_bytes());
    bytes.extend([0, 1, 0, 1]);
    bytes.extend(1_u32.to_be_bytes());
    bytes
}

/// A parameter, padded to 4 bytes.
fn parameter(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_be_bytes().to_vec();
    bytes.extend(((CHUNK + value.len()) as u16).to_be_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The traffic server's response in the body of an INIT ACK.
fn answer(body: &[u8]) -> Result<String, &'static str> {
    let mut rest = body.get(FIXED..).ok_or("an INIT ACK that is cut off")?;
    loop {
        let (kind, len) = ports(rest).ok_or("an INIT ACK without the traffic server's parameter")?;
        let value = rest.get(CHUNK..len.into()).ok_or("a parameter of SCTP that is cut off")?;
        if kind == ANSWER {
            return String::from_utf8(value.to_vec()).map_err(|_not_text| "a response that is not UTF-8");
        }
        rest = rest.get(usize::from(len).next_multiple_of(4)..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(chunk: Chunk) -> Packet {
        Packet { from: 40_000, to: 80, tag: 0xcafe_babe, chunk }
    }

    #[test]
    fn written_packets_are_parsed_unchanged() {
        let answer = |text: &str| Chunk::InitAck { tag: 7, answer: text.to_owned() };
        let chunks = [Chunk::Init { tag: 7 }, answer("near"), answer("server [::1]:9"), Chunk::Abort];
        for chunk in chunks.into_iter().chain([Chunk::Other(0)]) {
            let packet = packet(chunk);
            let bytes = packet.write();
            assert_eq!(Packet::read(&bytes), Ok(packet), "{bytes:02x?}");
            assert_eq!(ports(&bytes[..8]), Some((40_000, 80)));
        }
    }

    #[test]
    fn every_flipped_bit_and_truncation_is_detected() {
        let bytes = packet(Chunk::InitAck { tag: 7, answer: "near".to_owned() }).write();
        for bit in 0..bytes.len() * 8 {
            let mut wrong = bytes.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Packet::read(&wrong), Err("an SCTP packet with a wrong checksum"), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Packet::read(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    /// The expected bytes are written out from RFC 9260 §3.3.2.
    #[test]
    fn init_has_the_layout_of_rfc_9260() {
        let bytes = packet(Chunk::Init { tag: 0x0102_0304 }).write();
        assert_eq!(bytes[..8], [0x9c, 0x40, 0, 80, 0xca, 0xfe, 0xba, 0xbe]);
        assert_eq!(bytes[12..20], [1, 0, 0, 20, 1, 2, 3, 4]);
        assert_eq!(bytes[20..], [0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    }
}
