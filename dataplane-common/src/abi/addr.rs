//! Addresses and ports in network byte order.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::abi;

abi! {
    /// An IP address in network byte order, 16 bytes; IPv4 is mapped (`::ffff:a.b.c.d`, RFC 4291
    /// §2.5.5.2).
    ///
    /// One type for both families needs one map per purpose, not two (ADR 0001). Words rather than
    /// bytes, because the BPF back end copies bytes of alignment 1 with sixteen loads and stores.
    pub struct Addr: 16 { words: [u32; 4] }

    /// A TCP, UDP or SCTP port, or an ICMP echo identifier, in network byte order.
    pub struct Port: 2 { wire: u16 }

    /// An Ethernet address, as it lies in a frame.
    pub struct MacAddr: 6 { words: [u16; 3] }
}

const MAPPED: u32 = 0xffff_u32.to_be();

impl Addr {
    /// No address: `::`.
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };
    /// Bits of a mapped address before the IPv4 part: to be added to an IPv4 prefix length.
    pub const V4_PREFIX_BITS: u32 = 96;

    /// From the four bytes of an IPv4 address as they lie in a packet.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self { words: [0, 0, MAPPED, u32::from_ne_bytes(octets)] }
    }

    /// From an IPv4 address read from memory as one word, in network byte order.
    #[inline(always)]
    pub const fn v4_word(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// From the four words of an IPv6 address read from memory, in network byte order.
    #[inline(always)]
    pub const fn v6_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The four words in network byte order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The IPv4 address as one word in network byte order. Meaningful only if [`Self::is_v4`].
    #[inline(always)]
    pub const fn v4_part(&self) -> u32 {
        self.words[3]
    }

    /// Whether this is a mapped IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// Whether this is in 127.0.0.0/8, or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.words[3].to_ne_bytes()[0] == 127
        } else {
            self.words[0] | self.words[1] | self.words[2] == 0 && u32::from_be(self.words[3]) == 1
        }
    }

    /// Whether this is `::` or `0.0.0.0`, both of which `connect()` treats as loopback.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] | self.words[1] | self.words[3] == 0 && (self.words[2] == 0 || self.words[2] == MAPPED)
    }

    /// Whether this is `::`, which no packet has: "no address".
    #[inline(always)]
    pub const fn is_zero(&self) -> bool {
        self.words[0] | self.words[1] | self.words[2] | self.words[3] == 0
    }

    /// As an address of the standard library; a mapped address becomes IPv4.
    pub const fn to_ip(&self) -> IpAddr {
        let mut octets = [0; 16];
        let mut word = 0;
        while word < 4 {
            let bytes = self.words[word].to_ne_bytes();
            let mut byte = 0;
            while byte < 4 {
                octets[word * 4 + byte] = bytes[byte];
                byte += 1;
            }
            word += 1;
        }
        if self.is_v4() {
            IpAddr::V4(Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15]))
        } else {
            IpAddr::V6(Ipv6Addr::from_octets(octets))
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(ip.octets().chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { words }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ip().fmt(f)
    }
}

impl Port {
    /// From host order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self { wire: host.to_be() }
    }

    /// From two bytes read from memory as one integer, in network byte order.
    #[inline(always)]
    pub const fn from_wire(wire: u16) -> Self {
        Self { wire }
    }

    /// As it lies in memory, in network byte order.
    #[inline(always)]
    pub const fn wire(self) -> u16 {
        self.wire
    }

    /// In host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.wire)
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl MacAddr {
    /// From its six bytes.
    #[inline(always)]
    pub const fn new([a, b, c, d, e, f]: [u8; 6]) -> Self {
        Self { words: [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])] }
    }

    /// Its three words in network byte order.
    #[inline(always)]
    pub const fn words(self) -> [u16; 3] {
        self.words
    }

    /// Replaces it, word by word.
    #[inline(always)]
    pub const fn set_words(&mut self, a: u16, b: u16, c: u16) {
        self.words[0] = a;
        self.words[1] = b;
        self.words[2] = c;
    }

    /// Its six bytes.
    #[inline(always)]
    pub const fn bytes(self) -> [u8; 6] {
        let [[a, b], [c, d], [e, f]] =
            [self.words[0].to_ne_bytes(), self.words[1].to_ne_bytes(), self.words[2].to_ne_bytes()];
        [a, b, c, d, e, f]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.bytes();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_convert_back() {
        for text in ["10.1.2.3", "255.255.255.255", "::", "fd00::1", "2001:db8:1:2:3:4:5:6"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Addr::from(ip).to_ip(), ip);
        }
    }

    #[test]
    fn memory_is_in_network_byte_order() {
        let addr = Addr::from(Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(addr.v4_part().to_ne_bytes(), [10, 1, 2, 3]);
        assert_eq!(Port::new(443).wire().to_ne_bytes(), [0x01, 0xbb]);
    }
}
