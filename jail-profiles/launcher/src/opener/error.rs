//! Why something could not be opened: one line with cause and, where there is one, remedy.

use std::{fmt, io};

use nix::errno::Errno;

/// Why something could not be opened.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Any of the others, with the option that asked for it.
    #[error("{0}: {1}")]
    Of(String, Box<Error>),
    #[error("{0}")]
    Io(Cause),
    #[error("{0}")]
    Guard(String),
    #[error("not a regular file")]
    NotRegular,
    #[error("Could not open '{0}': {1}")]
    Output(String, Cause),
    #[error("can't open file {0}: {1}")]
    Table(String, Cause),
    #[error("can't read file {0}: not a regular file")]
    TableNotRegular(String),
    #[error("'{0}' is neither a regular file nor a block device")]
    NotADisk(String),
    #[error("Failed to get \"{0}\" lock: is another process using the image [{1}]?")]
    DiskLock(&'static str, String),
    #[error("Failed to get shared \"write\" lock: is another process using the image [{0}]?")]
    DiskSharedLock(String),
    #[error("can't open backing store {0} for guest RAM: {1}")]
    BackingStore(String, Cause),
    #[error("can't open backing store {0} for guest RAM: it is not a regular file")]
    BackingStoreKind(String),
    #[error("backing store size {0:#x} does not match 'size' option {1:#x}")]
    BackingStoreSize(u64, u64),
    #[error("failed to resize memfd to {0}: {1}")]
    Memfd(u64, Cause),
    #[error("os_mem_prealloc: Insufficient free host memory pages available to allocate guest RAM: {0}")]
    Prealloc(Cause),
    #[error("could not open /dev/net/tun: {0} (sudo modprobe tun)")]
    Tun(Cause),
    #[error("could not configure /dev/net/tun ({0}): {1}")]
    Tap(String, Cause),
    #[error(
        "could not configure /dev/net/tun ({0}): Operation not permitted: root makes the interface for you: sudo ip \
         tuntap add {0} mode tap vnet_hdr user $(id -un)"
    )]
    TapPermission(String),
    #[error(
        "could not configure /dev/net/tun ({0}): Operation not permitted: root makes the interface for units: ip tuntap \
         add {0} mode tap vnet_hdr group kvm"
    )]
    TapPermissionInUnit(String),
    #[error("could not configure /dev/net/tun ({0}): Device or resource busy: another process has it")]
    TapBusy(String),
    #[error("File descriptor '{0}' is not a TAP interface")]
    NotATap(u32),
    #[error(
        "File descriptor '{0}' is a TAP interface without IFF_VNET_HDR or with packet information: set both right"
    )]
    TapFlags(u32),
    #[error("Failed to bind socket to {0}: {1}")]
    Bind(String, Cause),
    #[error("Failed to bind socket to {0}: Address already in use: another process listens there")]
    InUse(String),
    #[error(
        "Failed to bind socket to {0}: something that is not a socket is there: remove it or choose another path"
    )]
    NotASocket(String),
    #[error("UNIX socket path '{0}' is too long: it must be less than 108 bytes")]
    PathTooLong(String),
    #[error("Failed to connect to '{0}': {1}")]
    Connect(String, Cause),
    #[error("File descriptor '{0}' is a standard stream: pass a socket as 3 or above")]
    StandardStream(u32),
    #[error("File descriptor '{0}' is not a socket: it is not open")]
    NotOpen(u32),
    #[error("File descriptor '{0}' is not a socket")]
    FdNotASocket(u32),
    #[error("File descriptor '{0}' is not a unix stream socket")]
    NotUnixStream(u32),
    #[error("File descriptor '{0}' does not listen: with server=on it must be a listening socket")]
    NotListening(u32),
    #[error("File descriptor '{0}' listens: use server=on")]
    Listening(u32),
    #[error(
        "a unit has neither terminal nor inherited descriptors, and its sockets are those of its socket units: use \
         file, null, or one of the sockets in /run/bulkhead/NAME"
    )]
    NotInAUnit,
    #[error("fd is not valid or already in use")]
    MemberNotValid,
    #[error("error duplicating fd: {0}")]
    MemberNotDuplicated(Cause),
    #[error("cannot create PID file: Could not create '{0}': {1}")]
    PidFile(String, Cause),
    #[error("cannot create PID file: Cannot lock pid file: another process holds it")]
    PidFileLocked,
    #[error(
        "No such file or directory: KVM is not loaded: sudo modprobe kvm_intel (or kvm_amd); if that fails, enable \
         virtualization in the firmware; `bulkhead doctor` says more"
    )]
    KvmMissing,
    #[error(
        "{0}: KVM is not available: enable virtualization in the firmware or for the enclosing VM; `bulkhead \
         doctor` says more"
    )]
    KvmUnavailable(Cause),
    #[error("Permission denied: add yourself to group kvm: sudo usermod -aG kvm {0}, then log in again")]
    KvmPermission(String),
}

/// An error of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause(pub Errno);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.desc())
    }
}

impl From<Errno> for Cause {
    fn from(errno: Errno) -> Self {
        Self(errno)
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self(error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))
    }
}

impl Error {
    /// The same with the remedy for a unit.
    pub fn in_a_unit(self) -> Self {
        match self {
            Self::TapPermission(name) => Self::TapPermissionInUnit(name),
            other => other,
        }
    }

    /// The same of a file of an ACPI table, in QEMU's words.
    pub fn of_table(path: &str, error: Self) -> Self {
        match error {
            Self::Io(cause) => Self::Table(path.to_owned(), cause),
            Self::NotRegular => Self::TableNotRegular(path.to_owned()),
            other => other,
        }
    }

    /// Somebody else has it, which may pass.
    pub fn is_taken(&self) -> bool {
        match self {
            Self::Of(_, error) => error.is_taken(),
            Self::DiskLock(..) | Self::DiskSharedLock(_) | Self::TapBusy(_) => true,
            _ => false,
        }
    }

    /// The same with the option that asked for it.
    pub fn of(self, at: &str) -> Self {
        Self::Of(at.to_owned(), Box::new(self))
    }
}
