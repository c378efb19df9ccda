//! `qapi/control.json`: negotiation, and what the server says of itself.

use crate::schema::{Described, qapi_enum, qapi_struct};

qapi_enum! {
    /// A capability that is offered in the greeting.
    QMPCapability {
        /// Commands may be executed out of band.
        "oob" Oob,
    }
}

qapi_struct! {
    /// Arguments of `qmp_capabilities`.
    QmpCapabilitiesArg {
        /// Capabilities to enable.
        "enable" enable: Option<Vec<QMPCapability>>,
    }
}

qapi_struct! {
    /// A version number.
    VersionTriple {
        /// Major.
        "major" major: i64,
        /// Minor.
        "minor" minor: i64,
        /// Micro.
        "micro" micro: i64,
    }
}

qapi_struct! {
    /// Version of the server.
    VersionInfo {
        /// The QEMU version whose schema is served.
        "qemu" qemu: VersionTriple,
        /// Name and version of the implementation.
        "package" package: String,
    }
}

qapi_struct! {
    /// A command.
    CommandInfo {
        /// Its name.
        "name" name: String,
    }
}

qapi_struct! {
    /// An event.
    EventInfo {
        /// Its name.
        "name" name: String,
    }
}
