//! The balloon's part of `qapi/misc.json`.

use crate::schema::{Described, qapi_struct};

qapi_struct! {
    /// Arguments of `balloon`.
    BalloonArg {
        /// Bytes of memory that the guest is to keep.
        "value" value: i64,
    }
}

qapi_struct! {
    /// State of the balloon.
    BalloonInfo {
        /// Bytes of memory that the guest has.
        "actual" actual: i64,
    }
}

qapi_struct! {
    /// Data of `BALLOON_CHANGE`.
    BalloonChangeData {
        /// Bytes of memory that the guest has.
        "actual" actual: i64,
    }
}
