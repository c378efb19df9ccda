//! QEMU's QAPI schema as Rust types, and the one table of commands.
//!
//! Nothing here does I/O. [`json`] reads QEMU's dialect and writes replies, [`types`] holds one
//! module per QEMU schema module, [`table`] lists commands and events; [`introspect`], [`check`] and
//! [`request`] work from that table.

pub mod check;
pub mod error;
pub mod introspect;
pub mod json;
pub mod request;
pub mod schema;
pub mod table;
pub mod types;

pub use error::{Class, Error};
