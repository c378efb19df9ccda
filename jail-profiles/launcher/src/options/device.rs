//! `-device`.

use bulkhead_control_api::plug;

use crate::cli::{Params, Problem};

/// The most virtqueues of a device.
pub const MAX_QUEUES: u64 = 64;
/// The most descriptors of a virtqueue.
const MAX_QUEUE_SIZE: u64 = 1024;
/// The longest serial number of a disk, in bytes (virtio 1.2, 5.2.6.1).
const MAX_SERIAL: usize = 20;
/// The smallest block of virtio-mem, in bytes, as in QEMU.
const MIN_BLOCK: u64 = 2 << 20;
/// The longest name of a shared directory, in bytes (virtio 1.2, 5.11.4).
const MAX_TAG: usize = 36;

/// A `-device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its id.
    pub id: Option<String>,
    /// QEMU's name of the device model.
    pub driver: &'static str,
    /// The bus, without which it is on the root bus.
    pub bus: Option<String>,
    /// Device and function number.
    pub addr: Option<(u8, u8)>,
    /// Function 0 says that there are others.
    pub multifunction: bool,
    /// What it is.
    pub model: Model,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// A bridge with one slot.
    RootPort {
        /// Chassis number.
        chassis: u8,
        /// Slot number.
        slot: u16,
    },
    /// A disk behind a daemon of ours.
    Block(Block),
    /// A network device.
    Net(Net),
    /// The balloon.
    Balloon(Balloon),
    /// virtio-mem, or virtio-pmem.
    Memory(MemoryDevice),
    /// Anything behind somebody else's back end.
    VhostUser(VhostUser),
}

/// Properties of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Id of a drive or name of a block node.
    pub drive: String,
    /// Serial number.
    pub serial: String,
    /// Request queues.
    pub queues: u16,
    /// Discard and write-zeroes are offered.
    pub discard: bool,
    /// Id of the thread of its queues.
    pub iothread: Option<String>,
}

/// Properties of a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Net {
    /// Id of its back end.
    pub netdev: String,
    /// MAC address.
    pub mac: Option<[u8; 6]>,
    /// All queue pairs are offered.
    pub multiqueue: bool,
    /// Id of the thread of its queues.
    pub iothread: Option<String>,
}

/// Properties of the balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balloon {
    /// `deflate-on-oom`.
    pub deflate_on_oom: bool,
    /// `free-page-reporting`.
    pub free_page_reporting: bool,
    /// `page-poison`.
    pub page_poison: bool,
    /// Id of the thread of its queues.
    pub iothread: Option<String>,
}

/// Properties of a memory device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDevice {
    /// Id of its memory back end.
    pub memdev: String,
    /// Guest physical address; none if the machine chooses one.
    pub addr: Option<u64>,
    /// Id of the thread of its queue.
    pub iothread: Option<String>,
    /// Of virtio-mem.
    pub blocks: Option<Blocks>,
}

/// Properties of virtio-mem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Length of a block in bytes; none for what the memory back end makes best.
    pub size: Option<u64>,
    /// Bytes that the guest is to plug.
    pub requested: u64,
}

/// Properties of a device behind somebody else's back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUser {
    /// Its character device.
    pub chardev: String,
    /// Virtio device type.
    pub device_type: u16,
    /// Virtqueues.
    pub queues: u16,
    /// Descriptors of a queue.
    pub queue_size: u16,
    /// Configuration space; zeros where the back end knows it.
    pub config: Vec<u8>,
    /// It may go on from the used index when its back end was away.
    pub resumes: bool,
}

impl Device {
    /// What comes with a drive of `if=virtio`.
    pub const fn of_drive(drive: String) -> Self {
        let block = Block { drive, serial: String::new(), queues: 1, discard: true, iothread: None };
        let model = Model::Block(block);
        Self { id: None, driver: "virtio-blk-pci", bus: None, addr: None, multifunction: false, model }
    }
}

