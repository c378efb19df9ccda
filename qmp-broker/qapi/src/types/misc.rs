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

qapi_struct! {
    /// Arguments of `getfd`.
    GetfdArg {
        /// The descriptor's name from now on.
        "fdname" fdname: String,
    }
}

qapi_struct! {
    /// Arguments of `closefd`.
    ClosefdArg {
        /// The descriptor's name.
        "fdname" fdname: String,
    }
}

qapi_struct! {
    /// Arguments of `add_client`.
    AddClientArg {
        /// `spice`, `vnc`, or the id of a character device.
        "protocol" protocol: String,
        /// Name of the connection's descriptor.
        "fdname" fdname: String,
        /// The client need not authenticate itself (`spice`, `vnc`).
        "skipauth" skipauth: Option<bool>,
        /// The connection begins with TLS (`spice`).
        "tls" tls: Option<bool>,
    }
}

qapi_struct! {
    /// Arguments of `add-fd`.
    AddFdArg {
        /// The set; without it a new one.
        "fdset-id" fdset_id: Option<i64>,
        /// What the client wants to remember of it.
        "opaque" opaque: Option<String>,
    }
}

qapi_struct! {
    /// A descriptor that was added to a set.
    AddfdInfo {
        /// The set.
        "fdset-id" fdset_id: i64,
        /// The descriptor's number in `remove-fd`.
        "fd" fd: i64,
    }
}

qapi_struct! {
    /// Arguments of `remove-fd`.
    RemoveFdArg {
        /// The set.
        "fdset-id" fdset_id: i64,
        /// The descriptor; without it all of the set.
        "fd" fd: Option<i64>,
    }
}

qapi_struct! {
    /// A descriptor of a set.
    FdsetFdInfo {
        /// Its number in `remove-fd`.
        "fd" fd: i64,
        /// As given when it was added.
        "opaque" opaque: Option<String>,
    }
}

qapi_struct! {
    /// A set of descriptors.
    FdsetInfo {
        /// Its id.
        "fdset-id" fdset_id: i64,
        /// Its descriptors.
        "fds" fds: Vec<FdsetFdInfo>,
    }
}
