//! Which blocks of the region are plugged, and which chunks have one.

use std::ops::Range;

const WORD: u64 = 64;

/// The plugged blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    words: Vec<u64>,
    count: u64,
    /// Blocks of a chunk.
    per_chunk: u64,
    plugged: u64,
}

impl Blocks {
    /// None of `count` is plugged; `per_chunk` of them are a chunk. Both numbers are the machine's, not the guest's.
    #[must_use]
    pub fn new(count: u64, per_chunk: u64) -> Self {
        let words = usize::try_from(count.div_ceil(WORD)).unwrap_or(0);
        Self { words: vec![0; words], count, per_chunk: per_chunk.max(1), plugged: 0 }
    }

    /// As `words` say, 64 blocks in each, the lowest bit first; none if that is no map of so many blocks.
    #[must_use]
    pub fn from_words(&self, words: Vec<u64>) -> Option<Self> {
        let beyond = self.count % WORD;
        let clean = beyond == 0 || words.last().is_none_or(|last| last >> beyond == 0);
        if words.len() != self.words.len() || !clean {
            return None;
        }
        let plugged = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Some(Self { words, plugged, ..*self })
    }

    /// The map, see [`Blocks::from_words`].
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many there are.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// How many are plugged.
    #[must_use]
    pub const fn plugged(&self) -> u64 {
        self.plugged
    }

    /// How many chunks there are.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.count.div_ceil(self.per_chunk)
    }

    fn has(&self, block: u64) -> bool {
        let word = usize::try_from(block / WORD).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & 1 << (block % WORD) != 0)
    }

    /// Whether every block of the range is plugged (`true`) or none is (`false`); none if it is neither.
    #[must_use]
    pub fn state(&self, range: Range<u64>) -> Option<bool> {
        let first = self.has(range.start);
        range.into_iter().all(|block| self.has(block) == first).then_some(first)
    }

    /// Plugs or unplugs all of the range. What is beyond the region is left out.
    pub fn set(&mut self, range: Range<u64>, plugged: bool) {
        for block in range.start..range.end.min(self.count) {
            if self.has(block) == plugged {
                continue;
            }
            if let Some(word) = usize::try_from(block / WORD).ok().and_then(|index| self.words.get_mut(index))
            {
                *word ^= 1 << (block % WORD);
                self.plugged = if plugged { self.plugged + 1 } else { self.plugged.saturating_sub(1) };
            }
        }
    }

    /// Chunks that the range touches.
    #[must_use]
    pub const fn chunks_of(&self, range: &Range<u64>) -> Range<u64> {
        range.start / self.per_chunk..range.end.div_ceil(self.per_chunk)
    }

    /// Blocks of a chunk.
    #[must_use]
    pub fn blocks_of(&self, chunk: u64) -> Range<u64> {
        let start = chunk.saturating_mul(self.per_chunk).min(self.count);
        start..start.saturating_add(self.per_chunk).min(self.count)
    }

    /// Whether a block of the chunk is plugged.
    #[must_use]
    pub fn is_used(&self, chunk: u64) -> bool {
        self.blocks_of(chunk).any(|block| self.has(block))
    }

    /// Runs of plugged blocks, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..self.count).find(|block| self.has(*block))?;
            let end = (start..self.count).find(|block| !self.has(*block)).unwrap_or(self.count);
            next = end;
            Some(start..end)
        })
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "numbers of a few blocks")]
mod tests {
    use bulkhead_control_api::side::{MAX_PIECES, chunk_len};

    use super::*;

    #[test]
    fn a_region_has_at_most_256_chunks() {
        let (mib, gib, tib) = (1 << 20, 1 << 30, 1 << 40);
        for (len, block, chunk) in [
            (gib, 2 * mib, 128 * mib),
            (32 * gib, 2 * mib, 128 * mib),
            (64 * gib, 2 * mib, 256 * mib),
            (33 * gib, 64 * mib, 192 * mib),
            (tib, gib, 4 * gib),
            (2 * gib, gib, gib),
        ] {
            assert_eq!(chunk_len(len, block), chunk, "{len} {block}");
            assert!(len.div_ceil(chunk) <= MAX_PIECES.into());
        }
        assert!(chunk_len(u64::MAX, 1 << 63) > 0, "no overflow");
    }

    /// Every sequence of three changes of a small region, against a list of booleans.
    #[test]
    fn the_map_is_what_was_set() {
        const COUNT: u64 = 5;
        let ranges: Vec<Range<u64>> =
            (0..COUNT).flat_map(|start| (start + 1..=COUNT).map(move |end| start..end)).collect();
        let changes: Vec<_> =
            ranges.iter().flat_map(|range| [(range.clone(), true), (range.clone(), false)]).collect();
        for first in &changes {
            for second in &changes {
                let mut blocks = Blocks::new(COUNT, 2);
                let mut model = [false; COUNT as usize];
                for (range, plugged) in [first, second] {
                    blocks.set(range.clone(), *plugged);
                    range.clone().for_each(|block| model[block as usize] = *plugged);
                }
                assert_eq!(blocks.plugged(), model.iter().filter(|on| **on).count() as u64);
                for range in &ranges {
                    let part = &model[range.start as usize..range.end as usize];
                    let want = part.iter().all(|on| *on == part[0]).then_some(part[0]);
                    assert_eq!(blocks.state(range.clone()), want, "{model:?} {range:?}");
                }
                for chunk in 0..blocks.chunks() {
                    let part = &model[chunk as usize * 2..(chunk as usize * 2 + 2).min(COUNT as usize)];
                    assert_eq!(blocks.is_used(chunk), part.contains(&true));
                }
                let runs: Vec<u64> = blocks.runs().flatten().collect();
                assert!((0..COUNT).all(|block| runs.contains(&block) == model[block as usize]));
                assert_eq!(Blocks::new(COUNT, 2).from_words(blocks.words().to_vec()), Some(blocks));
            }
        }
    }

    #[test]
    fn a_map_of_another_region_is_refused() {
        let blocks = Blocks::new(65, 64);
        assert!(blocks.from_words(vec![0]).is_none() && blocks.from_words(vec![0; 3]).is_none());
        assert!(blocks.from_words(vec![0, 2]).is_none(), "a block beyond the end");
        assert_eq!(blocks.from_words(vec![1, 1]).map(|blocks| blocks.plugged()), Some(2));
        let mut blocks = Blocks::new(65, 64);
        blocks.set(60..u64::MAX, true);
        assert_eq!((blocks.plugged(), blocks.chunks()), (5, 2));
        assert_eq!(blocks.chunks_of(&(63..65)), 0..2);
    }
}
