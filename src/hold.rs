//! Held expiries (PURE).
//!
//! A replica of Redis expires nothing by itself: it waits for its master's DEL. The target of a migration is
//! a master, with a clock of its own. Were it told when a key expires, then the key would go while a command
//! that makes it live on is still on its way, and nothing would bring it back. So expiries are *held*: they
//! are written a fixed span later. What expires goes with the source's DEL, as on a replica, and when the
//! migration is complete every key gets its own time back (`worker/release.rs`).
//!
//! An expiry itself says whether it is held. So nothing is kept in a table that could overflow, be lost with
//! the process, or miss what RENAME and COPY do: a held key is one that expires in more than 70,000 years.

/// Added to the expiry of a key, in ms. Times at the edge of what servers take would disturb their averages.
pub const KEY: i64 = 1 << 52;
/// Added to the expiry of a hash field, in ms: Redis takes none beyond 2^46 (`HFE_MAX_ABS_TIME_MSEC`).
pub const FIELD: i64 = 1 << 45;

/// Which expiries are written held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    pub keys: bool,
    /// Of hash fields.
    pub fields: bool,
}

impl Holding {
    pub const ALL: Self = Self { keys: true, fields: true };

    /// What a key that expires at `at` (Unix ms) is to be given.
    #[inline]
    pub fn key(self, at: i64) -> i64 {
        if self.keys && at < KEY { at.max(1) + KEY } else { at }
    }

    /// The same for a field of a hash.
    #[inline]
    pub fn field(self, at: i64) -> i64 {
        if self.fields && at < FIELD { at.max(1) + FIELD } else { at }
    }
}

/// The true time of a key whose expiry is held. `at`: Unix ms, or ms from now, which tell the same.
#[inline]
pub fn true_key(at: i64) -> Option<i64> {
    (KEY / 2..KEY + KEY / 2).contains(&at).then(|| at - KEY)
}

/// The same for a field of a hash, in Unix ms. (A field that truly expires after the year 3084 passes for a
/// held one.)
#[inline]
pub fn true_field(at: i64) -> Option<i64> {
    (FIELD..2 * FIELD).contains(&at).then(|| at - FIELD)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    #[test]
    fn what_is_held_gets_its_time_back() {
        for at in [1, NOW - 1, NOW, NOW + 86_400_000, 4_102_444_800_000, 32_503_680_000_000] {
            assert_eq!(true_key(Holding::ALL.key(at)), Some(at));
            assert_eq!(true_field(Holding::ALL.field(at)), Some(at));
            // As a time that is left.
            assert_eq!(true_key(Holding::ALL.key(at) - NOW), Some(at - NOW));
        }
        assert_eq!(Holding::ALL.key(0), KEY + 1);
    }

    #[test]
    fn true_times_are_not_taken_for_held_ones() {
        // The year 9999, 2^40 s from now, a time that is over.
        for at in [253_402_300_799_000, NOW + (1000 << 40), NOW, -5] {
            assert_eq!(true_key(at), None, "{at}");
        }
        assert_eq!(true_key(i64::MAX), None);
        for at in [NOW, 32_503_680_000_000, 4 << 45] {
            assert_eq!(true_field(at), None, "{at}");
        }
    }

    #[test]
    fn nothing_is_done_where_nothing_is_to_be_held() {
        let none = Holding::default();
        assert_eq!((none.key(NOW), none.field(NOW)), (NOW, NOW));
        // Too far away to be moved.
        assert_eq!(Holding::ALL.key(KEY + 5), KEY + 5);
        assert_eq!(Holding::ALL.field(FIELD + 5), FIELD + 5);
    }
}
