//! `qapi/char.json`.

use crate::schema::{Described, qapi_struct};

qapi_struct! {
    /// A character device.
    ChardevInfo {
        /// Its id.
        "label" label: String,
        /// What it is connected to, in words.
        "filename" filename: String,
        /// Whether its front end has it open.
        "frontend-open" frontend_open: bool,
    }
}
