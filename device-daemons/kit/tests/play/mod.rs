//! A driver that does anything with a ring, from a string of bytes; what a device gets is checked.

use std::sync::Arc;

use bulkhead_kit::chain::{Chain, MAX_PARTS};
use bulkhead_kit::inflight::Fresh;
use bulkhead_kit::memory::Memory;
use bulkhead_kit::ring::{Ring, Setup};
use vm_memory::{Bytes as _, GuestAddress};

const RAM: u64 = 0x1_0000;
const SIZE: u16 = 8;
const AVAIL: u64 = 0x100;
const USED: u64 = 0x140;

fn write(memory: &Memory, at: u64, bytes: &[u8]) {
    // What is outside is not written.
    let _ = memory.write_slice(bytes, GuestAddress(at));
}

/// Everything that a device does with a request is inside of memory, and there is not too much of it.
fn check(memory: &Memory, chain: &Chain) {
    let mut buffer = [0; 300];
    for (bytes, len) in
        [(chain.readable(), chain.readable().len()), (chain.writable(), chain.writable().len())]
    {
        let pieces: Vec<_> = bytes.pieces().collect();
        assert!(pieces.len() <= MAX_PARTS);
        assert!(pieces.iter().all(|(at, len)| *len > 0 && at + u64::from(*len) <= RAM), "{pieces:?}");
        assert_eq!(pieces.iter().map(|(_, len)| u64::from(*len)).sum::<u64>(), len);
        let half = bytes.slice(len / 2, len - len / 2).map(|half| half.len());
        assert_eq!(half, Some(len - len / 2));
        assert!(bytes.slice(len, 1).is_none());
    }
    let read = chain.readable().read(memory, &mut buffer);
    assert_eq!(read.ok().and_then(|n| u64::try_from(n).ok()), Some(chain.readable().len().min(300)));
}

/// Plays what the input says: five bytes are one move. Returns how many requests the device got.
pub fn play(input: &[u8]) -> usize {
    let ranges = [(GuestAddress(0), usize::try_from(RAM).unwrap_or_default())];
    let Ok(memory) = Memory::from_ranges(&ranges) else { return 0 };
    let memory = Arc::new(memory);
    let Some((first, moves)) = input.split_first() else { return 0 };
    let fresh = Fresh::new(1, SIZE).ok().filter(|_| first & 1 != 0);
    let area = fresh.as_ref().and_then(|fresh| fresh.give(1, SIZE).ok()).map(|(area, ..)| area);
    let setup = || Setup {
        index: 0,
        size: SIZE,
        desc: 0,
        avail: AVAIL,
        used: USED,
        base: 0,
        event_idx: first & 2 != 0,
        call: None,
        tracker: area.as_ref().and_then(|area| area.tracker(0, SIZE)),
    };
    let Ok(mut ring) = Ring::new(setup(), Arc::clone(&memory)) else { return 0 };
    let (mut held, mut index, mut taken) = (Vec::new(), 0u16, 0);
    for action in moves.chunks_exact(5) {
        let &[kind, a, b, c, d] = action else { continue };
        match kind % 8 {
            // A descriptor, in the queue's table or in one that a descriptor may name.
            0..=2 => {
                let table = if kind & 0x10 == 0 { 0 } else { 0x200 };
                let addr = u64::from(b) << if kind & 0x20 == 0 { 8 } else { 4 };
                let len = if kind & 0x40 == 0 { u32::from(c) * 16 } else { u32::from(c) << 24 };
                let flags = u16::from(d & 7);
                let next = u16::from(d >> 4);
                let bytes =
                    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
                write(&memory, table + 16 * u64::from(a % 16), &bytes.concat());
            }
            // A request.
            3 | 4 => {
                write(&memory, AVAIL + 4 + 2 * u64::from(index % SIZE), &u16::from(a % 10).to_le_bytes());
                index = index.wrapping_add(1);
                write(&memory, AVAIL + 2, &index.to_le_bytes());
            }
            // Anything anywhere near.
            5 if kind & 0x80 != 0 => write(&memory, u64::from(a) * 2, &[b, c]),
            5 | 6 => {
                let most = taken + usize::from(SIZE) + 1;
                while let Some(chain) = ring.pop() {
                    check(&memory, &chain);
                    taken += 1;
                    assert!(taken <= most, "a ring gives more than it holds");
                    held.push(chain);
                }
            }
            _ => {
                for chain in held.drain(..).skip(usize::from(a & 1)) {
                    ring.done(chain, d.into());
                }
                ring.signal();
            }
        }
    }
    // A successor gets what is in flight and in the ring, and no more than both can hold.
    if let Ok(mut successor) = Ring::new(setup(), Arc::clone(&memory)) {
        let mut count = 0;
        while let Some(chain) = successor.pop() {
            check(&memory, &chain);
            count += 1;
            assert!(chain.head() < SIZE && count <= 2 * SIZE, "a successor gets more than there is");
        }
    }
    taken
}
