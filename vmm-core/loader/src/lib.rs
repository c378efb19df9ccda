//! One-shot loader: kernel, initrd, command line, ACPI tables and SMBIOS into guest memory.
//!
//! Everything is checked and placed ([`image`], [`layout`]) before the first byte of guest memory is
//! written ([`boot`]), so that a bad image never leaves a partial boot. Nothing here trusts the image:
//! no panic, no unbounded loop, no allocation of a size that it names.

pub mod acpi;
pub mod boot;
mod bytes;
mod bzimage;
mod e820;
mod elf;
mod error;
mod image;
pub mod job;
mod layout;
mod params;
mod pvh;
mod ram;
mod smbios;
mod source;

pub use error::Error;
pub use ram::Ram;
pub use source::Source;
