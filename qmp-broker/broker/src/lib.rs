//! Terminates QMP: sessions, commands, events.
//!
//! ```text
//! client -> stream -> client::serve -> session (reader, queue) -> commands -> peer (core, console, pci, balloon)
//!                        ^------------- output <- replies <-------'              |
//!                        '------------- output <- hub <- events <----------------'
//! ```
//! One thread, one tokio task per client, listener and link. Run-state changes come from core on one
//! ordered link: an event is in every client's output before the reply that follows it.

mod absent;
mod add_client;
pub mod audit;
mod balloon;
mod chardevs;
pub mod client;
pub mod commands;
pub mod descriptors;
pub mod devices;
pub mod dump;
pub mod fd;
pub mod held;
pub mod hmp;
pub mod hub;
pub mod index;
mod memory;
mod models;
pub mod monitor;
mod objects;
pub mod opener;
mod options;
pub mod output;
pub mod own;
pub mod passed;
mod pci;
pub mod peer;
mod plug;
pub mod policy;
mod qom;
pub mod registry;
pub mod reload;
pub mod run;
pub mod session;
pub mod store;
pub mod stream;
mod throttle;
