//! The native guest: a small PVH program for any KVM (`program/` says what it does).

/// The program, an ELF executable with a PVH note.
pub static ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

#[cfg(test)]
mod tests {
    #[test]
    fn it_is_an_elf_of_modest_size() {
        assert!(super::ELF.starts_with(b"\x7fELF"));
        assert!(super::ELF.len() < 128 * 1024, "{} bytes", super::ELF.len());
    }
}
