//! Page frame numbers of the guest, collected over a whole kick, as the fewest ranges to free.

/// Size of the pages that the balloon counts in, in bytes (virtio 1.2, 5.5.6: always 4,096).
pub const PAGE: u64 = 4096;
/// The most numbers that wait; then they are carried out, and collecting goes on.
pub const MAX_WAITING: usize = 65_536;

/// A range of page frame numbers: `first..first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First number.
    pub first: u64,
    /// How many, at least 1.
    pub count: u64,
}

/// A piece of guest RAM: the file that backs it and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First page frame number.
    pub first: u64,
    /// Pages.
    pub count: u64,
    /// Pages of 4,096 bytes that the file frees at once, a power of two: 1, or more for huge pages.
    pub granule: u64,
}

/// Where a range is: a region by its index, and pages from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the region.
    pub region: usize,
    /// Pages from the start of the region.
    pub offset: u64,
    /// How many.
    pub count: u64,
}

/// Numbers that the guest has named since they were last carried out.
#[derive(Debug, Default)]
pub struct Waiting {
    numbers: Vec<u32>,
}

impl Waiting {
    /// Adds what is in `bytes`, little-endian 32-bit numbers; returns how many bytes were taken: fewer than there
    /// are when no more fit, and never a part of a number.
    pub fn add(&mut self, bytes: &[u8]) -> usize {
        let room = MAX_WAITING - self.numbers.len().min(MAX_WAITING);
        let numbers = bytes.chunks_exact(4).take(room).filter_map(|chunk| chunk.first_chunk::<4>());
        let before = self.numbers.len();
        self.numbers.extend(numbers.map(|chunk| u32::from_le_bytes(*chunk)));
        (self.numbers.len() - before) * 4
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Hands all numbers to `each` as the fewest ranges, in ascending order, and forgets them. The guest may not use a
    /// page before its buffer is returned, so the order within a kick is free.
    pub fn take(&mut self, mut each: impl FnMut(Run)) {
        self.numbers.sort_unstable();
        let mut run: Option<Run> = None;
        for number in self.numbers.drain(..).map(u64::from) {
            match &mut run {
                // The same number twice.
                Some(Run { first, count }) if number < *first + *count => {}
                Some(Run { first, count }) if number == *first + *count => *count += 1,
                _ => {
                    if let Some(done) = run.replace(Run { first: number, count: 1 }) {
                        each(done);
                    }
                }
            }
        }
        if let Some(done) = run {
            each(done);
        }
    }
}

/// Cuts a range into its pieces in the regions, which are in ascending order; pages outside of all are left out.
pub fn cut(run: Run, regions: &[Region], mut each: impl FnMut(Piece)) {
    let end = run.first.saturating_add(run.count);
    for (index, region) in regions.iter().enumerate() {
        let from = run.first.max(region.first);
        let to = end.min(region.first.saturating_add(region.count));
        if from < to {
            each(Piece { region: index, offset: from - region.first, count: to - from });
        }
    }
}

/// Which pages of a region are in the balloon, where the file frees more than one at once.
#[derive(Debug, Default)]
pub struct Held {
    words: Vec<u64>,
}

impl Held {
    /// None of `pages`. The number is that of RAM that the machine has, not the guest's.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(0)] }
    }

    fn set(&mut self, page: u64, held: bool) {
        let word = usize::try_from(page / 64).ok().and_then(|index| self.words.get_mut(index));
        if let Some(word) = word {
            let bit = 1 << (page % 64);
            *word = if held { *word | bit } else { *word & !bit };
        }
    }

    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// Takes pages out of the balloon.
    pub fn give_back(&mut self, offset: u64, count: u64) {
        (offset..offset.saturating_add(count)).for_each(|page| self.set(page, false));
    }

