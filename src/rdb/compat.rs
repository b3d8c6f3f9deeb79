//! Which server versions write and load which object types, and what their `RESTORE` knows.
//! Sources: Redis `rdb.h` 2.8 … 8.6, Valkey `rdb.h` 8.1 and 9.1; checked by restoring every type
//! from every version into every other.

use std::fmt;

use crate::loss::Loss;
use crate::version::{Flavor, ServerVersion};

/// What a target takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetFormat {
    server: ServerVersion,
}

/// A pair of versions that values may be lost between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unloadable {
    pub source: ServerVersion,
    pub target: ServerVersion,
    /// Object types that the source writes and the target does not load.
    pub types: Vec<u8>,
}

/// How a target gets a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    AsItIs,
    /// Put together anew as this type, in the target's numbering.
    As(u8),
    Never(Loss),
}

impl TargetFormat {
    pub fn of(server: ServerVersion) -> Self {
        TargetFormat { server }
    }

    pub fn flavor(&self) -> Flavor {
        self.server.flavor
    }

    /// How to bring a value of this type, as a source of that flavour writes it.
    pub fn fit(&self, type_byte: u8, source: Flavor) -> Fit {
        if self.can_load(type_byte, source) {
            return Fit::AsItIs;
        }
        let redis = |major, minor| self.server.has_redis(major, minor);
        match type_byte {
            5 | 17 => Fit::As(if redis(4, 0) { 5 } else { 3 }),
            14 | 18 => Fit::As(1),
            16 => Fit::As(4),
            20 => Fit::As(2),
            15 | 19 | 21 | 26 if redis(7, 2) => Fit::As(21),
            15 | 19 | 21 | 26 if redis(7, 0) => Fit::As(19),
            15 | 19 | 21 | 26 if redis(5, 0) => Fit::As(15),
            15 | 19 | 21 | 26 => Fit::Never(Loss::Streams),
            22..=25 if !self.server.has_field_expiry() => Fit::As(4),
            22..=25 if self.server.flavor == Flavor::Valkey => Fit::As(22),
            22..=25 => Fit::As(24),
            6 | 7 => Fit::Never(Loss::Modules),
            _ => Fit::Never(Loss::Values),
        }
    }

    /// Whether RESTORE takes a payload with this RDB version in its footer.
    pub fn accepts_footer(&self, version: u16) -> bool {
        match (self.server.flavor, self.footer_version()) {
            // Up to 3.0, and 3.2.0, no older one either.
            (Flavor::Redis, newest @ 6) => version == newest,
            (Flavor::Redis, newest @ 7) if self.server.patch == 0 => version == newest,
            (Flavor::Valkey, 80) => version <= 11 || version == 80,
            (_, newest) => version <= newest,
        }
    }

    /// The RDB version to stamp payloads with: servers refuse newer ones, and those up to 3.2.0
    /// older ones as well.
    pub fn footer_version(&self) -> u16 {
        match (self.server.flavor, self.server.major, self.server.minor) {
            (Flavor::Valkey, ..9, _) => 11,
            (Flavor::Valkey, ..) => 80,
            (Flavor::Redis, ..3, _) | (Flavor::Redis, 3, ..2) => 6,
            (Flavor::Redis, 3, _) => 7,
            (Flavor::Redis, 4, _) => 8,
            (Flavor::Redis, 5 | 6, _) => 9,
            (Flavor::Redis, 7, ..2) => 10,
            (Flavor::Redis, 7, ..4) => 11,
            (Flavor::Redis, 7, _) | (Flavor::Redis, 8, ..6) => 12,
            (Flavor::Redis, ..) => 13,
        }
    }

    /// Whether a value of this type, as a source of that flavour writes it, can be restored. Module
    /// data (type 7) also needs the module itself.
    pub fn can_load(&self, type_byte: u8, source: Flavor) -> bool {
        let redis = |major, minor| self.server.has_redis(major, minor);
        let same_redis = |major, minor| {
            source == Flavor::Redis && self.server.flavor == Flavor::Redis && redis(major, minor)
        };
        match type_byte {
            0..=4 | 9..=13 => true,
            5 | 7 => redis(4, 0),
            14 => redis(3, 2),
            15 => redis(5, 0),
            16..=19 => redis(7, 0),
            20 | 21 => redis(7, 2),
            22 => source == Flavor::Valkey && self.server.flavor == Flavor::Valkey && self.server.major >= 9,
            24 | 25 => same_redis(7, 4),
            26 => same_redis(8, 6),
            _ => false,
        }
    }

    /// `FUNCTION LOAD`.
    pub fn has_functions(&self) -> bool {
        self.server.has_redis(7, 0)
    }

