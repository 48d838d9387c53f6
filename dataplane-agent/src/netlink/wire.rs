//! Encoding and decoding of netlink messages and attributes.

const HEADER_BYTES: usize = 16;

/// A netlink message.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) body: &'a [u8],
}

pub(super) fn messages(mut buffer: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(buffer.get(..4)?.try_into().ok()?) as usize;
        let whole = buffer.get(..length).filter(|whole| whole.len() >= HEADER_BYTES)?;
        buffer = buffer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([whole[4], whole[5]]),
            flags: u16::from_ne_bytes([whole[6], whole[7]]),
            sequence: u32::from_ne_bytes([whole[8], whole[9], whole[10], whole[11]]),
            body: &whole[HEADER_BYTES..],
        })
    })
}

/// Appends a message: the header, and the parts of its body.
pub(super) fn put_message(messages: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[&[u8]]) {
    let length = HEADER_BYTES + body.iter().map(|part| part.len()).sum::<usize>();
    messages.extend((length as u32).to_ne_bytes());
    messages.extend(kind.to_ne_bytes());
    messages.extend(flags.to_ne_bytes());
    messages.extend(sequence.to_ne_bytes());
    messages.extend(0_u32.to_ne_bytes());
    for part in body {
        messages.extend(*part);
    }
}

/// Error number of an `nlmsgerr`; 0 for an acknowledgement.
pub(super) fn error_of(body: &[u8]) -> i32 {
    let bytes = body.get(..4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(nix::libc::EBADMSG, |bytes| -i32::from_ne_bytes(bytes))
}

/// Iterates over the type and value of each attribute.
pub(super) fn parse(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = attributes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        // the upper two bits are flags
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = attributes.get(4..length)?;
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn attribute(attributes: &[u8], searched: u16) -> Option<&[u8]> {
    parse(attributes).find_map(|(kind, value)| (kind == searched).then_some(value))
}

pub(super) fn text(attributes: &[u8], searched: u16) -> Option<String> {
    let bytes = attribute(attributes, searched)?;
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    Some(String::from_utf8_lossy(bytes).into_owned())
}

pub(super) fn put_text(attributes: &mut Vec<u8>, kind: u16, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    put_bytes(attributes, kind, &bytes);
}

pub(super) fn put_bytes(attributes: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    attributes.extend(((4 + bytes.len()) as u16).to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(bytes);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}
