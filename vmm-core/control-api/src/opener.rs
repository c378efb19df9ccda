//! Link `opener`: whoever opens what a machine names gives a process its descriptors.
//!
//! The process asks nothing: after the hello each way come any number of [`FromOpener::Given`], each
//! with one descriptor, then [`FromOpener::Done`]. Those that come later replace a connection whose
//! other end was started anew (`docs/decisions/0005-restarts-and-units.md`).

use serde::{Deserialize, Serialize};

/// Opener to process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromOpener {
    /// The attached descriptor has this name in the topology.
    Given {
        /// Its name.
        name: String,
    },
    /// All that the process is started with has been given.
    Done,
}
