//! The host's side: prepares L1, boots it and asks its agent to run things.

mod build;
mod image;
mod kernel;
mod machine;
mod runner;
mod systemd;

pub use build::product;
pub use image::{Kind, debian};
pub use runner::{Options, demo, figures, native, run, shell};
