//! PURE. What three readings of a key prove: of the source, then of the target, then of the source
//! again.

use super::DifferenceKind;
use super::expiry::{Expiry, TOLERANCE_MS};
use super::payload::ValueMark;

/// One key on one side at one moment.
#[derive(Clone)]
pub(super) enum Mark {
    Absent,
    Present {
        /// As TYPE names it.
        kind: String,
        expiry: Expiry,
        /// Until it expires, from the moment of the reading.
        left: Expiry,
        value: Value,
    },
}

#[derive(Clone)]
pub(super) enum Value {
    /// `Keys` mode.
    Ignored,
    /// Too heavy to be asked for whole.
    Heavy,
    Marked(ValueMark),
}

/// What the readings themselves took, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slack {
    /// By how much expiries may be apart, beyond the tolerance; 0 for those that are absolute.
    pub expiry: i64,
    /// Between the reading of the target and the second one of the source.
    pub reading: i64,
}

pub(super) enum Judged {
    Equal,
    /// Equal but for a value that is too heavy to tell at once; its type.
    Heavy(String),
    Differs(Finding),
    /// The source may have changed in between. A finding that holds whatever the value does is
    /// named: found at every look, it is no write on its way.
    Moving(Option<Finding>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub aspect: Aspect,
    /// In few words; never a value.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aspect {
    Missing,
    Extra,
    Type,
    Expiry,
    Value,
}

impl Aspect {
    /// True when a finding in this aspect says the same while the source changes in `changed`.
    fn outlasts(self, changed: Aspect) -> bool {
        match self {
            Aspect::Missing => true,
            Aspect::Type => matches!(changed, Aspect::Expiry | Aspect::Value),
            Aspect::Expiry => changed == Aspect::Value,
            Aspect::Extra | Aspect::Value => false,
        }
    }
}

impl Finding {
    fn of(aspect: Aspect, detail: impl Into<String>) -> Compared {
        Compared::Differs(Self { aspect, detail: detail.into() })
    }

