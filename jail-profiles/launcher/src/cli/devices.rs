//! The part of the option table that is about devices and what is behind them.

use super::error::Problem;
use super::kinds::{Kinds, Sort};
use super::table::{Group, Kind, Param, param};

const fn sort(name: &'static str, about: &'static str, params: &'static [Param]) -> Sort {
    Sort { about, group: Group { name, implied: None, params } }
}

const CHARDEV: Param = param("chardev", Kind::Text, "character device of the back end: a socket");
const NUM_QUEUES: Param = param("num-queues", Kind::Number, "request queues, 1 to 64 (default 1)");
const QUEUE_SIZE: Param =
    param("queue-size", Kind::Number, "descriptors of a queue, 2 to 1024 (default 128)");
const IOTHREAD: Param = param("iothread", Kind::Text, "iothread object whose thread has the queues");

const MEMDEV: Param = param("memdev", Kind::Text, "identifier of a memory back end");
const MEMADDR: Param =
    param("memaddr", Kind::Size, "guest physical address, above all else (default: the first free)");
const SIZE: Param = param("size", Kind::Size, "its length in bytes");
const SHARE: Param = param("share", Kind::Flag, "others may map it: ours do in any case");
const PREALLOC: Param =
    param("prealloc", Kind::Flag, "all of it is taken from the host at once (default off)");

/// `-device`.
pub static DEVICE: Kinds = Kinds {
    name: "device",
    key: "driver",
    implied: true,
    common: &[
        param("id", Kind::Id, "its identifier"),
        param("bus", Kind::Text, "pcie.0 (default) or the identifier of a pcie-root-port"),
        param(
            "addr",
            Kind::Text,
            "device number and function, hexadecimal: 3 or 3.1 (default: the first free)",
        ),
        param("multifunction", Kind::Flag, "function 0 says that there are others (default off)"),
    ],
    groups: &[
        sort(
            "pcie-root-port",
            "PCI Express Root Port",
            &[
                param("chassis", Kind::Number, "chassis number, 0 to 255 (default 0)"),
                param("slot", Kind::Number, "slot number, 0 to 8191; unique in its chassis (default 0)"),
            ],
        ),
        sort(
            "virtio-blk-pci",
            "disk behind a daemon of its own",
            &[
                param("drive", Kind::Text, "identifier of a drive or name of a block node"),
                param("serial", Kind::Text, "serial number, up to 20 bytes"),
                NUM_QUEUES,
                param("discard", Kind::Flag, "discard and write-zeroes are offered (default on)"),
                IOTHREAD,
            ],
        ),
        sort(
            "virtio-net-pci",
            "network behind a daemon of its own or a vhost-user back end",
            &[
                param("netdev", Kind::Text, "identifier of a network back end"),
                param("mac", Kind::Text, "MAC address (default 52:54:00:12:34:56, then counting up)"),
                param("mq", Kind::Flag, "all queue pairs of the back end are offered (default off: one)"),
                IOTHREAD,
            ],
        ),
        sort(
            "virtio-balloon-pci",
            "memory balloon; there may be one",
            &[
                param("deflate-on-oom", Kind::Flag, "the guest may take pages back when it is out of memory"),
                param(
                    "free-page-reporting",
                    Kind::Flag,
                    "the guest reports free pages, which the host takes",
                ),
                param("page-poison", Kind::Flag, "the guest says with what it fills free pages (default on)"),
                IOTHREAD,
            ],
        ),
        sort(
            "virtio-mem-pci",
            "memory that the guest plugs and unplugs in blocks",
            &[
                MEMDEV,
                param(
                    "block-size",
                    Kind::Size,
                    "length of a block, a power of two from 2 MiB (default: 2M, or a huge page)",
                ),
                param("requested-size", Kind::Size, "how much the guest is to plug (default 0)"),
                param("node", Kind::Number, "NUMA node: 0"),
                MEMADDR,
                IOTHREAD,
            ],
        ),
        sort("virtio-pmem-pci", "file that the guest has as persistent memory", &[MEMDEV, MEMADDR, IOTHREAD]),
        sort("vhost-user-blk-pci", "disk behind a vhost-user back end", &[CHARDEV, NUM_QUEUES, QUEUE_SIZE]),
        sort(
            "vhost-user-fs-pci",
            "shared directory behind a vhost-user back end",
            &[
                CHARDEV,
                param("tag", Kind::Text, "name under which the guest mounts it, 1 to 36 bytes"),
                param("num-request-queues", Kind::Number, "request queues, 1 to 63 (default 1)"),
                QUEUE_SIZE,
            ],
        ),
        sort("vhost-user-rng-pci", "entropy behind a vhost-user back end", &[CHARDEV]),
        sort("vhost-user-vsock-pci", "sockets to the host behind a vhost-user back end", &[CHARDEV]),
        sort(
            "vhost-user-device-pci",
            "any virtio device behind a vhost-user back end",
            &[
                CHARDEV,
                param("virtio-id", Kind::Number, "virtio device type, 1 to 63"),
                param("num_vqs", Kind::Number, "virtqueues, 1 to 64 (default 1)"),
                param("vq_size", Kind::Number, "descriptors of a queue, 2 to 1024 (default 64)"),
                param("config_size", Kind::Number, "bytes of configuration space, 0 to 256 (default 0)"),
            ],
        ),
    ],
    unknown: Problem::DeviceModel,
    unexpected: Problem::NoProperty,
    listed: true,
};

