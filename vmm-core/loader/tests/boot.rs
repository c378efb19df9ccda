//! Whole boots into private memory: what lies where, and what is refused.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failure is a failed test"
)]

use bulkhead_control_api::config::{CpuTopology, Loader};
use bulkhead_control_api::loader::{Region, Start};
use bulkhead_loader::boot::load;
use bulkhead_loader::{Error, Ram};

fn config(cmdline: &str) -> Loader {
    let cpus = CpuTopology { cpus: 2, sockets: 1, cores: 2, threads: 1 };
    Loader {
        kernel: "k".into(),
        initrd: Some("i".into()),
        cmdline: cmdline.into(),
        cpus,
        uuid: [0; 16],
        tables: Vec::new(),
    }
}

fn ram(low: u64) -> Ram {
    Ram::anonymous(vec![Region { gpa: 0, len: low }, Region { gpa: 4 << 30, len: 300 << 30 }]).unwrap()
}

fn read<const N: usize>(ram: &Ram, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.read(gpa, &mut bytes).unwrap();
    bytes
}

fn number(ram: &Ram, gpa: u64) -> u64 {
    u64::from_le_bytes(read(ram, gpa))
}

#[test]
fn the_native_guest_boots_in_16_mib() {
    let ram = ram(16 << 20);
    let initrd: Vec<u8> = (0..100_000u32).map(|i| (i % 255) as u8).collect();
    // What an earlier boot left behind, also where the guest's .bss is.
    ram.write(0x10_0000, &vec![0xaa; 1 << 20]).unwrap();
    let start = load(bulkhead_guest::ELF, Some(&initrd[..]), &[], &config("test=hello"), &ram).unwrap();
    let Start::Pvh32 { eip, ebx } = start else { panic!("{start:?}") };
    assert!(eip > 0x10_0000);
    let info = u64::from(ebx);
    assert_eq!(number(&ram, info) as u32, 0x336e_c578);
    assert_eq!(&read::<11>(&ram, number(&ram, info + 24)), b"test=hello\0");
    assert_eq!(&read::<8>(&ram, number(&ram, info + 32)), b"RSD PTR ");
    let module = number(&ram, info + 16);
    let (at, len) = (number(&ram, module), number(&ram, module + 8));
    assert_eq!((at, len), (((16 << 20) - 100_000) & !0xfff, 100_000));
    let mut back = vec![0; initrd.len()];
    ram.read(at, &mut back).unwrap();
    assert!(back == initrd);
    let (map, entries) = (number(&ram, info + 40), number(&ram, info + 48) as u32);
    assert_eq!(number(&ram, map + u64::from(entries - 1) * 24 + 8), 300 << 30);
    // The guest's memory image: as in the file, then zeros.
    let header = |at: usize| u64::from_le_bytes(bulkhead_guest::ELF[at..at + 8].try_into().unwrap());
    let load_header = 64 + 56;
    let (gpa, file_len, len) = (header(load_header + 24), header(load_header + 32), header(load_header + 40));
    let mut bss = vec![0xff; (len - file_len) as usize];
    ram.read(gpa + file_len, &mut bss).unwrap();
    assert!(bss.len() > 1000 && bss.iter().all(|&byte| byte == 0));
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_before_anything_is_written() {
    let ram = ram(16 << 20);
    let huge = vec![1; 15 << 20];
    let failure = load(bulkhead_guest::ELF, Some(&huge[..]), &[], &config(""), &ram).unwrap_err();
    assert!(matches!(failure.error, Error::NoRoomForInitrd { .. }), "{failure}");
    assert!(failure.to_string().starts_with("initrd i: "), "{failure}");
    assert_eq!(read::<4096>(&ram, 0x10_0000), [0; 4096]);
    assert_eq!(read::<4096>(&ram, 0x6000), [0; 4096]);
    let failure = load(bulkhead_guest::ELF, Some(&[][..]), &[], &config(""), &ram).unwrap_err();
    assert!(matches!(failure.error, Error::EmptyInitrd), "{failure}");
}

#[test]
fn the_users_tables_lie_at_the_end_of_the_low_ram() {
    let ram = ram(16 << 20);
    let tables = [vec![0x41; 0xffff], vec![0x42; 36]];
    let initrd = [7; 5000];
    let load = |kernel: &[u8], tables: &[Vec<u8>], ram: &Ram| {
        load(kernel, Some(&initrd[..]), tables, &config(""), ram)
    };
    let Start::Pvh32 { ebx, .. } = load(bulkhead_guest::ELF, &tables, &ram).unwrap() else { panic!() };
    // 64 KiB and 48 bytes, in whole pages.
    let top = (16 << 20) - 0x1_1000;
    assert_eq!((read::<1>(&ram, top + 0xfffe), read::<2>(&ram, top + 0x1_0000)), ([0x41], [0x42; 2]));
    let info = u64::from(ebx);
    let module = number(&ram, info + 16);
    assert_eq!((number(&ram, module), number(&ram, module + 8)), (top - 0x2000, 5000));
    let (map, entries) = (number(&ram, info + 40), number(&ram, info + 48));
    let is_there = |wanted: [u64; 3]| {
        (0..entries & 0xff).any(|n| [0, 8, 16].map(|at| number(&ram, map + n * 24 + at)) == wanted)
    };
    assert!(is_there([top, 0x1_1000, 3]) && is_there([1 << 20, top - (1 << 20), 1]));
    let xsdt = number(&ram, number(&ram, info + 32) + 24);
    assert_eq!((number(&ram, xsdt + 36 + 24), number(&ram, xsdt + 36 + 32)), (top, top + 0x1_0000));
    // Where there is no room, nothing is written.
    let small = Ram::anonymous(vec![Region { gpa: 0, len: 2 << 20 }]).unwrap();
    let failure = load(bulkhead_guest::ELF, &vec![vec![0; 0xffff]; 32], &small).unwrap_err();
    assert!(matches!(failure.error, Error::NoRoomForTables(0x20_0000)), "{failure}");
    let failure = load(bulkhead_guest::ELF, &vec![vec![0; 0xffff]; 15], &small).unwrap_err();
    assert!(matches!(failure.error, Error::BeyondRam { limit: 0x11_0000, .. }), "{failure}");
    assert_eq!(read::<4096>(&small, 0xe_0000), [0; 4096]);
}

#[test]
fn command_lines_are_checked() {
    let ram = ram(16 << 20);
    let boot = |cmdline: &str| load(bulkhead_guest::ELF, None, &[], &config(cmdline), &ram);
    assert!(matches!(boot(&"x".repeat(0x1_0000)).unwrap_err().error, Error::CommandLine { .. }));
    assert!(matches!(boot("a\0b").unwrap_err().error, Error::CommandLineNul));
    boot(&"x".repeat(0xffff)).unwrap();
    boot("").unwrap();
}

#[test]
fn an_elf_file_without_a_note_says_what_to_do() {
    let program = std::fs::read("/proc/self/exe").unwrap();
    let failure = load(&program[..], None, &[], &config(""), &ram(2 << 30)).unwrap_err();
    assert!(failure.to_string().starts_with("kernel k: cannot be booted: "), "{failure}");
    let mut elf = bulkhead_guest::ELF.to_vec();
    let note = elf.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
    elf[note] = b'Y';
    let failure = load(&elf[..], None, &[], &config(""), &ram(16 << 20)).unwrap_err();
    assert!(failure.to_string().contains("CONFIG_PVH"), "{failure}");
}
