//! Byte quantities of the manifest: `64Mi`, `1.5G`, `4096`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A number of bytes, kept as it was written so that the stored object reads like the manifest.
/// The grammar is a part of Kubernetes' `resource.Quantity`: a non-negative decimal number and one
/// of the suffixes none, `k M G T P`, `Ki Mi Gi Ti Pi`. At most `i64::MAX` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantity {
    text: String,
    bytes: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a size; allowed: a whole number of bytes below 2^63, or a number with k, M, G, T, P, Ki, Mi, Gi, Ti or Pi, such as 64Mi"
)]
pub struct InvalidQuantity;

impl Quantity {
    pub fn bytes(&self) -> u64 {
        self.bytes.unsigned_abs()
    }
}

impl FromStr for Quantity {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let unit: u128 = match suffix {
            "" => 1,
            "k" => 1_000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "T" => 1_000_000_000_000,
            "P" => 1_000_000_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            "Pi" => 1 << 50,
            _ => return Err(InvalidQuantity),
        };
        let bytes = scale(number, unit).ok_or(InvalidQuantity)?;
        Ok(Self { text: text.to_owned(), bytes: i64::try_from(bytes).map_err(|_| InvalidQuantity)? })
    }
}

/// `number × unit`; `None` when it is no decimal number, too large, or no whole number of bytes.
fn scale(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Bounds keep every product below 2^128: 10^19 × 2^50 and 10^15 × 2^50.
    if whole.is_empty() || whole.len() > 19 || fraction.is_empty() || fraction.len() > 15 {
        return None;
    }
    let whole = whole.parse::<u128>().ok()?.checked_mul(unit)?;
    let divisor = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let fraction = fraction.parse::<u128>().ok()?.checked_mul(unit)?;
    if fraction % divisor != 0 {
        return None;
    }
    whole.checked_add(fraction / divisor)
}

impl From<i64> for Quantity {
    /// Negative numbers count as 0; [`Deserialize`] refuses them before.
    fn from(bytes: i64) -> Self {
        let bytes = bytes.max(0);
        Self { text: bytes.to_string(), bytes }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.text.bytes().all(|byte| byte.is_ascii_digit()) {
            serializer.serialize_i64(self.bytes)
        } else {
            serializer.serialize_str(&self.text)
        }
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Quantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 64Mi or a whole number of bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Quantity, E> {
                i64::try_from(bytes).map(Quantity::from).map_err(|_| E::custom(InvalidQuantity))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Quantity, E> {
                u64::try_from(bytes).map_err(|_| E::custom(InvalidQuantity)).and_then(|b| self.visit_u64(b))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    /// The shape that Kubernetes uses for its own quantities.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": r"^[0-9]{1,19}(\.[0-9]{1,15})?([kMGTP]|[KMGTP]i)?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_kubernetes_writes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64Mi", 64 << 20),
            ("10Gi", 10 << 30),
            ("1.5Ki", 1536),
            ("2k", 2000),
            ("0.5G", 500_000_000),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(text.parse::<Quantity>().unwrap().bytes(), bytes, "{text}");
        }
    }

    #[test]
    fn refuses_everything_else() {
        for text in [
            "",
            "Mi",
            "-1",
            "1.",
            ".5Mi",
            "64MB",
            "64mi",
            "64 Mi",
            "1e6",
            "1.5",
            "0.3Ki",
            "9223372036854775808",
            "8192Pi",
            "99999999999999999999",
            "1.2.3",
            "1Mi1",
        ] {
            assert_eq!(text.parse::<Quantity>(), Err(InvalidQuantity), "{text}");
        }
    }

    #[test]
    fn keeps_how_it_was_written() {
        let quantity: Quantity = serde_json::from_str("\"64Mi\"").unwrap();
        assert_eq!(serde_json::to_string(&quantity).unwrap(), "\"64Mi\"");
        let quantity: Quantity = serde_json::from_str("4096").unwrap();
        assert_eq!(serde_json::to_string(&quantity).unwrap(), "4096");
        assert!(serde_json::from_str::<Quantity>("-1").is_err());
    }
}