    pub fn kind(&self) -> DifferenceKind {
        match self.aspect {
            Aspect::Missing => DifferenceKind::Missing,
            Aspect::Extra => DifferenceKind::Extra,
            Aspect::Type | Aspect::Expiry | Aspect::Value => DifferenceKind::Different,
        }
    }
}

/// `before` and `after` are the source around the moment of `theirs`, the target.
pub(super) fn judge(before: &Mark, theirs: &Mark, after: &Mark, slack: Slack) -> Judged {
    // Only what was read at the same time can be told to be expiring: `before` was read long ago.
    if is_expiring(after, theirs, slack) {
        return Judged::Equal;
    }
    let now = match difference(after, theirs, slack) {
        Compared::Equal => return Judged::Equal,
        Compared::Heavy(kind) => return Judged::Heavy(kind),
        Compared::Differs(found) => found,
    };
    let then = match difference(before, theirs, slack) {
        Compared::Equal => return Judged::Equal,
        Compared::Heavy(kind) => return Judged::Heavy(kind),
        Compared::Differs(found) => found,
    };
    match difference(before, after, slack) {
        Compared::Equal => Judged::Differs(now),
        // Whether a heavy value changed is not known.
        Compared::Heavy(_) => Judged::Moving((now.aspect == then.aspect).then_some(now)),
        Compared::Differs(changed) => {
            let lasting = now.aspect == then.aspect && now.aspect.outlasts(changed.aspect);
            Judged::Moving(lasting.then_some(now))
        }
    }
}

/// A key about to expire may be gone on one side already.
fn is_expiring(ours: &Mark, theirs: &Mark, slack: Slack) -> bool {
    match (ours, theirs) {
        (Mark::Present { left: Expiry::At(left), .. }, Mark::Absent)
        | (Mark::Absent, Mark::Present { left: Expiry::At(left), .. }) => {
            *left <= TOLERANCE_MS.saturating_add(slack.reading)
        }
        _ => false,
    }
}

enum Compared {
    Equal,
    /// Equal but for a value that is too heavy to tell at once; its type.
    Heavy(String),
    Differs(Finding),
}

fn difference(ours: &Mark, theirs: &Mark, slack: Slack) -> Compared {
    match (ours, theirs) {
        (Mark::Absent, Mark::Absent) => Compared::Equal,
        (Mark::Present { kind, .. }, Mark::Absent) => Finding::of(Aspect::Missing, kind.as_str()),
        (Mark::Absent, Mark::Present { kind, .. }) => Finding::of(Aspect::Extra, kind.as_str()),
        (
            Mark::Present { kind: our_kind, expiry: our_expiry, value: ours, left: _ },
            Mark::Present { kind: their_kind, expiry: their_expiry, value: theirs, left: _ },
        ) => {
            if our_kind != their_kind {
                return Finding::of(Aspect::Type, format!("type {our_kind} ≠ {their_kind}"));
            }
            if let Some(apart) = our_expiry.apart(*their_expiry, slack.expiry) {
                return Finding::of(Aspect::Expiry, apart.to_string());
            }
            match (ours, theirs) {
                (Value::Ignored, _) | (_, Value::Ignored) => Compared::Equal,
                (Value::Marked(ours), Value::Marked(theirs)) if ours.agrees(theirs) => Compared::Equal,
                (Value::Marked(ours), Value::Marked(theirs)) => {
                    let decoded = ours.is_decoded() && theirs.is_decoded();
                    let what = if decoded { "value" } else { "serialized value, type not understood" };
                    Finding::of(Aspect::Value, what)
                }
                _ => Compared::Heavy(our_kind.clone()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::context::Abilities;
    use super::*;

    const ABILITIES: Abilities = Abilities { field_expiries: true, streams: true };
    const NONE: Slack = Slack { expiry: 0, reading: 0 };

    fn present(kind: &str, expiry: Expiry) -> Mark {
        Mark::Present { kind: kind.into(), expiry, left: expiry, value: Value::Ignored }
    }

    fn with_value(kind: &str, value: Value) -> Mark {
        Mark::Present { kind: kind.into(), expiry: Expiry::Never, left: Expiry::Never, value }
    }

    fn heavy(kind: &str) -> Mark {
        with_value(kind, Value::Heavy)
    }

    fn differs(judged: Judged) -> Option<(Aspect, String)> {
        match judged {
            Judged::Differs(found) => Some((found.aspect, found.detail)),
            _ => None,
        }
    }

    fn lasts(judged: Judged) -> Option<Aspect> {
        match judged {
            Judged::Moving(found) => found.map(|found| found.aspect),
            _ => panic!("the source was not at rest"),
        }
    }

    #[test]
    fn only_a_source_at_rest_convicts_at_once() {
        let key = || present("set", Expiry::Never);
        let found = differs(judge(&key(), &Mark::Absent, &key(), NONE));
        assert_eq!(found, Some((Aspect::Missing, "set".into())));
        // Created between the two readings: may be on its way.
        assert!(matches!(judge(&Mark::Absent, &Mark::Absent, &key(), NONE), Judged::Equal));
        let other = || present("list", Expiry::Never);
        let third = present("zset", Expiry::Never);
        assert_eq!(lasts(judge(&key(), &third, &other(), NONE)), None);
        assert!(matches!(judge(&key(), &other(), &other(), NONE), Judged::Equal));
        assert!(matches!(judge(&key(), &key(), &other(), NONE), Judged::Equal));
        let found = differs(judge(&Mark::Absent, &key(), &Mark::Absent, NONE));
        assert_eq!(found, Some((Aspect::Extra, "set".into())));
        let found = differs(judge(&key(), &other(), &key(), NONE));
        assert_eq!(found, Some((Aspect::Type, "type set ≠ list".into())));
    }

    /// A heavy value is never known to be at rest; this once let every heavy key that was missing pass.
    #[test]
    fn what_does_not_lie_in_the_value_is_found_whatever_the_value_does() {
        let payload =
            |byte: u8| Value::Marked(ValueMark::of(&[byte; 40], crate::version::Flavor::Redis, ABILITIES));
        for (before, after) in [
            (heavy("hash"), heavy("hash")),
            (with_value("hash", payload(1)), with_value("hash", payload(2))),
            (with_value("hash", payload(1)), heavy("hash")),
        ] {
            assert_eq!(lasts(judge(&before, &Mark::Absent, &after, NONE)), Some(Aspect::Missing));
            let other = with_value("list", payload(3));
            assert_eq!(lasts(judge(&before, &other, &after, NONE)), Some(Aspect::Type));
            let late = present("hash", Expiry::At(50_000));
            assert_eq!(lasts(judge(&before, &late, &after, NONE)), Some(Aspect::Expiry));
        }
        let changed = judge(
            &with_value("hash", payload(1)),
            &with_value("hash", payload(3)),
            &with_value("hash", payload(2)),
            NONE,
        );
        assert_eq!(lasts(changed), None);
        assert!(matches!(judge(&heavy("set"), &heavy("set"), &heavy("set"), NONE), Judged::Heavy(_)));
        // Deleted in between, or created: no more than a write on its way.
        assert_eq!(
            lasts(judge(&heavy("set"), &present("set", Expiry::At(90_000)), &Mark::Absent, NONE)),
            None
        );
    }

    #[test]
    fn keys_about_to_expire_are_no_difference() {
        let soon = || present("hash", Expiry::At(900));
        let later = || present("hash", Expiry::At(30_000));
        assert!(matches!(judge(&soon(), &Mark::Absent, &soon(), NONE), Judged::Equal));
        assert!(matches!(judge(&Mark::Absent, &soon(), &Mark::Absent, NONE), Judged::Equal));
        assert!(differs(judge(&later(), &Mark::Absent, &later(), NONE)).is_some());
        let found = differs(judge(&later(), &present("hash", Expiry::At(32_500)), &later(), NONE));
        assert_eq!(found, Some((Aspect::Expiry, "expiry 2.5 s apart".into())));
        // Its time was extended while the target had nothing of it.
        assert_eq!(lasts(judge(&soon(), &Mark::Absent, &later(), NONE)), Some(Aspect::Missing));
    }
}
