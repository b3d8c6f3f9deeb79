//! CRC-64/Redis ("Jones"): reflected, initial value 0, no final xor. Source: Redis `crc64.c`.

use crc_fast::{CrcAlgorithm, Digest, checksum};

/// A running checksum; feed it in bulk, it is fastest on long runs.
#[derive(Clone, Debug)]
pub struct Crc(Digest);

impl Crc {
    pub fn new() -> Self {
        Crc(Digest::new(CrcAlgorithm::Crc64Redis))
    }

    /// Goes on from what [`Crc::value`] gave.
    pub fn resume(value: u64) -> Self {
        // Nothing is added at the end, so that the value is the state.
        Crc(Digest::new_with_init_state(CrcAlgorithm::Crc64Redis, value))
    }

    #[inline]
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The checksum of everything so far.
    pub fn value(&self) -> u64 {
        self.0.finalize()
    }
}

impl Default for Crc {
    fn default() -> Self {
        Self::new()
    }
}

/// The checksum of one run of bytes.
#[inline]
pub fn crc64(data: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Redis, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_check_value() {
        assert_eq!(crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca);
        let mut crc = Crc::new();
        crc.update(b"1234");
        crc.clone().update(b"ignored");
        crc.update(b"56789");
        assert_eq!(crc.value(), 0xe9c6_d914_c4b8_d9ca);
    }

    #[test]
    fn goes_on_from_a_value() {
        let data: Vec<u8> = (0..1000u32).map(|number| (number * 7) as u8).collect();
        for cut in [0, 1, 100, 999, 1000] {
            let mut crc = Crc::new();
            crc.update(&data[..cut]);
            let mut crc = Crc::resume(crc.value());
            crc.update(&data[cut..]);
            assert_eq!(crc.value(), crc64(&data));
        }
    }
}
