//! Hundreds of damaged kernels: each is loaded within bounds or refused with one line, never a panic.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests: a failure is a failed test"
)]

use bulkhead_control_api::config::{CpuTopology, Loader};
use bulkhead_control_api::loader::{Region, Start};
use bulkhead_loader::boot::load;
use bulkhead_loader::{Error, Ram};

const RAM: u64 = 64 << 20;
const CANARY: [u8; 16] = [0xc5; 16];

fn config() -> Loader {
    let cpus = CpuTopology { cpus: 2, sockets: 1, cores: 2, threads: 1 };
    Loader {
        kernel: "image".into(),
        initrd: Some("initrd".into()),
        cmdline: "test=hello".into(),
        cpus,
        uuid: [0; 16],
        tables: Vec::new(),
    }
}

fn ram() -> Ram {
    Ram::anonymous(vec![Region { gpa: 0, len: RAM }]).unwrap()
}

/// A small bzImage with the header fields of Debian's kernels and 64 KiB of payload.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 8 * 512 + 0x1_0000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[7]);
    put(0x1f4, &0x1000u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 0x15, 0x7f, 0]);
    put(0x238, &0x7ffu32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x100_0000u32.to_le_bytes());
    image
}

/// xorshift64: the same images in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

/// Damages `image` in one of a few ways, mostly where its headers are.
fn mutate(image: &mut Vec<u8>, headers: &[(usize, usize)], random: &mut Random) {
    const EXTREMES: [u64; 10] =
        [0, 1, 0x7f, 0xff, 0xfff, 0x10_0000, 0x7fff_ffff, 0xffff_ffff, u64::MAX >> 1, u64::MAX];
    for _ in 0..=random.below(3) {
        let (start, end) = headers[random.below(headers.len())];
        let at = (start + random.below(end - start)).min(image.len() - 1);
        match random.below(5) {
            0 => image[at] ^= 1 << random.below(8),
            1 => image[at] = u8::try_from(random.next() & 0xff).unwrap(),
            2 => {
                let keep = random.below(image.len());
                image.truncate(keep.max(1));
            }
            width => {
                let value = EXTREMES[random.below(EXTREMES.len())].to_le_bytes();
                let field = &value[..[2, 4, 8][width - 3 + random.below(2)]];
                for (to, from) in image[at..].iter_mut().zip(field) {
                    *to = *from;
                }
            }
        }
    }
}

/// Loads an image; returns whether that worked. Checks what must hold in any case.
fn try_load(image: &[u8], ram: &Ram) -> bool {
    let initrd = [0x5a; 5000];
    // A canary where only an overflow of the loader's own area could reach it.
    ram.write(0x8800, &CANARY).unwrap();
    let outcome = load(image, Some(&initrd[..]), &[], &config(), ram);
    let mut canary = [0; 16];
    ram.read(0x8800, &mut canary).unwrap();
    assert_eq!(canary, CANARY);
    match outcome {
        Ok(Start::Long64 { rip, .. }) => {
            assert!((0x10_0200..RAM).contains(&rip));
            true
        }
        Ok(Start::Pvh32 { eip, .. }) => {
            assert!((0x10_0000..RAM).contains(&eip.into()));
            true
        }
        Err(failure) => {
            let line = failure.to_string();
            assert!(!line.contains('\n') && line.len() < 300, "{line}");
            // A failure after the checks would mean a partial boot.
            assert!(!matches!(failure.error, Error::Memory(_) | Error::Read(_)), "{line}");
            false
        }
    }
}

fn hammer(image: &[u8], headers: &[(usize, usize)], count: usize, seed: u64) {
    let (mut random, mut loaded, ram) = (Random(seed), 0, ram());
    assert!(try_load(image, &ram), "the undamaged image");
    for _ in 0..count {
        let mut damaged = image.to_vec();
        mutate(&mut damaged, headers, &mut random);
        loaded += usize::from(try_load(&damaged, &ram));
    }
    assert!(loaded > 0 && loaded < count, "{loaded} of {count} were loaded: the mutator is off");
}

#[test]
fn damaged_bzimages() {
    hammer(&bzimage(), &[(0x1f1, 0x268), (0x230, 0x264), (0x1f1, 0x1f8)], 2000, 0x9e37_79b9_7f4a_7c15);
}

#[test]
fn damaged_elf_files() {
    let elf = bulkhead_guest::ELF;
    let note = elf.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
    hammer(elf, &[(0, 64), (64, 64 + 2 * 56), (note - 12, note + 12)], 2000, 0xd1b5_4a32_d192_ed03);
}

#[test]
fn every_truncation_of_the_headers_is_refused_or_loaded() {
    let (elf, ram) = (bulkhead_guest::ELF, ram());
    for len in (0..0x300).chain([elf.len() - 1]) {
        try_load(&elf[..len.min(elf.len())], &ram);
        assert!(!try_load(&bzimage()[..len.min(0x1000)], &ram), "{len}");
    }
}

#[test]
fn files_that_are_no_kernels() {
    for image in [&b"#!/bin/sh\n"[..], &[], &[0; 4096], &[0xff; 4096], b"\x7fELF"] {
        assert!(!try_load(image, &ram()));
    }
}
