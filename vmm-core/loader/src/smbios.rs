//! SMBIOS: what the guest's tools call the machine (DMTF DSP0134, 3.0.0). The entry point is the 64-bit one, the structures
//! follow it.
//!
//! There is no firmware, so nothing here is anybody's but ours: names, the UUID of `-uuid`, vCPUs, RAM.

use bulkhead_control_api::config::{CpuTopology, Loader};
use bulkhead_control_api::loader::Region;

use crate::Error;
use crate::bytes::put;
use crate::layout::{SMBIOS, SMBIOS_END};

/// Size of the entry point (5.2.2), and where the structures begin behind it.
const ENTRY: usize = 24;
const STRUCTURES: usize = 32;
/// Version of the specification.
const VERSION: [u8; 3] = [3, 0, 0];
/// Size of a structure's header: type, size, handle.
const HEADER: usize = 4;
/// RAM is shown as modules of this size, the last one being what is left.
const MODULE: u64 = 16 << 30;
const MIB: u64 = 1 << 20;
/// There is no structure to refer to.
const NO_HANDLE: [u8; 2] = [0xfe, 0xff];
/// The structure that RAM belongs to.
const ARRAY: u16 = 0x1000;

const MAKER: &str = "Bulkhead";
const PRODUCT: &str = "Bulkhead virtual machine";
const RELEASE: &str = env!("CARGO_PKG_VERSION");
/// The year tells old machines, of which an operating system expects less.
const DATE: &str = "01/01/2026";

/// All structures, one after the other.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
}

/// A structure that is being made.
struct Structure {
    fields: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    /// A structure of `size` bytes without its strings (6.1.2), zero but for its header.
    fn new(kind: u8, handle: u16, size: u8) -> Self {
        let mut fields = vec![0; usize::from(size).max(HEADER)];
        put(&mut fields, 0, &[kind, size]);
        put(&mut fields, 2, &handle.to_le_bytes());
        Self { fields, strings: Vec::new(), count: 0 }
    }

    /// Sets a field.
    fn set(mut self, at: usize, value: &[u8]) -> Self {
        put(&mut self.fields, at, value);
        self
    }

    /// Sets a field to a string (6.1.3).
    fn text(mut self, at: usize, text: &str) -> Self {
        self.count = self.count.saturating_add(1);
        self.strings.extend(text.bytes().chain([0]));
        let number = [self.count];
        self.set(at, &number)
    }
}

impl Structures {
    fn add(&mut self, Structure { fields, strings, .. }: Structure) {
        self.bytes.extend(fields);
        // The strings end with a null, and where there are none stand two.
        self.bytes.extend(if strings.is_empty() { vec![0, 0] } else { [&strings[..], &[0]].concat() });
    }

    /// Types 0, 1 and 3: firmware, machine, chassis.
    fn machine(&mut self, uuid: [u8; 16]) {
        // Characteristics are not supported; it is a virtual machine (7.1.2).
        let firmware = Structure::new(0, 0, 24).set(10, &[1 << 3]).set(19, &[1 << 4]);
        // No embedded controller.
        let firmware = firmware.set(20, &[0, 0, 0xff, 0xff]);
        self.add(firmware.text(4, MAKER).text(5, RELEASE).text(8, DATE));
        // Woken by the power switch.
        let system = Structure::new(1, 0x100, 27).set(8, &wire_order(uuid)).set(24, &[6]);
        self.add(system.text(4, MAKER).text(5, PRODUCT).text(6, RELEASE).text(26, MAKER));
        // Type "other"; boot-up, power and thermal state are safe; security is unknown.
        let chassis = Structure::new(3, 0x300, 22).set(5, &[1]).set(9, &[3, 3, 3, 2]);
        self.add(chassis.text(4, MAKER).text(6, RELEASE));
    }

