//! The demonstration.

use bulkhead_framework::Result;

use crate::host::Options;

pub fn on_host(options: &Options) -> Result<bool> {
    crate::host::demo(options)
}

pub fn in_lab() -> Result<()> {
    crate::agent::show("to come")
}
