//! JSON as QEMU speaks it: a lenient, recovering [`Reader`] and an ASCII-only [`write`].
//!
//! The dialect, its limits and its error texts are those of QEMU's `qobject/json-*`, checked against
//! a running QEMU by the conformance tests.

mod lexer;
mod parser;
mod reader;
mod text;
mod write;

pub use reader::{Item, MAX_NESTING, MAX_TOKEN_BYTES, MAX_TOKENS, Reader};
pub use write::write;