/// `-netdev`.
pub static NETDEV: Kinds = Kinds {
    name: "netdev",
    key: "type",
    implied: true,
    common: &[param("id", Kind::Id, "its identifier")],
    groups: &[
        sort(
            "tap",
            "TAP interface",
            &[
                param("ifname", Kind::Text, "name of the interface (default: the host's choice)"),
                param("fd", Kind::Text, "number of an inherited descriptor of the interface instead"),
                param("fds", Kind::Text, "several of them, one for each queue pair: 3:4"),
                param("queues", Kind::Number, "queue pairs of ifname, 1 to 16 (default 1)"),
                param("script", Kind::Text, "no: none is ever run"),
                param("downscript", Kind::Text, "no: none is ever run"),
            ],
        ),
        sort(
            "vhost-user",
            "vhost-user back end",
            &[CHARDEV, param("queues", Kind::Number, "queue pairs, 1 to 16 (default 1)")],
        ),
    ],
    unknown: Problem::type_value,
    unexpected: Problem::foreign_parameter,
    listed: true,
};

/// `-object`.
pub static OBJECT: Kinds = Kinds {
    name: "object",
    key: "qom-type",
    implied: true,
    common: &[param("id", Kind::Id, "its identifier")],
    groups: &[
        sort(
            "iothread",
            "thread of a device's queues",
            &[
                param(
                    "poll-max-ns",
                    Kind::Number,
                    "longest busy polling in nanoseconds (default 32768, 0: none)",
                ),
                param("poll-grow", Kind::Number, "factor by which polling grows (default 0: 2)"),
                param("poll-shrink", Kind::Number, "divisor by which it shrinks (default 0: to none)"),
            ],
        ),
        sort("memory-backend-ram", "memory for a memory device", &[SIZE, SHARE, PREALLOC]),
        sort(
            "memory-backend-memfd",
            "memory for a memory device, in huge pages if wanted",
            &[
                SIZE,
                SHARE,
                PREALLOC,
                param("seal", Kind::Flag, "its length never changes: on"),
                param("hugetlb", Kind::Flag, "it is in huge pages (default off)"),
                param("hugetlbsize", Kind::Size, "their length (default 2M)"),
            ],
        ),
        sort(
            "memory-backend-file",
            "file as memory for a memory device",
            &[
                SIZE,
                param("share", Kind::Flag, "on: what the guest writes is in the file"),
                PREALLOC,
                param("mem-path", Kind::Text, "path of the file, which is made if it is not there"),
            ],
        ),
    ],
    unknown: Problem::qom_type_value,
    unexpected: Problem::foreign_parameter,
    listed: true,
};

const NODE_NAME: Param = param("node-name", Kind::Id, "name of the node");
const READ_ONLY: Param = param("read-only", Kind::Flag, "nobody writes (default off)");

/// `-blockdev`.
pub static BLOCKDEV: Kinds = Kinds {
    name: "blockdev",
    key: "driver",
    implied: true,
    common: &[NODE_NAME, READ_ONLY],
    groups: &[
        sort(
            "raw",
            "bytes as they are",
            &[
                param("file", Kind::Text, "name of the node below"),
                param(
                    "file.driver",
                    Kind::Text,
                    "driver of a node below without a name of its own: file or host_device",
                ),
                param("file.filename", Kind::Text, "its path"),
            ],
        ),
        sort("file", "regular file", &[param("filename", Kind::Text, "path")]),
        sort("host_device", "block device", &[param("filename", Kind::Text, "path")]),
    ],
    unknown: Problem::driver_value,
    unexpected: Problem::unexpected_parameter,
    listed: false,
};

/// `-drive`.
pub static DRIVE: Group = Group {
    name: "drive",
    implied: None,
    params: &[
        param("if", Kind::Text, "none, or virtio (default): a virtio-blk-pci device is added"),
        param("id", Kind::Id, "its identifier"),
        param("file", Kind::Text, "path of a file or a block device"),
        param("format", Kind::Text, "raw"),
        param("readonly", Kind::Flag, "nobody writes (default off)"),
        param("read-only", Kind::Flag, "the same"),
    ],
};
