//! Configuration blobs: one per process, postcard in a sealed memfd named `config`.
//!
//! They come from the starter, which is trusted, and are checked by it. Fds are named, never
//! numbered: a field such as `fd: "chardev.serial0"` is a name in `LISTEN_FDNAMES`.

use serde::{Deserialize, Serialize};

use crate::plug::Declared;

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

    /// Says what is wrong with it, if it cannot be: too many vCPUs, or APIC ids of more than eight bits.
    ///
    /// # Errors
    /// A text for the user.
    pub fn check(&self) -> Result<(), &'static str> {
        let by = [self.sockets, self.cores, self.threads];
        let places = by.iter().try_fold(1u32, |n, by| n.checked_mul(*by)).unwrap_or(0);
        if self.cpus == 0 || self.cpus > Self::MAX_CPUS {
            Err("the number of vCPUs is not 1 to 64")
        } else if places < self.cpus || self.core_bits() >= 8 {
            // More places than vCPUs are fine as long as the APIC ids fit.
            Err("sockets, cores and threads do not hold the vCPUs")
        } else if self.place(self.cpus - 1).apic_id >= 255 {
            Err("the topology needs APIC ids above 254")
        } else {
            Ok(())
        }
    }

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
    /// Length in bytes of the range for memory devices (`bulkhead-bus-api`'s `platform::device_memory`), 0 without any.
    pub device_memory: u64,
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
    /// `-uuid`, which SMBIOS tells the guest; all zero without it.
    pub uuid: [u8; 16],
    /// ACPI tables of the user in the order of the command line.
    pub tables: Vec<AcpiTable>,
}

/// An ACPI table of the user (`-acpitable`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiTable {
    /// What to call it in messages: the option as given.
    pub at: String,
    /// Names of its files' fds; their contents follow each other.
    pub files: Vec<String>,
    /// The contents begin with a header (`file=`); else they have none (`data=`).
    pub has_header: bool,
    /// What the header is to say.
    pub header: AcpiHeader,
}

/// Fields of the header of an ACPI table (ACPI specification 6.4, table 5.4), where the user gives them. Texts are cut, or
/// filled up with zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiHeader {
    /// Signature.
    pub sig: Option<[u8; 4]>,
    /// Revision of the table.
    pub rev: Option<u8>,
    /// Who made the machine.
    pub oem_id: Option<[u8; 6]>,
    /// Which machine.
    pub oem_table_id: Option<[u8; 8]>,
    /// Its revision.
    pub oem_rev: Option<u32>,
    /// Who made the table.
    pub asl_compiler_id: Option<[u8; 4]>,
    /// The revision of that.
    pub asl_compiler_rev: Option<u32>,
}

impl AcpiHeader {
    /// The user gives no field.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
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
    /// `-m`, in bytes.
    pub ram: u64,
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
    /// Character devices of pci, behind which there are back ends of devices.
    pub back_ends: Vec<Chardev>,
    /// `-object iothread` in the order of the command line.
    pub iothreads: Vec<IoThread>,
    /// What daemons of ours can be started for while the machine runs, or were started for at its start.
    pub declared: Vec<Declared>,
    /// `-object memory-backend-*` in the order of the command line.
    pub memory_back_ends: Vec<MemoryBackEnd>,
    /// Memory devices in the order of the command line.
    pub memory_devices: Vec<MemoryDeviceInfo>,
}

/// Configuration of the pci daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pci {
    /// As in [`Console`].
    pub life: u64,
    /// Devices in the order of the command line; a bus is defined before what is on it.
    pub devices: Vec<PciDevice>,
}

/// Where a device is put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciPlace {
    /// `pcie.0` or the id of a root port.
    pub bus: String,
    /// Device and function number; none for the first free device.
    pub addr: Option<(u8, u8)>,
    /// Function 0 says that there are others.
    pub multifunction: bool,
}

/// A device on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDevice {
    /// Its id, empty without.
    pub id: String,
    /// QEMU's name of the device model (`virtio-blk-pci`, `pcie-root-port`).
    pub driver: String,
    /// Where.
    pub place: PciPlace,
    /// What.
    pub kind: PciKind,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PciKind {
    /// A PCI Express root port with a hot-plug slot.
    RootPort {
        /// Chassis number, unique among the ports with the same slot number.
        chassis: u8,
        /// Physical slot number.
        slot: u16,
    },
    /// A virtio device behind a vhost-user back end.
    Virtio(Virtio),
}