/// A `-device`.
pub fn device(params: &Params) -> Result<Device, Problem> {
    let name = params.text("driver").ok_or(Problem::MissingParameter("driver"))?;
    let known =
        crate::cli::devices::DEVICE.find(name).ok_or_else(|| Problem::DeviceModel(name.to_owned()))?;
    let driver = known.group.name;
    let model = match driver {
        "pcie-root-port" => Model::RootPort {
            chassis: small(params, "chassis", 0, u8::MAX.into(), 0)?,
            slot: small(params, "slot", 0, 8191, 0)?,
        },
        "virtio-blk-pci" => Model::Block(block(params)?),
        "virtio-net-pci" => Model::Net(net(params)?),
        "virtio-balloon-pci" => Model::Balloon(Balloon {
            deflate_on_oom: params.flag("deflate-on-oom").unwrap_or(false),
            free_page_reporting: params.flag("free-page-reporting").unwrap_or(false),
            page_poison: params.flag("page-poison").unwrap_or(true),
            iothread: text(params, "iothread"),
        }),
        "virtio-mem-pci" => Model::Memory(memory(params, Some(blocks(params)?))?),
        "virtio-pmem-pci" => Model::Memory(memory(params, None)?),
        _ => Model::VhostUser(vhost_user(driver, params)?),
    };
    Ok(Device {
        id: text(params, "id"),
        driver,
        bus: text(params, "bus"),
        addr: params.text("addr").map(|addr| address(driver, addr)).transpose()?,
        multifunction: params.flag("multifunction").unwrap_or(false),
        model,
    })
}

fn text(params: &Params, name: &str) -> Option<String> {
    params.text(name).map(str::to_owned)
}

/// A number from `least` to `most`.
fn small<T: TryFrom<u64>>(
    params: &Params,
    name: &'static str,
    least: u64,
    most: u64,
    default: T,
) -> Result<T, Problem> {
    let Some(number) = params.number(name) else { return Ok(default) };
    let fits = if (least..=most).contains(&number) { T::try_from(number).ok() } else { None };
    fits.ok_or(Problem::Range(name, least, most))
}

/// A queue size: a power of two.
fn queue_size(params: &Params, name: &'static str, default: u16) -> Result<u16, Problem> {
    let size = small(params, name, 0, u64::MAX, u64::from(default))?;
    let fits = size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(&size);
    u16::try_from(size).ok().filter(|_| fits).ok_or(Problem::PowerOfTwo(name, 2, MAX_QUEUE_SIZE))
}

/// Device number, dot, function number, both hexadecimal.
fn address(driver: &'static str, text: &str) -> Result<(u8, u8), Problem> {
    let number = |text: &str| {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        u8::from_str_radix(digits, 16).ok().filter(|_| plain)
    };
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    match (number(slot), number(function)) {
        (Some(slot @ 0..=31), Some(function @ 0..=7)) => Ok((slot, function)),
        _ => Err(Problem::PropertyValue(driver, "addr", text.to_owned())),
    }
}

fn block(params: &Params) -> Result<Block, Problem> {
    let serial = text(params, "serial").unwrap_or_default();
    if serial.len() > MAX_SERIAL {
        return Err(Problem::PropertyValue("virtio-blk-device", "serial", serial));
    }
    Ok(Block {
        drive: text(params, "drive").ok_or(Problem::DriveNotSet)?,
        serial,
        queues: small(params, "num-queues", 1, MAX_QUEUES, 1)?,
        discard: params.flag("discard").unwrap_or(true),
        iothread: text(params, "iothread"),
    })
}

fn net(params: &Params) -> Result<Net, Problem> {
    let wrong = |text: &str| Problem::PropertyValue("virtio-net-device", "mac", text.to_owned());
    Ok(Net {
        netdev: text(params, "netdev").ok_or(Problem::NetdevNotSet)?,
        mac: params.text("mac").map(|text| plug::mac(text).ok_or_else(|| wrong(text))).transpose()?,
        multiqueue: params.flag("mq").unwrap_or(false),
        iothread: text(params, "iothread"),
    })
}

fn memory(params: &Params, blocks: Option<Blocks>) -> Result<MemoryDevice, Problem> {
    Ok(MemoryDevice {
        memdev: text(params, "memdev").ok_or(Problem::PropertyMustBeSet("memdev"))?,
        addr: params.number("memaddr").filter(|addr| *addr != 0),
        iothread: text(params, "iothread"),
        blocks,
    })
}

