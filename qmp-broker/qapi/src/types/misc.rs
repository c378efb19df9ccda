//! `qapi/misc.json`.

use crate::schema::{Described, qapi_struct};

qapi_struct! {
    /// Name of the guest.
    NameInfo {
        /// As given with `-name`.
        "name" name: Option<String>,
    }
}

qapi_struct! {
    /// UUID of the guest.
    UuidInfo {
        /// In hexadecimal with dashes, all zero if none was given.
        "UUID" uuid: String,
    }
}

qapi_struct! {
    /// KVM acceleration.
    KvmInfo {
        /// Whether it is active.
        "enabled" enabled: bool,
        /// Whether it is built in.
        "present" present: bool,
    }
}