    /// Type 4: one for each socket.
    fn sockets(&mut self, cpus: &CpuTopology) {
        let per_socket = cpus.cores.saturating_mul(cpus.threads).max(1);
        let used = cpus.cpus.min(CpuTopology::MAX_CPUS).div_ceil(per_socket);
        for socket in 0..used {
            let count = |number: u32| u8::try_from(number).unwrap_or(0xff);
            let counts = [count(cpus.cores), count(cpus.cores), count(per_socket)];
            let handle = 0x400 + u16::try_from(socket).unwrap_or(0);
            let processor = Structure::new(4, handle, 48)
                // A central processor of another family, enabled, in another kind of socket.
                .set(5, &[3, 1])
                .set(24, &[0x41, 1])
                // No cache is described.
                .set(26, &[0xff; 6])
                .set(35, &counts)
                // 64 bits.
                .set(38, &[1 << 2])
                .set(40, &[1])
                .set(42, &counts.map(u16::from).map(u16::to_le_bytes).concat());
            self.add(processor.text(4, &format!("CPU {socket}")).text(7, MAKER).text(16, RELEASE));
        }
    }

    /// Types 16, 17 and 19: the memory, its modules, where the guest sees it.
    fn memory(&mut self, regions: &[Region]) {
        let size = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.len));
        let modules = size.div_ceil(MODULE).min(0x100);
        let array = Structure::new(16, ARRAY, 23)
            // System memory elsewhere than on a board that is described; error correction is unknown.
            .set(4, &[1, 3, 2])
            // The capacity is in the extended field.
            .set(7, &0x8000_0000u32.to_le_bytes())
            .set(11, &NO_HANDLE)
            .set(13, &u16::try_from(modules).unwrap_or(0).to_le_bytes())
            .set(15, &size.to_le_bytes());
        self.add(array);
        for module in 0..modules {
            let len = (size - module * MODULE).min(MODULE);
            let mib = u16::try_from(len.div_ceil(MIB)).unwrap_or(0);
            let handle = 0x1100 + u16::try_from(module).unwrap_or(0);
            let device = Structure::new(17, handle, 40)
                .set(4, &ARRAY.to_le_bytes())
                .set(6, &NO_HANDLE)
                // Widths are unknown.
                .set(8, &[0xff; 4])
                .set(12, &mib.to_le_bytes())
                // A DIMM of RAM, of another kind.
                .set(14, &[9])
                .set(18, &[7, 2]);
            self.add(device.text(16, &format!("DIMM {module}")).text(23, MAKER));
        }
        for (number, region) in (0x1300..).zip(regions.iter().take(0x100)) {
            let last = region.gpa.saturating_add(region.len).saturating_sub(1);
            let mapped = Structure::new(19, number, 31)
                // The addresses are in the extended fields.
                .set(4, &[0xff; 8])
                .set(12, &ARRAY.to_le_bytes())
                .set(14, &[1])
                .set(15, &region.gpa.to_le_bytes())
                .set(23, &last.to_le_bytes());
            self.add(mapped);
        }
    }

    /// Types 32 and 127: the last boot had no error, and there is no more.
    fn end(&mut self) {
        self.add(Structure::new(32, 0x2000, 11));
        self.add(Structure::new(127, 0x7f00, 4));
    }
}

/// A UUID as SMBIOS has it: the first three fields are little-endian (7.2.1).
fn wire_order([a, b, c, d, e, f, g, h, rest @ ..]: [u8; 16]) -> [u8; 16] {
    let mut bytes = [d, c, b, a, f, e, h, g, 0, 0, 0, 0, 0, 0, 0, 0];
    put(&mut bytes, 8, &rest);
    bytes
}

