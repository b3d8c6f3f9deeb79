//! Module ids. Source: Redis `module.c`, `moduleTypeEncodeId`.

use std::fmt;

use super::cursor::Cursor;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// A module data type: nine letters and the version of its encoding, packed in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleId(pub u64);

impl ModuleId {
    /// Nine ASCII characters.
    pub fn name(self) -> [u8; 9] {
        let mut name = [0; 9];
        for (index, byte) in name.iter_mut().enumerate() {
            let bits = self.0 >> (64 - 6 * (index + 1)) & 0x3f;
            *byte = ALPHABET.get(bits as usize).copied().unwrap_or(b'?');
        }
        name
    }

    pub fn encoding_version(self) -> u16 {
        (self.0 & 0x3ff) as u16
    }
}

impl fmt::Display for ModuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {}", self.name().escape_ascii(), self.encoding_version())
    }
}

/// The module that a value of type 7 belongs to.
pub fn module_of(type_byte: u8, value: &[u8]) -> Option<ModuleId> {
    if type_byte != super::event::TYPE_MODULE_2 {
        return None;
    }
    Cursor::new(value).length().ok().map(ModuleId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_unpacks_to_name_and_version() {
        let packed = b"ReJSON-RL".iter().fold(0u64, |id, byte| {
            id << 6 | ALPHABET.iter().position(|letter| letter == byte).unwrap() as u64
        });
        let id = ModuleId(packed << 10 | 3);
        assert_eq!(&id.name(), b"ReJSON-RL");
        assert_eq!(id.to_string(), "ReJSON-RL version 3");
        let mut value = vec![0x81];
        value.extend(id.0.to_be_bytes());
        assert_eq!(module_of(7, &value), Some(id));
        assert_eq!(module_of(0, &value), None);
    }
}
