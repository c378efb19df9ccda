//! The errors that QMP clients see.

use serde::Serialize;
use serde_json::{Value, json};

/// Class of an error (QAPI `QapiErrorClass`); clients match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Class {
    /// Everything without a class of its own.
    GenericError,
    /// The command is unknown, or not available before or after negotiation.
    CommandNotFound,
    /// The device is there but not active.
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
    /// KVM lacks a capability.
    KVMMissingCap,
}

/// An error reply: QEMU's class and wording.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// Its class.
    pub class: Class,
    /// What clients show, and sometimes match on.
    pub desc: String,
}

impl Error {
    /// An error of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: Class::GenericError, desc: desc.into() }
    }

    /// An error of class `CommandNotFound`.
    pub fn command_not_found(desc: impl Into<String>) -> Self {
        Self { class: Class::CommandNotFound, desc: desc.into() }
    }

    /// An error of class `DeviceNotActive`.
    pub fn device_not_active(desc: impl Into<String>) -> Self {
        Self { class: Class::DeviceNotActive, desc: desc.into() }
    }

    /// An error of class `DeviceNotFound`.
    pub fn device_not_found(desc: impl Into<String>) -> Self {
        Self { class: Class::DeviceNotFound, desc: desc.into() }
    }

    /// The value of a reply's `error` member.
    #[must_use]
    pub fn to_value(&self) -> Value {
        json!({ "class": self.class, "desc": self.desc })
    }
}