    /// Puts pages into the balloon; `each` gets the ranges of whole granules that are in it now and that this has
    /// touched.
    pub fn hold(&mut self, offset: u64, count: u64, granule: u64, mut each: impl FnMut(u64, u64)) {
        let end = offset.saturating_add(count);
        (offset..end).for_each(|page| self.set(page, true));
        let granule = granule.max(1);
        let mut run: Option<(u64, u64)> = None;
        for index in offset / granule..end.div_ceil(granule) {
            let start = index.saturating_mul(granule);
            if (start..start.saturating_add(granule)).all(|page| self.has(page)) {
                match &mut run {
                    Some((_, pages)) => *pages += granule,
                    None => run = Some((start, granule)),
                }
            } else if let Some((start, pages)) = run.take() {
                each(start, pages);
            }
        }
        if let Some((start, pages)) = run {
            each(start, pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn bytes(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    fn runs(numbers: &[u32]) -> Vec<Run> {
        let mut waiting = Waiting::default();
        assert_eq!(waiting.add(&bytes(numbers)), numbers.len() * 4);
        let mut runs = Vec::new();
        waiting.take(|run| runs.push(run));
        assert!(waiting.is_empty());
        runs
    }

    /// Every sequence of up to five numbers out of six, the last of which is the largest there is.
    #[test]
    fn ranges_are_exactly_the_numbers_and_as_few_as_can_be() {
        const NAMES: [u32; 6] = [0, 1, 2, 3, u32::MAX - 1, u32::MAX];
        for length in 0..=5u32 {
            for code in 0..6usize.pow(length) {
                let numbers: Vec<u32> =
                    (0..length).map(|place| NAMES[code / 6usize.pow(place) % 6]).collect();
                let runs = runs(&numbers);
                let want: BTreeSet<u64> = numbers.iter().map(|n| u64::from(*n)).collect();
                let got: Vec<u64> = runs.iter().flat_map(|r| r.first..r.first + r.count).collect();
                assert_eq!(got, want.into_iter().collect::<Vec<_>>(), "{numbers:?}");
                assert!(runs.windows(2).all(|w| w[0].first + w[0].count < w[1].first), "{runs:?}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_left() {
        let mut waiting = Waiting::default();
        let many = bytes(&vec![7; MAX_WAITING + 1]);
        assert_eq!(waiting.add(&many), MAX_WAITING * 4);
        assert_eq!(waiting.add(&many), 0);
        waiting.take(|run| assert_eq!(run, Run { first: 7, count: 1 }));
        assert_eq!(waiting.add(&[1, 2, 3]), 0, "no whole number");
    }

    /// Every range over a small map with a hole, against the definition.
    #[test]
    fn pieces_are_the_pages_that_exist() {
        let region = |first, count| Region { first, count, granule: 1 };
        let regions = [region(0, 4), region(6, 3)];
        for first in 0..12 {
            for count in 1..12 {
                let mut got = Vec::new();
                cut(Run { first, count }, &regions, |piece| {
                    let base = regions[piece.region].first + piece.offset;
                    got.extend(base..base + piece.count);
                });
                let want: Vec<u64> =
                    (first..first + count).filter(|p| *p < 4 || (6..9).contains(p)).collect();
                assert_eq!(got, want);
            }
        }
        cut(Run { first: u64::MAX - 1, count: u64::MAX }, &regions, |piece| panic!("{piece:?}"));
    }

    /// Every set of pages of three granules of two, put in as every range: only whole granules are freed.
    #[test]
    fn huge_pages_are_freed_when_they_are_whole() {
        for before in 0..64u64 {
            for offset in 0..6 {
                for count in 1..=6 - offset {
                    let mut held = Held::new(6);
                    (0..6).filter(|p| before >> p & 1 == 1).for_each(|p| held.set(p, true));
                    let mut freed = 0u64;
                    held.hold(offset, count, 2, |start, pages| {
                        (start..start + pages).for_each(|p| freed |= 1 << p);
                    });
                    let now = before | (offset..offset + count).fold(0, |all, p| all | 1 << p);
                    for granule in 0..3 {
                        let touched = offset < granule * 2 + 2 && granule * 2 < offset + count;
                        let whole = now >> (granule * 2) & 3 == 3;
                        let want = if touched && whole { 3 } else { 0 };
                        assert_eq!(freed >> (granule * 2) & 3, want, "{before:#b} {offset} {count}");
                    }
                }
            }
        }
        let mut held = Held::new(4);
        held.hold(0, 2, 2, |start, pages| assert_eq!((start, pages), (0, 2)));
        held.give_back(1, 1);
        held.hold(0, 1, 2, |start, pages| panic!("{start} {pages}"));
        held.hold(u64::MAX - 1, 1, 2, |start, pages| panic!("{start} {pages}"));
    }
}
