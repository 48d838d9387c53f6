//! CRC-32C, the checksum of SCTP (RFC 9260 appendix A), and its incremental update.
//!
//! Bits are the coefficients of a polynomial over GF(2), and the checksum is the remainder of a
//! division: it is linear. So replacing a word changes it by the CRC of the difference, shifted
//! past the bytes that follow: multiplied by x once for every bit. The rest of the packet is not
//! read, however long it is. The initial and final inversion cancel.
//!
//! A remainder is stored in a `u32` as the checksum is: the highest power of x in the lowest bit.

/// Castagnoli's polynomial without its highest power.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// 1.
const ONE: u32 = 1 << 31;
/// x⁸: one byte.
const BYTE: u32 = 1 << 23;

/// Digits of a length of 16 bits, of two bits each.
const DIGITS: usize = 8;
/// Halves of the bytes of a remainder.
const NIBBLES: usize = 8;

/// `SHIFTED[digit][value].0[nibble][bits]`: the remainder that has `bits` in that nibble and zeros
/// elsewhere, shifted past `value * 4^digit` bytes. One lookup per nibble of the remainder and
/// digit of the length, without a branch, because the verifier follows every combination of
/// branches.
static SHIFTED: [[Row; 4]; DIGITS] = shifted();

/// The last word keeps the size from being a power of two: otherwise the compiler would combine
/// parts of an offset by OR, which the verifier of Linux 6.1 does not track: "math between
/// `map_value` pointer and register with unbounded min value".
#[repr(C)]
#[derive(Clone, Copy)]
struct Row([[u32; 16]; NIBBLES], u32);

/// The checksum field of a packet of `len` bytes after its first four bytes, `old`, became `new`.
/// All in the byte order of the packet.
#[inline(always)]
pub const fn replace_first_word(checksum: u32, old: u32, new: u32, len: u16) -> u32 {
    checksum ^ u32::to_le(advance(u32::from_le(old ^ new), len))
}

/// A remainder shifted past `len` bytes.
#[inline(always)]
const fn advance(remainder: u32, len: u16) -> u32 {
    let mut remainder = remainder;
    let mut digit = 0;
    while digit < DIGITS {
        let table = &SHIFTED[digit][(len as usize >> (2 * digit)) & 3].0;
        remainder = table[0][remainder as usize & 15]
            ^ table[1][(remainder as usize >> 4) & 15]
            ^ table[2][(remainder as usize >> 8) & 15]
            ^ table[3][(remainder as usize >> 12) & 15]
            ^ table[4][(remainder as usize >> 16) & 15]
            ^ table[5][(remainder as usize >> 20) & 15]
            ^ table[6][(remainder as usize >> 24) & 15]
            ^ table[7][(remainder as usize >> 28) & 15];
        digit += 1;
    }
    remainder
}

#[expect(clippy::large_stack_arrays, reason = "evaluated at compile time")]
const fn shifted() -> [[Row; 4]; DIGITS] {
    let mut shifted = [[Row([[0; 16]; NIBBLES], 0); 4]; DIGITS];
    // past 4^digit bytes
    let mut unit = BYTE;
    let mut digit = 0;
    while digit < DIGITS {
        let mut distance = ONE;
        let mut value = 0;
        while value < 4 {
            let mut place = 0;
            while place < NIBBLES * 16 {
                let (nibble, bits) = (place / 16, place % 16);
                shifted[digit][value].0[nibble][bits] = multiply((bits as u32) << (4 * nibble), distance);
                place += 1;
            }
            distance = multiply(distance, unit);
            value += 1;
        }
        unit = distance;
        digit += 1;
    }
    shifted
}

/// Product of two remainders, modulo the polynomial.
const fn multiply(one: u32, other: u32) -> u32 {
    let mut power = one;
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        if other & (ONE >> bit) != 0 {
            product ^= power;
        }
        power = if power & 1 == 0 { power >> 1 } else { power >> 1 ^ POLYNOMIAL };
        bit += 1;
    }
    product
}

/// The CRC-32C of bytes, for user space; the datapath uses [`replace_first_word`].
#[cfg(any(test, feature = "user"))]
pub fn of(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 0 { 0 } else { POLYNOMIAL })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_3720_test_vectors() {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        for (bytes, crc) in [
            (&b"123456789"[..], 0xe306_9283),
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (&descending, 0x113f_db5c),
        ] {
            assert_eq!(of(bytes), crc, "{bytes:02x?}");
        }
    }

    /// The packet's checksum as stored in its field.
    fn field(packet: &[u8]) -> u32 {
        of(packet).to_le()
    }

    fn first_word(packet: &[u8]) -> u32 {
        u32::from_ne_bytes(packet[..4].try_into().unwrap())
    }

    #[test]
    fn update_is_correct_for_any_packet_length() {
        let mut packet = vec![0x5a; usize::from(u16::MAX)];
        for len in (4..300).chain([1_480, 4_096, 9_000, 65_533, 65_534, 65_535]) {
            let packet = &mut packet[..len];
            let (old, before) = (first_word(packet), field(packet));
            packet[0] ^= 0x80;
            packet[3] ^= 1;
            let after = replace_first_word(before, old, first_word(packet), len as u16);
            assert_eq!(after, field(packet), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn update_equals_full_recomputation(
            mut packet in proptest::collection::vec(any::<u8>(), 12..2_000), ports in any::<[u8; 4]>(),
        ) {
            let (old, before) = (first_word(&packet), field(&packet));
            packet[..4].copy_from_slice(&ports);
            let len = packet.len() as u16;
            prop_assert_eq!(replace_first_word(before, old, first_word(&packet), len), field(&packet));
            prop_assert_eq!(replace_first_word(field(&packet), first_word(&packet), old, len), before, "and back");
        }
    }
}
