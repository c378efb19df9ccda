//! One boot: check and place everything, then write it.

use bulkhead_control_api::config;
use bulkhead_control_api::loader::Start;

use crate::image::{Plan, Protocol};
use crate::layout::{CMDLINE, IMAGE_START};
use crate::{Error, Ram, Source, acpi, e820, image, params, pvh, smbios};

const PAGE: u64 = 4096;

/// An error and the file it is about.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {error}")]
pub struct Failure {
    /// `kernel PATH`, `initrd PATH`, or what else it is.
    pub name: String,
    /// What is wrong.
    pub error: Error,
}

/// Puts the initrd as high as it may go; returns its address and size.
fn place_initrd(plan: &Plan, size: u64) -> Result<(u64, u64), Error> {
    if size == 0 {
        return Err(Error::EmptyInitrd);
    }
    let (from, to) = (plan.claims.end(), plan.initrd_limit);
    match to.checked_sub(size).map(|start| start & !(PAGE - 1)) {
        Some(start) if start >= from => Ok((start, size)),
        _ => Err(Error::NoRoomForInitrd { size, from, to }),
    }
}

/// Where the user's ACPI tables begin: at the end of the low RAM, in whole pages.
fn place_tables(ram: &Ram, size: u64) -> Result<u64, Error> {
    let start = ram.low_end().checked_sub(size).map(|start| start & !(PAGE - 1));
    start.filter(|start| *start > IMAGE_START).ok_or(Error::NoRoomForTables(size))
}

fn check_cmdline(cmdline: &str, limit: usize) -> Result<(), Error> {
    if cmdline.contains('\0') {
        return Err(Error::CommandLineNul);
    }
    if cmdline.len() > limit {
        return Err(Error::CommandLine { size: cmdline.len(), limit });
    }
    Ok(())
}

/// Loads a kernel and what belongs to it; `tables` are ACPI tables of the user.
///
/// # Errors
/// [`Failure`]. Guest memory is untouched unless the failure came from reading a file that
/// changed under the loader's hands or from writing guest memory itself.
pub fn load<S: Source + ?Sized>(
    kernel: &S,
    initrd: Option<&S>,
    tables: &[Vec<u8>],
    config: &config::Loader,
    ram: &Ram,
) -> Result<Start, Failure> {
    let of_kernel = |error| Failure { name: format!("kernel {}", config.kernel), error };
    let of_initrd =
        |error| Failure { name: format!("initrd {}", config.initrd.as_deref().unwrap_or("")), error };
    let of_boot = |error| Failure { name: "boot".to_owned(), error };
    let top = place_tables(ram, acpi::user::area(tables)).map_err(of_boot)?;
    let plan = image::plan(kernel, top).map_err(of_kernel)?;
    check_cmdline(&config.cmdline, plan.cmdline_max).map_err(of_kernel)?;
    let initrd = match initrd {
        Some(source) => {
            let size = source.size().map_err(of_initrd)?;
            let (start, len) = place_initrd(&plan, size).map_err(of_initrd)?;
            Some((source, start, len))
        }
        None => None,
    };
    let mut tables = acpi::tables(&config.cpus, ram.end(), (top, tables)).map_err(of_boot)?;
    tables.push(smbios::tables(config, ram.regions()).map_err(of_boot)?);

    for segment in &plan.segments {
        ram.copy(kernel, segment.offset, segment.file_len, segment.gpa).map_err(of_kernel)?;
        ram.zero(segment.gpa + segment.file_len, segment.zero_len).map_err(of_kernel)?;
    }
    if let Some((source, start, len)) = initrd {
        ram.copy(source, 0, len, start).map_err(of_initrd)?;
    }
    for (gpa, bytes) in &tables {
        ram.write(*gpa, bytes).map_err(of_boot)?;
    }
    ram.write(CMDLINE, config.cmdline.as_bytes()).map_err(of_boot)?;
    ram.zero(CMDLINE + config.cmdline.len() as u64, 1).map_err(of_boot)?;
    let initrd = initrd.map(|(_, start, len)| (start, len));
    finish(&plan.protocol, initrd, ram, top).map_err(of_boot)
}

fn finish(protocol: &Protocol, initrd: Option<(u64, u64)>, ram: &Ram, top: u64) -> Result<Start, Error> {
    let map = e820::map(ram, top);
    match protocol {
        Protocol::Pvh { entry } => pvh::write(ram, *entry, initrd, &map),
        Protocol::Linux64 { entry, head } => {
            let (start, len) = initrd.unwrap_or((0, 0));
            let low = |value| u32::try_from(value).map_err(|_| Error::Malformed("an initrd above 4 GiB"));
            params::write(ram, *entry, head, (low(start)?, low(len)?), &map)
        }
    }
}