/// Entry point and structures, with the address at which they go together.
///
/// # Errors
/// [`Error::SmbiosTooLarge`].
pub fn tables(config: &Loader, regions: &[Region]) -> Result<(u64, Vec<u8>), Error> {
    let mut structures = Structures::default();
    structures.machine(config.uuid);
    structures.sockets(&config.cpus);
    structures.memory(regions);
    structures.end();
    let mut bytes = vec![0; STRUCTURES];
    put(&mut bytes, 0, b"_SM3_");
    put(&mut bytes, 6, &[u8::try_from(ENTRY).unwrap_or(0)]);
    put(&mut bytes, 7, &VERSION);
    // Revision of the entry point.
    put(&mut bytes, 10, &[1]);
    put(&mut bytes, 12, &u32::try_from(structures.bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    put(&mut bytes, 16, &(SMBIOS + STRUCTURES as u64).to_le_bytes());
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    put(&mut bytes, 5, &[sum.wrapping_neg()]);
    bytes.extend(structures.bytes);
    if bytes.len() as u64 > SMBIOS_END - SMBIOS {
        return Err(Error::SmbiosTooLarge(bytes.len()));
    }
    Ok((SMBIOS, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};

    const UUID: [u8; 16] = [0, 17, 34, 51, 68, 85, 102, 119, 136, 153, 170, 187, 204, 221, 238, 255];

    fn of(cpus: CpuTopology, regions: &[(u64, u64)]) -> Vec<(Vec<u8>, Vec<String>)> {
        let config = Loader {
            kernel: String::new(),
            initrd: None,
            cmdline: String::new(),
            cpus,
            uuid: UUID,
            tables: Vec::new(),
        };
        let regions: Vec<Region> = regions.iter().map(|&(gpa, len)| Region { gpa, len }).collect();
        let (at, bytes) = tables(&config, &regions).unwrap();
        assert_eq!((at % 16, &bytes[..5], bytes[6]), (0, &b"_SM3_"[..], 24));
        assert_eq!(bytes[..24].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!((u64_at(&bytes, 16), u32_at(&bytes, 12) as usize), (at + 32, bytes.len() - 32));
        parse(&bytes[32..])
    }

    /// Takes the structures apart, as an operating system does.
    fn parse(mut rest: &[u8]) -> Vec<(Vec<u8>, Vec<String>)> {
        let mut all = Vec::new();
        while !rest.is_empty() {
            let (fields, after) = rest.split_at(usize::from(rest[1]));
            let end = after.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = after[..end].split(|byte| *byte == 0).filter(|text| !text.is_empty());
            let strings = strings.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
            all.push((fields.to_vec(), strings));
            rest = &after[end + 2..];
        }
        all
    }

    fn kinds(all: &[(Vec<u8>, Vec<String>)]) -> Vec<u8> {
        all.iter().map(|(fields, _)| fields[0]).collect()
    }

    const ONE: CpuTopology = CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 };

    #[test]
    fn a_small_machine() {
        let all = of(ONE, &[(0, 24 << 20)]);
        assert_eq!(kinds(&all), [0, 1, 3, 4, 16, 17, 19, 32, 127]);
        let system = &all[1].0;
        // 00112233-4455-6677-8899-aabbccddeeff
        assert_eq!(system[8..16], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
        assert_eq!(system[16..24], UUID[8..]);
        assert_eq!(all[1].1[usize::from(system[4]) - 1], "Bulkhead");
        assert_eq!(all[1].1[usize::from(system[5]) - 1], "Bulkhead virtual machine");
        assert_eq!(all[0].0[19], 1 << 4);
        assert_eq!((u64_at(&all[4].0, 15), u16_at(&all[4].0, 13), u16_at(&all[5].0, 12)), (24 << 20, 1, 24));
        assert_eq!((u64_at(&all[6].0, 15), u64_at(&all[6].0, 23)), (0, (24 << 20) - 1));
        let handles: Vec<u16> = all.iter().map(|(fields, _)| u16_at(fields, 2)).collect();
        assert!(handles.is_sorted() && handles.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn the_largest_machine_fits() {
        let cpus = CpuTopology { cpus: 64, sockets: 64, cores: 1, threads: 1 };
        let all = of(cpus, &[(0, 3 << 30), (4 << 30, (1 << 40) - (3 << 30))]);
        let count = |kind: u8| kinds(&all).iter().filter(|other| **other == kind).count();
        assert_eq!((count(4), count(17), count(19)), (64, 64, 2));
        let modules = all.iter().filter(|(fields, _)| fields[0] == 17);
        assert_eq!(modules.map(|(fields, _)| u64::from(u16_at(fields, 12)) << 20).sum::<u64>(), 1 << 40);
    }

    #[test]
    fn sockets_are_those_with_vcpus() {
        let cpus = CpuTopology { cpus: 5, sockets: 4, cores: 2, threads: 2 };
        let all = of(cpus, &[(0, 16 << 30)]);
        let sockets: Vec<_> = all.iter().filter(|(fields, _)| fields[0] == 4).collect();
        assert_eq!(sockets.len(), 2);
        assert!(sockets.iter().all(|(fields, _)| fields[35..38] == [2, 2, 4]));
        assert_eq!(sockets[1].1, ["CPU 1", "Bulkhead", RELEASE]);
    }
}
