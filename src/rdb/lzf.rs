//! LZF expansion, whole and in pieces. Format source: liblzf `lzf_d.c`.
//!
//! Redis writes single strings of hundreds of megabytes as one LZF string, so expansion must be
//! able to stop and go on with nothing but the last [`WINDOW`] bytes of its output.

use super::error::Fault;

/// How far back a reference can reach.
pub(super) const WINDOW: usize = 8192;
/// Three bytes of input make at most 264 bytes of output.
const MAX_GROWTH: usize = 88;
/// The longest instruction: a control byte and 32 literals.
pub(super) const LONGEST_STEP: usize = 33;

/// Appends the expansion of `compressed`, which must be exactly `length` bytes.
pub(super) fn expand(compressed: &[u8], length: usize, out: &mut Vec<u8>) -> Result<(), Fault> {
    if length > compressed.len().saturating_mul(MAX_GROWTH) {
        return Err(Fault::Lzf);
    }
    out.reserve(length);
    let floor = out.len();
    let end = floor + length;
    let mut at = 0;
    while at < compressed.len() {
        at += step(compressed, at, floor, end, out)?.ok_or(Fault::Lzf)?;
    }
    if out.len() == end { Ok(()) } else { Err(Fault::Lzf) }
}

/// Carries out the instruction at `input[at]`: how many bytes it takes, or `None` when they are not
/// all there. References must not reach before `out[floor]`, and `out` must not grow beyond `end`.
#[inline]
pub(super) fn step(
    input: &[u8],
    at: usize,
    floor: usize,
    end: usize,
    out: &mut Vec<u8>,
) -> Result<Option<usize>, Fault> {
    let Some(&control) = input.get(at) else { return Ok(None) };
    if control < 32 {
        let count = usize::from(control) + 1;
        let Some(literals) = input.get(at + 1..at + 1 + count) else { return Ok(None) };
        if count > end.saturating_sub(out.len()) {
            return Err(Fault::Lzf);
        }
        out.extend_from_slice(literals);
        return Ok(Some(1 + count));
    }
    let mut taken = 1;
    let mut count = usize::from(control >> 5);
    if count == 7 {
        let Some(&more) = input.get(at + taken) else { return Ok(None) };
        count += usize::from(more);
        taken += 1;
    }
    count += 2;
    let Some(&low) = input.get(at + taken) else { return Ok(None) };
    taken += 1;
    let back = (usize::from(control & 0x1f) << 8 | usize::from(low)) + 1;
    let from = out.len().checked_sub(back).filter(|&from| from >= floor).ok_or(Fault::Lzf)?;
    if count > end.saturating_sub(out.len()) {
        return Err(Fault::Lzf);
    }
    if back >= count {
        out.extend_from_within(from..from + count);
    } else {
        // The reference overlaps what it writes: the last `back` bytes repeat.
        let mut left = count;
        while left > 0 {
            let part = left.min(out.len() - from);
            out.extend_from_within(from..from + part);
            left -= part;
        }
    }
    Ok(Some(taken))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_overlapping_references() {
        let mut out = b"kept".to_vec();
        // "ab", then 9 + 2 … bytes from 2 back: length code 7 + 0 → 9 bytes.
        expand(&[1, b'a', b'b', 7 << 5, 0, 1], 11, &mut out).unwrap();
        assert_eq!(out, b"keptabababababa");
    }

    #[test]
    fn references_never_reach_before_the_string() {
        let mut out = b"secret".to_vec();
        assert_eq!(expand(&[0, b'a', 1 << 5, 3], 4, &mut out), Err(Fault::Lzf));
    }

    #[test]
    fn length_must_match_and_be_possible() {
        assert_eq!(expand(&[0, b'a'], 2, &mut Vec::new()), Err(Fault::Lzf));
        assert_eq!(expand(&[1, b'a', b'b'], 1, &mut Vec::new()), Err(Fault::Lzf));
        assert_eq!(expand(&[0, b'a'], usize::MAX, &mut Vec::new()), Err(Fault::Lzf));
    }
}