    /// `RESTORE … REPLACE`.
    pub fn has_restore_replace(&self) -> bool {
        self.server.has_redis(3, 0)
    }

    /// `RESTORE … ABSTTL`; without it the time to live is relative, and 0 would mean for ever.
    pub fn has_restore_absttl(&self) -> bool {
        self.server.has_redis(5, 0)
    }

    /// `RESTORE … IDLETIME seconds` and `FREQ counter`, which exclude each other.
    pub fn has_restore_idletime_and_freq(&self) -> bool {
        self.server.has_redis(5, 0)
    }
}

/// The object types that a server writes into snapshots and `DUMP` payloads.
pub fn rdb_types_written_by(server: ServerVersion) -> &'static [u8] {
    const UP_TO_3_0: &[u8] = &[0, 1, 2, 3, 4, 10, 11, 12, 13];
    const UP_TO_3_2: &[u8] = &[0, 2, 3, 4, 11, 12, 13, 14];
    const UP_TO_4_0: &[u8] = &[0, 2, 4, 5, 7, 11, 12, 13, 14];
    const UP_TO_6_2: &[u8] = &[0, 2, 4, 5, 7, 11, 12, 13, 14, 15];
    const UP_TO_7_0: &[u8] = &[0, 2, 4, 5, 7, 11, 16, 17, 18, 19];
    const UP_TO_7_2: &[u8] = &[0, 2, 4, 5, 7, 11, 16, 17, 18, 20, 21];
    const UP_TO_8_4: &[u8] = &[0, 2, 4, 5, 7, 11, 16, 17, 18, 20, 21, 24, 25];
    const FROM_8_6: &[u8] = &[0, 2, 4, 5, 7, 11, 16, 17, 18, 20, 24, 25, 26];
    const VALKEY_9: &[u8] = &[0, 2, 4, 5, 7, 11, 16, 17, 18, 20, 21, 22];
    match (server.flavor, server.major, server.minor) {
        (Flavor::Valkey, ..9, _) => UP_TO_7_2,
        (Flavor::Valkey, ..) => VALKEY_9,
        (Flavor::Redis, ..3, _) | (Flavor::Redis, 3, ..2) => UP_TO_3_0,
        (Flavor::Redis, 3, _) => UP_TO_3_2,
        (Flavor::Redis, 4, _) => UP_TO_4_0,
        (Flavor::Redis, 5 | 6, _) => UP_TO_6_2,
        (Flavor::Redis, 7, ..2) => UP_TO_7_0,
        (Flavor::Redis, 7, ..4) => UP_TO_7_2,
        (Flavor::Redis, 7, _) | (Flavor::Redis, 8, ..6) => UP_TO_8_4,
        (Flavor::Redis, ..) => FROM_8_6,
    }
}

/// What the source may hold and has no equivalent on the target. Which modules there are, versions do not tell.
pub fn losses(source: ServerVersion, target: ServerVersion) -> Vec<Loss> {
    let mut losses = Vec::new();
    if source.has_redis(5, 0) && !target.has_redis(5, 0) {
        losses.push(Loss::Streams);
    }
    if source.has_redis(7, 0) && !target.has_redis(7, 0) {
        losses.push(Loss::Functions);
    }
    if source.has_field_expiry() && !target.has_field_expiry() {
        losses.push(Loss::FieldExpiry);
    }
    losses
}

/// What the source may hold and the target cannot load as it is; `None` when everything fits.
pub fn unloadable(source: ServerVersion, target: ServerVersion) -> Option<Unloadable> {
    let format = TargetFormat::of(target);
    let types: Vec<u8> = rdb_types_written_by(source)
        .iter()
        .copied()
        .filter(|&type_byte| !format.can_load(type_byte, source.flavor))
        .collect();
    (!types.is_empty()).then_some(Unloadable { source, target, types })
}

impl fmt::Display for Unloadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unloadable { source, target, types } = self;
        write!(f, "{source} may hold values that {target} cannot load as they are: ")?;
        for (index, &type_byte) in types.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{} (RDB type {type_byte})", described(type_byte))?;
        }
        f.write_str("; they are rewritten for it")
    }
}

