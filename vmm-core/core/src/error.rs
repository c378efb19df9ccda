//! Why core does not start or cannot go on.

use bulkhead_jail::start::StartError;
use nix::errno::Errno;

/// One line each, with the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The start contract or the jail.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The configuration asks for what core cannot make.
    #[error("configuration: {0}")]
    Config(&'static str),
    /// This KVM lacks something.
    #[error("/dev/kvm lacks {0}: load kvm_intel or kvm_amd of Linux 5.17 or later")]
    Capability(&'static str),
    /// More vCPUs than KVM has.
    #[error("KVM on this host has at most {0} vCPUs per VM")]
    TooManyCpus(usize),
    /// RAM, or the PCI window above it, beyond the guest's physical addresses.
    #[error(
        "guest RAM and the PCI window of 32 GiB above it do not fit into the {0} physical address bits of this host"
    )]
    AddressWidth(u32),
    /// A memfd could not be made as large as the RAM.
    #[error("guest memory of {0} MiB: RLIMIT_FSIZE is too small (a memfd counts)")]
    FileSize(u64),
    /// The host has no room for the guest's RAM.
    #[error("guest memory of {0} MiB: not enough memory ({1})")]
    Memory(u64, Errno),
    /// KVM refused a request.
    #[error("KVM: {0}: {1}")]
    Kvm(&'static str, Errno),
    /// The kernel refused a system call.
    #[error("{0}: {1}")]
    System(&'static str, Errno),
    /// The guest could not be loaded at power-on.
    #[error("loader: {0}")]
    Loader(String),
    /// A vCPU thread did not come out of KVM.
    #[error("a vCPU does not stop: KVM on this host is broken")]
    Stuck,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the KVM request that failed.
pub fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm(what, Errno::from_raw(error.errno()))
}

/// Names the system call that failed.
pub fn system(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::System(what, errno)
}

/// Names the system call of the standard library that failed.
pub fn io(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::System(what, error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))
}