fn blocks(params: &Params) -> Result<Blocks, Problem> {
    let size = params.number("block-size");
    match size {
        Some(size) if size < MIN_BLOCK => return Err(Problem::LeastValue("block-size", MIN_BLOCK)),
        Some(size) if !size.is_power_of_two() => return Err(Problem::NoPowerOfTwo("block-size")),
        _ => {}
    }
    match params.number("node").unwrap_or(0) {
        0 => Ok(Blocks { size, requested: params.number("requested-size").unwrap_or(0) }),
        node => Err(Problem::NoNode(node)),
    }
}

fn vhost_user(driver: &'static str, params: &Params) -> Result<VhostUser, Problem> {
    let missing =
        if driver == "vhost-user-blk-pci" { Problem::ChardevMandatory } else { Problem::ChardevMissing };
    let chardev = text(params, "chardev").ok_or(missing)?;
    let (device_type, queues, size, config, resumes) = match driver {
        // Configuration spaces: virtio 1.2, 5.2.4, 5.11.4 and 5.10.4. What a disk's driver waits for must not be lost; a
        // source of entropy is asked in order, and sockets to the host break off with their back end.
        "vhost-user-blk-pci" => (
            2,
            small(params, "num-queues", 1, MAX_QUEUES, 1)?,
            queue_size(params, "queue-size", 128)?,
            vec![0; 60],
            false,
        ),
        "vhost-user-fs-pci" => {
            let requests: u16 = small(params, "num-request-queues", 1, MAX_QUEUES - 1, 1)?;
            (26, requests + 1, queue_size(params, "queue-size", 128)?, fs_config(params, requests)?, false)
        }
        "vhost-user-rng-pci" => (4, 1, 4, Vec::new(), true),
        "vhost-user-vsock-pci" => (19, 3, 128, vec![0; 8], true),
        _ => {
            let size: u16 = small(params, "config_size", 0, 256, 0)?;
            let kind = small(params, "virtio-id", 1, 63, 0)?;
            if kind == 0 {
                return Err(Problem::MissingParameter("virtio-id"));
            }
            let queues = small(params, "num_vqs", 1, MAX_QUEUES, 1)?;
            (kind, queues, queue_size(params, "vq_size", 64)?, vec![0; usize::from(size)], false)
        }
    };
    Ok(VhostUser { chardev, device_type, queues, queue_size: size, config, resumes })
}