fn described(type_byte: u8) -> &'static str {
    match type_byte {
        5 => "sorted sets with binary scores",
        7 => "module data",
        14 => "quicklists",
        15 | 19 | 21 => "streams",
        16 => "hashes in listpacks",
        17 => "sorted sets in listpacks",
        18 => "lists of listpacks",
        20 => "sets in listpacks",
        22 | 24 | 25 => "hashes with field expiry",
        26 => "streams with idempotent producers",
        _ => "values",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redis(major: u16, minor: u16, patch: u16) -> ServerVersion {
        ServerVersion { flavor: Flavor::Redis, major, minor, patch }
    }

    fn valkey(major: u16, minor: u16) -> ServerVersion {
        ServerVersion { flavor: Flavor::Valkey, major, minor, patch: 0 }
    }

    #[test]
    fn footers_are_the_newest_that_the_target_accepts() {
        let footer = |server| TargetFormat::of(server).footer_version();
        let expected = [
            (redis(2, 6, 0), 6),
            (redis(2, 8, 17), 6),
            (redis(3, 0, 5), 6),
            (redis(3, 2, 0), 7),
            (redis(4, 0, 0), 8),
            (redis(5, 0, 6), 9),
            (redis(6, 2, 14), 9),
            (redis(7, 0, 15), 10),
            (redis(7, 2, 0), 11),
            (redis(7, 4, 0), 12),
            (redis(8, 2, 3), 12),
            (redis(8, 4, 0), 12),
            (redis(8, 6, 0), 13),
            (valkey(7, 2), 11),
            (valkey(8, 1), 11),
            (valkey(9, 1), 80),
        ];
        for (server, version) in expected {
            assert_eq!(footer(server), version, "{server}");
        }
    }

    #[test]
    fn every_version_loads_its_own_types_and_those_of_older_ones() {
        let line = [
            redis(2, 8, 17),
            redis(3, 0, 5),
            redis(3, 2, 6),
            redis(4, 0, 0),
            redis(5, 0, 6),
            redis(6, 2, 14),
            redis(7, 0, 15),
            redis(7, 2, 0),
            redis(7, 4, 0),
            redis(8, 2, 3),
            redis(8, 6, 0),
        ];
        for (index, &target) in line.iter().enumerate() {
            for &source in &line[..=index] {
                assert_eq!(unloadable(source, target), None);
            }
        }
        for source in [redis(2, 8, 17), redis(7, 2, 4), valkey(8, 1), valkey(9, 1)] {
            assert_eq!(unloadable(source, valkey(9, 1)), None);
        }
        assert_eq!(unloadable(valkey(8, 1), redis(7, 2, 0)), None);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let text = unloadable(redis(8, 2, 3), valkey(9, 1)).unwrap().to_string();
        assert_eq!(
            text,
            "Redis 8.2.3 may hold values that Valkey 9.1.0 cannot load as they are: hashes with field expiry \
             (RDB type 24), hashes with field expiry (RDB type 25); they are rewritten for it"
        );
        assert_eq!(unloadable(valkey(9, 1), redis(8, 2, 3)).unwrap().types, vec![22]);
        assert_eq!(unloadable(valkey(8, 1), redis(7, 0, 15)).unwrap().types, vec![20, 21]);
        assert_eq!(unloadable(redis(3, 2, 6), redis(3, 0, 5)).unwrap().types, vec![14]);
    }

    #[test]
    fn what_has_no_equivalent_is_known_beforehand() {
        use Loss::{FieldExpiry, Functions, Streams};
        for (source, target, expected) in [
            (redis(8, 2, 3), redis(2, 8, 17), vec![Streams, Functions, FieldExpiry]),
            (valkey(8, 1), redis(6, 2, 14), vec![Functions]),
            (redis(8, 2, 3), valkey(8, 1), vec![FieldExpiry]),
            (redis(8, 2, 3), valkey(9, 1), vec![]),
            (redis(3, 2, 6), redis(2, 8, 17), vec![]),
        ] {
            assert_eq!(losses(source, target), expected, "{source} to {target}");
        }
    }

    #[test]
    fn footers_that_are_taken() {
        for (target, taken, refused) in [
            (redis(3, 0, 5), vec![6], vec![5, 7, 12, 80]),
            (redis(3, 2, 0), vec![7], vec![6]),
            (redis(3, 2, 6), vec![1, 6, 7], vec![8]),
            (redis(7, 0, 15), vec![6, 10], vec![11, 80]),
            (valkey(8, 1), vec![6, 11], vec![12, 80]),
            (valkey(9, 1), vec![6, 11, 80], vec![12, 79, 81]),
        ] {
            let format = TargetFormat::of(target);
            assert!(taken.iter().all(|&version| format.accepts_footer(version)), "{target}");
            assert!(!refused.iter().any(|&version| format.accepts_footer(version)), "{target}");
        }
    }

    #[test]
    fn restore_options_by_version() {
        let old = TargetFormat::of(redis(2, 8, 17));
        assert!(!old.has_restore_replace() && !old.has_restore_absttl());
        let middle = TargetFormat::of(redis(3, 2, 6));
        assert!(middle.has_restore_replace() && !middle.has_restore_absttl());
        let new = TargetFormat::of(valkey(8, 1));
        assert!(new.has_restore_absttl() && new.has_restore_idletime_and_freq());
    }
}
