//! Where things are in L1.

/// The Debian guest's kernel: the one that L1 runs.
pub const KERNEL: &str = "/lab/vmlinuz";

/// The Debian guest's initrd.
pub const INITRD: &str = "/lab/initrd";

/// Directory of the native test programs.
pub const TESTS: &str = "/lab/tests";

/// A root file system of the Debian guest, ext4 in a file.
pub const ROOT: &str = "/lab/root.img";
