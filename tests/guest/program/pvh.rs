//! The PVH start info: command line, memory map, RSDP.

use core::ffi::CStr;

const MAGIC: u32 = 0x336e_c578;

#[repr(C)]
struct RawStartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct RawModule {
    address: u64,
    size: u64,
    cmdline: u64,
    reserved: u64,
}

/// One entry of the memory map, types as in e820.
#[repr(C)]
pub struct MapEntry {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
    /// 1 for RAM.
    pub kind: u32,
    reserved: u32,
}

/// What the loader told this program.
pub struct StartInfo {
    /// The command line.
    pub cmdline: &'static str,
    /// The memory map.
    pub memory: &'static [MapEntry],
    /// Address of ACPI's root pointer, 0 if there is none.
    pub rsdp: u64,
    /// Address and size of the initrd.
    pub initrd: Option<(u64, u64)>,
}

impl StartInfo {
    /// Reads the structure at `address`; panics if it is none.
    pub fn read(address: u64) -> Self {
        // SAFETY: PVH promises this structure at this address; the magic number says it kept the promise.
        let raw = unsafe { &*(address as *const RawStartInfo) };
        assert!(raw.magic == MAGIC && raw.version >= 1, "no PVH start info of version 1");
        let cmdline = match raw.cmdline {
            0 => "",
            // SAFETY: a terminated string, by the PVH contract.
            text => unsafe { CStr::from_ptr(text as *const _) }.to_str().unwrap_or("(not UTF-8)"),
        };
        // SAFETY: address and length of the map, by the PVH contract.
        let memory = unsafe {
            core::slice::from_raw_parts(raw.memory_map as *const MapEntry, raw.memory_map_entries as usize)
        };
        let initrd = (raw.modules > 0).then(|| {
            // SAFETY: the first of `modules` entries.
            let module = unsafe { &*(raw.module_list as *const RawModule) };
            (module.address, module.size)
        });
        Self { cmdline, memory, rsdp: raw.rsdp, initrd }
    }

    /// The value of the last `name=value` on the command line.
    pub fn option(&self, name: &str) -> Option<&'static str> {
        self.cmdline
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .rfind(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    /// The number after `name=`, or `default`.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        self.option(name).and_then(parse_number).unwrap_or(default)
    }

    /// The RAM entries of the memory map.
    pub fn ram(&self) -> impl Iterator<Item = &'static MapEntry> {
        self.memory.iter().filter(|entry| entry.kind == 1)
    }

    /// Bytes of RAM.
    pub fn ram_size(&self) -> u64 {
        self.ram().map(|entry| entry.size).sum()
    }
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