/// Tag and number of request queues.
fn fs_config(params: &Params, requests: u16) -> Result<Vec<u8>, Problem> {
    let tag = params.text("tag").filter(|tag| !tag.is_empty()).ok_or(Problem::TagMissing)?;
    if tag.len() > MAX_TAG {
        return Err(Problem::TagTooLong);
    }
    let mut config = tag.as_bytes().to_vec();
    config.resize(MAX_TAG, 0);
    config.extend(u32::from(requests).to_le_bytes());
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::devices::DEVICE;

    fn parsed(text: &str) -> Result<Device, String> {
        Params::parse_kinds(&DEVICE, text).and_then(|params| device(&params)).map_err(|e| e.to_string())
    }

    #[test]
    fn places() {
        for (text, addr) in [("3", (3, 0)), ("0x1f.7", (31, 7)), ("1e.0", (30, 0)), ("03.1", (3, 1))] {
            let device =
                parsed(&format!("virtio-balloon-pci,id=b,bus=p0,addr={text},multifunction=on")).unwrap();
            assert_eq!(
                (device.addr, device.bus.as_deref(), device.id.as_deref()),
                (Some(addr), Some("p0"), Some("b"))
            );
            assert!(device.multifunction);
        }
        for text in ["20", "3.8", "", ".", "3.", "x", "+1", "0x", "3.0.0", "100"] {
            let error = parsed(&format!("virtio-balloon-pci,addr={text}")).unwrap_err();
            assert_eq!(error, format!("Property 'virtio-balloon-pci.addr' doesn't take value '{text}'"));
        }
    }

    #[test]
    fn models() {
        let model = |text: &str| parsed(text).unwrap().model;
        assert_eq!(
            model("driver=pcie-root-port,chassis=2,slot=0x10"),
            Model::RootPort { chassis: 2, slot: 16 }
        );
        let block = Block {
            drive: "d".into(),
            serial: "s".into(),
            queues: 4,
            discard: false,
            iothread: Some("i".into()),
        };
        assert_eq!(
            model("virtio-blk-pci,drive=d,serial=s,num-queues=4,discard=off,iothread=i"),
            Model::Block(block)
        );
        let net = Net {
            netdev: "n".into(),
            mac: Some([0x52, 0, 0, 0xab, 0xcd, 0xef]),
            multiqueue: true,
            iothread: None,
        };
        assert_eq!(model("virtio-net-pci,netdev=n,mac=52:00:00:ab:CD:ef,mq=on"), Model::Net(net));
        let Model::VhostUser(fs) =
            model("vhost-user-fs-pci,chardev=c,tag=home,num-request-queues=3,queue-size=1024")
        else {
            panic!("not a back end")
        };
        assert_eq!((fs.device_type, fs.queues, fs.queue_size, fs.config.len()), (26, 4, 1024, 40));
        assert!(fs.config.starts_with(b"home\0") && fs.config.ends_with(&[3, 0, 0, 0]));
        let Model::VhostUser(any) =
            model("vhost-user-device-pci,chardev=c,virtio-id=18,num_vqs=2,config_size=7")
        else {
            panic!("not a back end")
        };
        assert_eq!((any.device_type, any.queues, any.config), (18, 2, vec![0; 7]));
    }

    #[test]
    fn refused_devices() {
        for (text, error) in [
            ("foo", "'foo' is not a valid device model name"),
            ("id=x", "Parameter 'driver' is missing"),
            ("virtio-blk-pci", "drive property not set"),
            ("virtio-blk-pci,foo=1", "Property 'virtio-blk-pci.foo' not found"),
            ("virtio-blk-pci,bogus", "Property 'virtio-blk-pci.bogus' not found"),
            ("virtio-blk-pci,drive=d,num-queues=0", "num-queues must be from 1 to 64"),
            ("virtio-blk-pci,drive=d,num-queues=65", "num-queues must be from 1 to 64"),
            ("virtio-blk-pci,drive=d,num-queues=x", "Parameter 'num-queues' expects a number"),
            (
                "virtio-blk-pci,drive=d,serial=123456789012345678901",
                "Property 'virtio-blk-device.serial' doesn't take value '123456789012345678901'",
            ),
            ("virtio-net-pci,netdev=n,mac=xx", "Property 'virtio-net-device.mac' doesn't take value 'xx'"),
            ("virtio-balloon-pci,deflate-on-oom=maybe", "Parameter 'deflate-on-oom' expects 'on' or 'off'"),
            ("vhost-user-blk-pci", "chardev is mandatory"),
            (
                "vhost-user-blk-pci,chardev=c,queue-size=100",
                "queue-size must be a power of two from 2 to 1024",
            ),
            ("vhost-user-fs-pci", "missing chardev"),
            ("vhost-user-fs-pci,chardev=c", "missing tag property"),
            ("vhost-user-rng-pci", "missing chardev"),
            ("vhost-user-device-pci,chardev=c", "Parameter 'virtio-id' is missing"),
            ("vhost-user-device-pci,chardev=c,virtio-id=64", "virtio-id must be from 1 to 63"),
            ("pcie-root-port,chassis=256", "chassis must be from 0 to 255"),
            (
                "virtio-balloon-pci,id=9",
                "Parameter 'id' expects an identifier: letters, digits, '-', '.', '_', starting with a letter",
            ),
        ] {
            assert_eq!(parsed(text).unwrap_err(), error, "{text}");
        }
        let tag = "x".repeat(37);
        assert_eq!(
            parsed(&format!("vhost-user-fs-pci,chardev=c,tag={tag}")).unwrap_err(),
            "tag property must be 36 bytes or less"
        );
    }
}
