//! Configuration blobs: one per process, postcard in a sealed memfd named `config`.
//!
//! They come from the starter, which is trusted, and are checked by it. Fds are named, never
//! numbered: a field such as `fd: "chardev.serial0"` is a name in `LISTEN_FDNAMES`.

use serde::{Deserialize, Serialize};

/// vCPU topology: `sockets * cores * threads` places, the first `cpus` of which have a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Number of vCPUs, 1 to 64; at most `sockets * cores * threads`.
    pub cpus: u32,
    /// Sockets.
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

/// Place of one vCPU in the topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuPlace {
    /// Socket number.
    pub socket: u32,
    /// Core number within the socket.
    pub core: u32,
    /// Thread number within the core.
    pub thread: u32,
    /// (x2)APIC id: thread, core and socket number in bit fields of the widths below.
    pub apic_id: u32,
}

/// Bits that number `count` things.
const fn width(count: u32) -> u32 {
    match count {
        0 | 1 => 0,
        n => u32::BITS - (n - 1).leading_zeros(),
    }
}

impl CpuTopology {
    /// The most vCPUs of a VM.
    pub const MAX_CPUS: u32 = 64;

    /// Width in bits of the thread field of an APIC id.
    #[must_use]
    pub const fn thread_bits(&self) -> u32 {
        width(self.threads)
    }

    /// Width in bits of the core and thread fields of an APIC id.
    #[must_use]
    pub const fn core_bits(&self) -> u32 {
        width(self.cores) + width(self.threads)
    }

    /// Place of vCPU `index`: threads are numbered first, then cores, then sockets.
    #[must_use]
    pub const fn place(&self, index: u32) -> CpuPlace {
        let (threads, cores) =
            (if self.threads == 0 { 1 } else { self.threads }, if self.cores == 0 { 1 } else { self.cores });
        let thread = index % threads;
        let core = index / threads % cores;
        let socket = index / threads / cores;
        let apic_id = thread | core << self.thread_bits() | socket << self.core_bits();
        CpuPlace { socket, core, thread, apic_id }
    }
}

/// Configuration of core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Core {
    /// Guest RAM in bytes, a multiple of the page size.
    pub ram: u64,
    /// vCPUs.
    pub cpus: CpuTopology,
    /// `-no-reboot`: a guest reset shuts down.
    pub no_reboot: bool,
    /// `-no-shutdown`: a guest shutdown leaves the VM in run state `shutdown`.
    pub no_shutdown: bool,
    /// Run as soon as the first [`crate::core::Op::Start`] arrives; false with `-S`.
    pub autostart: bool,
}

/// Configuration of the loader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loader {
    /// What to call the kernel in messages: its path as given, or `the native guest`.
    pub kernel: String,
    /// What to call the initrd in messages, if there is one (fd `initrd`).
    pub initrd: Option<String>,
    /// Kernel command line without a terminating NUL.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: CpuTopology,
}

/// Back end of a character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChardevKind {
    /// Swallows output, gives no input.
    Null,
    /// The terminal or pipes of the user: fds `stdio.in` and `stdio.out`.
    Stdio,
    /// Output is appended or written to the file of this fd name.
    File {
        /// Name of the fd.
        fd: String,
    },
    /// A unix stream socket.
    Socket {
        /// Name of the fd: a listener if `server`, else a connected socket.
        fd: String,
        /// As the user named it: a path, or `fd:N` for an inherited one.
        address: String,
        /// `server=on`.
        server: bool,
        /// `wait=on`: the machine does not start before a client has connected.
        wait: bool,
    },
}

/// A character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chardev {
    /// Its id.
    pub id: String,
    /// Its back end.
    pub kind: ChardevKind,
}

/// Configuration of the console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// Which life of core this is for: a state that outlived another one is not for this machine.
    pub life: u64,
    /// Character devices of this process.
    pub chardevs: Vec<Chardev>,
    /// Id of the character device behind COM1; the port exists only if there is one.
    pub serial: Option<String>,
}

/// What a QMP client may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Everything.
    Operator,
    /// Reads state, gets events.
    Monitor,
    /// Connects itself to a character device.
    Console,
}

/// A QMP monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Monitor {
    /// Its character device, always [`ChardevKind::Socket`] or [`ChardevKind::Stdio`].
    pub chardev: Chardev,
    /// What its clients may do.
    pub role: Role,
    /// User ids that may connect; empty: every one.
    pub uids: Vec<u32>,
    /// Group ids that may connect; empty: every one.
    pub gids: Vec<u32>,
}

/// Type of a parameter of the command line (QAPI `CommandLineParameterType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ParameterType {
    /// Any text.
    Text,
    /// `on` or `off`.
    Flag,
    /// An unsigned integer.
    Number,
    /// A number of bytes.
    Size,
}

/// A parameter of an option group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: ParameterType,
    /// What it is for.
    pub help: String,
}

/// A group of parameters of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OptionGroup {
    /// QEMU's name of it.
    pub name: String,
    /// Its parameters in the order of the option table.
    pub parameters: Vec<Parameter>,
}

/// A member of an fd set from the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdsetMember {
    /// Name of the fd.
    pub fd: String,
    /// The set, not negative.
    pub set: i64,
    /// What its user wants to remember.
    pub opaque: Option<String>,
}

/// Configuration of the broker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broker {
    /// As in [`Console`].
    pub life: u64,
    /// `-name`.
    pub name: Option<String>,
    /// `-uuid`, all zero without it.
    pub uuid: [u8; 16],
    /// QMP monitors in the order of the command line.
    pub monitors: Vec<Monitor>,
    /// Send [`crate::core::Op::Start`] when every `wait=on` is satisfied; false with `-S`.
    pub autostart: bool,
    /// `-add-fd` in the order of the command line.
    pub fdsets: Vec<FdsetMember>,
    /// Sets of which a character device uses a member: they stay, without members if clients remove those.
    pub used_fdsets: Vec<i64>,
    /// `--preconfig`: not before `x-exit-preconfig`.
    pub preconfig: bool,
    /// The groups of parameters that the command line has, in the order of the option table.
    pub options: Vec<OptionGroup>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_are_unique_bit_fields() {
        let topology = CpuTopology { cpus: 12, sockets: 2, cores: 3, threads: 2 };
        assert_eq!((topology.thread_bits(), topology.core_bits()), (1, 3));
        let ids: Vec<u32> = (0..12).map(|i| topology.place(i).apic_id).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        let flat = CpuTopology { cpus: 64, sockets: 64, cores: 1, threads: 1 };
        assert!((0..64).all(|i| flat.place(i).apic_id == i && flat.place(i).socket == i));
    }

    #[test]
    fn worst_case_apic_ids_fit_eight_bits() {
        for sockets in 1..=64u32 {
            for cores in 1..=64 / sockets {
                for threads in 1..=64 / sockets / cores {
                    let cpus = sockets * cores * threads;
                    let topology = CpuTopology { cpus, sockets, cores, threads };
                    assert!(topology.place(cpus - 1).apic_id < 255);
                }
            }
        }
    }
}
