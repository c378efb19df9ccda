//! The one job of a loader process: core's request over the link, one answer.

use std::fs::File;
use std::os::fd::OwnedFd;

use bulkhead_control_api::loader::{Job, MAX_FAILURE, Mode, Outcome, Start};
use bulkhead_control_api::{VERSION, config};
use bulkhead_jail::link::{Link, LinkError};
use nix::sys::socket::MsgFlags;

use crate::boot::{Failure, load};
use crate::{Error, Ram, acpi};

/// The files of the tenant.
#[derive(Debug)]
pub struct Files {
    /// The kernel image.
    pub kernel: File,
    /// The initrd.
    pub initrd: Option<File>,
    /// Those of each ACPI table of the configuration.
    pub tables: Vec<Vec<File>>,
}

fn run(job: Job, fds: Vec<OwnedFd>, files: &Files, config: &config::Loader) -> Result<Start, Failure> {
    let of_boot = |error| Failure { name: "boot".to_owned(), error };
    match job.mode {
        Mode::Boot => {}
        Mode::Wake => return Err(of_boot(Error::Wake)),
    }
    let ram = Ram::map(job.regions, fds).map_err(of_boot)?;
    let tables = config.tables.iter().zip(&files.tables).map(|(table, files)| {
        let files: Vec<&File> = files.iter().collect();
        acpi::user::table(table, &files).map_err(|error| Failure { name: table.at.clone(), error })
    });
    let tables = tables.collect::<Result<Vec<_>, _>>()?;
    load(&files.kernel, files.initrd.as_ref(), &tables, config, &ram)
}

/// One line of at most [`MAX_FAILURE`] bytes.
fn one_line(failure: &Failure) -> String {
    let mut line = failure.to_string().replace(|c: char| c.is_control(), "?");
    if line.len() > MAX_FAILURE {
        // The end says what is wrong, the beginning only in which file.
        let from = (line.len() - MAX_FAILURE..line.len()).find(|at| line.is_char_boundary(*at));
        line = line.split_off(from.unwrap_or(line.len()));
    }
    line
}

/// Takes the job, does it, answers. A failure is core's to report, once.
///
/// # Errors
/// The link's; a job that fails is answered, not returned.
pub fn serve(files: &Files, config: &config::Loader, core: OwnedFd) -> Result<(), LinkError> {
    let mut link = Link::connect(core, VERSION)?;
    let (job, fds): (Job, _) = link.recv_with(MsgFlags::empty())?;
    let outcome: Outcome = run(job, fds, files, config).map_err(|failure| one_line(&failure));
    link.send(&outcome)
}
