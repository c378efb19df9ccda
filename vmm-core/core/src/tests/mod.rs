//! Core as a whole on this host's /dev/kvm, with the test as console, broker and loader.

mod away;
mod compute;
mod dump;
mod hostile;
mod life;
mod pci;
mod program;
pub mod rig;
