//! Numbers for people.

use std::time::Duration;

/// `0 B`, `512 B`, `1.5 MiB`.
pub fn bytes(count: i64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64;
    let mut unit = "B";
    for name in UNITS {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = name;
    }
    format!("{value:.1} {unit}")
}

/// `1,234,567`.
pub fn grouped(count: i64) -> String {
    let digits = count.unsigned_abs().to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if count < 0 {
        text.push('-');
    }
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 key`, `2,000 keys`.
pub fn counted(count: i64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// `350 ms`, `2.4 s`, `42 s`, `1 m 12 s`, `3 h 5 m`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..=9 => format!("{}.{} s", seconds, duration.subsec_millis() / 100),
        10..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} m {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// As [`duration`], of a status field.
pub fn millis(count: i64) -> String {
    duration(Duration::from_millis(u64::try_from(count).unwrap_or(0)))
}

/// As [`duration`], of a status field.
pub fn seconds(count: i64) -> String {
    duration(Duration::from_secs(u64::try_from(count).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(10 << 30), "10.0 GiB");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(counted(1, "key"), "1 key");
        assert_eq!(counted(2000, "key"), "2,000 keys");
        assert_eq!(millis(350), "350 ms");
        assert_eq!(millis(2450), "2.4 s");
        assert_eq!(seconds(72), "1 m 12 s");
        assert_eq!(seconds(11_100), "3 h 5 m");
    }
}