/// Which virtio device, and where its back end is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Virtio {
    /// Virtio device type (virtio 1.2, 5), 1 to 63.
    pub device_type: u16,
    /// Virtqueues, 1 to 64; fewer if the back end has fewer.
    pub queues: u16,
    /// Largest queue size, a power of two up to 1,024.
    pub queue_size: u16,
    /// Configuration space as the front end knows it; what the back end says comes over it, where it has
    /// `VHOST_USER_PROTOCOL_F_CONFIG` and the device type is one whose back end owns it. At most 256 bytes.
    pub config: Vec<u8>,
    /// Feature bits that the device does not offer, whatever its back end has.
    pub without: u64,
    /// What to ask the opener for to reach the back end (`vhost.ID`), or to take at the start if `listens`.
    pub socket: String,
    /// Pci listens and the back end connects (`server=on`).
    pub listens: bool,
    /// What to ask the opener for to reach the side link (`side.ID`): our own daemons have one.
    pub side: Option<String>,
    /// The back end finishes requests in the order of the ring, or tracks those in flight, so that it goes on from the
    /// used index after its death; else the device needs a reset then.
    pub resumes: bool,
    /// Of a memory device.
    pub memory: Option<DeviceMemory>,
}

/// The guest physical addresses of a memory device: all of its pieces lie inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// First address, a multiple of the page size, in [`Core::device_memory`].
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Pieces that the device may have at once, at most [`crate::side::MAX_PIECES`].
    pub pieces: u16,
    /// Number of its first piece among those of the machine, of which there are at most 512.
    pub first: u16,
}

/// A memory back end of the command line (`-object memory-backend-*`), as the broker shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBackEnd {
    /// Its type.
    pub qom_type: String,
    /// Its id.
    pub id: String,
    /// Length in bytes.
    pub size: u64,
    /// `share`.
    pub share: bool,
    /// `prealloc`.
    pub prealloc: bool,
    /// Length of its huge pages in bytes, if it has some.
    pub huge_pages: Option<u64>,
    /// `mem-path`.
    pub path: Option<String>,
}

/// A memory device of the command line, as the broker shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDeviceInfo {
    /// [`Virtio::socket`] of the device, which is unique.
    pub socket: String,
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Id of its memory back end.
    pub memdev: String,
    /// Length of a block in bytes, of virtio-mem; none of virtio-pmem.
    pub block_size: Option<u64>,
    /// NUMA node.
    pub node: u16,
}

/// An I/O thread (`-object iothread`): a queue thread of a device daemon that polls before it sleeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoThread {
    /// Its id, empty for the daemon's own thread.
    pub id: String,
    /// Longest busy polling, in nanoseconds; 0 for none.
    pub poll_max_ns: u64,
    /// Factor by which polling grows, 0 for 2.
    pub poll_grow: u64,
    /// Divisor by which it shrinks, 0 for none at all.
    pub poll_shrink: u64,
}

/// Configuration of a block daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// As in [`Console`].
    pub life: u64,
    /// Id of the device, for messages.
    pub id: String,
    /// Name of the disk's fd: a regular file or a block device.
    pub disk: String,
    /// What to call it in messages.
    pub path: String,
    /// The guest may not write.
    pub read_only: bool,
    /// `serial=`, up to 20 bytes.
    pub serial: String,
    /// Request queues.
    pub queues: u16,
    /// Discard and write-zeroes are offered.
    pub discard: bool,
    /// The thread of its queues.
    pub iothread: IoThread,
}

/// Configuration of a network daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// As in [`Console`].
    pub life: u64,
    /// Id of the device, for messages.
    pub id: String,
    /// Names of the TAP descriptors (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, one per queue pair).
    pub taps: Vec<String>,
    /// MAC address.
    pub mac: [u8; 6],
    /// The thread of its queues.
    pub iothread: IoThread,
}

/// Configuration of the balloon daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// As in [`Console`].
    pub life: u64,
    /// Id of the device, for messages.
    pub id: String,
    /// `-m`, in bytes: the memory that the guest has without a balloon.
    pub ram: u64,
    /// `deflate-on-oom=on`.
    pub deflate_on_oom: bool,
    /// `free-page-reporting=on`.
    pub free_page_reporting: bool,
    /// `page-poison=on`.
    pub page_poison: bool,
    /// The thread of its queues.
    pub iothread: IoThread,
}

/// Configuration of a virtio-mem daemon. Address and sizes are multiples of the block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mem {
    /// As in [`Console`].
    pub life: u64,
    /// Id of the device, for messages.
    pub id: String,
    /// Guest physical address of the region.
    pub addr: u64,
    /// Its length in bytes; the file `memory` has at least this length.
    pub size: u64,
    /// Length of a block in bytes, a power of two.
    pub block_size: u64,
    /// `requested-size=`, in bytes.
    pub requested_size: u64,
    /// `node=`, on a machine with NUMA nodes.
    pub node: Option<u16>,
    /// The thread of its queue.
    pub iothread: IoThread,
}

/// Configuration of a virtio-pmem daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pmem {
    /// As in [`Console`].
    pub life: u64,
    /// Id of the device, for messages.
    pub id: String,
    /// Guest physical address, page aligned.
    pub addr: u64,
    /// Length in bytes, page aligned; the file `memory` has at least this length.
    pub size: u64,
    /// The thread of its queue.
    pub iothread: IoThread,
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
