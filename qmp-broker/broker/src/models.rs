//! Device models that can be plugged in while the machine runs: those with a vhost-user back end behind a character
//! device. Those of our own daemons are in [`crate::own`].

use bulkhead_control_api::config::Virtio;
use bulkhead_qapi::Error;

/// The most virtqueues of a device, and descriptors of a queue.
const MAX_QUEUES: u16 = 64;
const MAX_QUEUE_SIZE: u16 = 1024;
/// Bytes of a file system's tag (virtio 1.2, 5.11.4).
const MAX_TAG: usize = 36;

/// A model.
#[derive(Debug)]
pub struct Model {
    /// QEMU's name of it.
    pub driver: &'static str,
    /// QEMU's name of the virtio device in it, which messages about its own properties have.
    pub inner: &'static str,
    /// Its own properties beside `chardev`.
    pub properties: &'static [&'static str],
    build: fn(&Properties<'_>) -> Result<Shape, Error>,
}

/// What pci has to know of it.
struct Shape {
    device_type: u16,
    queues: u16,
    queue_size: u16,
    config: Vec<u8>,
    resumes: bool,
}

/// All models. Who resumes: what a disk's driver waits for must not be lost; a source of entropy is asked in order, and
/// sockets to the host break off with their back end. Configuration spaces: virtio 1.2, 5.2.4, 5.11.4 and 5.10.4.
pub static MODELS: [Model; 5] = [
    Model {
        driver: "vhost-user-blk-pci",
        inner: "vhost-user-blk",
        properties: &["num-queues", "queue-size"],
        build: |properties| {
            let queues = properties.number("num-queues", 1)?;
            if queues == 0 || queues > MAX_QUEUES {
                return Err(Error::generic("vhost-user-blk: invalid number of IO queues"));
            }
            let queue_size = properties.number("queue-size", 128)?;
            if queue_size == 0 {
                return Err(Error::generic("vhost-user-blk: queue size must be non-zero"));
            }
            power_of_two(queue_size)?;
            Ok(Shape { device_type: 2, queues, queue_size, config: vec![0; 60], resumes: false })
        },
    },
    Model {
        driver: "vhost-user-fs-pci",
        inner: "vhost-user-fs-device",
        properties: &["tag", "num-request-queues", "queue-size"],
        build: |properties| {
            let tag = properties.text("tag").ok_or_else(|| Error::generic("missing tag property"))?;
            if tag.is_empty() {
                return Err(Error::generic("tag property cannot be empty"));
            }
            if tag.len() > MAX_TAG {
                return Err(Error::generic(format!("tag property must be {MAX_TAG} bytes or less")));
            }
            let requests = properties.number("num-request-queues", 1)?;
            if requests == 0 {
                return Err(Error::generic("num-request-queues property must be larger than 0"));
            }
            if requests >= MAX_QUEUES {
                let desc = format!("num-request-queues property must be smaller than {MAX_QUEUES}");
                return Err(Error::generic(desc));
            }
            let queue_size = properties.number("queue-size", 128)?;
            power_of_two(queue_size)?;
            let mut config = tag.as_bytes().to_vec();
            config.resize(MAX_TAG, 0);
            config.extend(u32::from(requests).to_le_bytes());
            Ok(Shape { device_type: 26, queues: requests + 1, queue_size, config, resumes: false })
        },
    },
    Model {
        driver: "vhost-user-vsock-pci",
        inner: "vhost-user-vsock-device",
        properties: &[],
        build: |_| Ok(fixed(19, 3, 128, 8)),
    },
    Model {
        driver: "vhost-user-rng-pci",
        inner: "vhost-user-rng",
        properties: &[],
        build: |_| Ok(fixed(4, 1, 4, 0)),
    },
    Model {
        driver: "vhost-user-device-pci",
        inner: "vhost-user-device",
        properties: &["virtio-id", "num_vqs", "vq_size", "config_size"],
        build: |properties| {
            let device_type = properties.number("virtio-id", 0)?;
            let queues = properties.number("num_vqs", 1)?;
            let size = properties.number("config_size", 0)?;
            if !(1..=63).contains(&device_type) || !(1..=MAX_QUEUES).contains(&queues) || size > 256 {
                let desc = "virtio-id must be from 1 to 63, num_vqs from 1 to 64, config_size up to 256";
                return Err(Error::generic(desc));
            }
            let queue_size = properties.number("vq_size", 64)?;
            power_of_two(queue_size)?;
            Ok(Shape { device_type, queues, queue_size, config: vec![0; size.into()], resumes: false })
        },
    },
];

/// A device without properties of its own.
fn fixed(device_type: u16, queues: u16, queue_size: u16, config: usize) -> Shape {
    Shape { device_type, queues, queue_size, config: vec![0; config], resumes: true }
}

fn power_of_two(size: u16) -> Result<(), Error> {
    if !size.is_power_of_two() || size < 2 {
        return Err(Error::generic("queue-size property must be a power of 2"));
    }
    if size > MAX_QUEUE_SIZE {
        return Err(Error::generic(format!("queue-size property must be {MAX_QUEUE_SIZE} or smaller")));
    }
    Ok(())
}

/// Names and values that a client gave, as text.
#[derive(Clone, Copy, Debug)]
pub struct Properties<'a>(pub &'a [(String, String)]);

impl<'a> Properties<'a> {
    /// The value of a property; of several the last one.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// A number of 16 bits, in decimal, hexadecimal (`0x`) or octal (`0`).
    pub(crate) fn number(&self, name: &str, default: u16) -> Result<u16, Error> {
        let Some(text) = self.text(name) else { return Ok(default) };
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text),
        };
        let (radix, digits) = match digits.strip_prefix("0x") {
            Some(digits) => (16, digits),
            None if digits.len() > 1 && digits.starts_with('0') => (8, digits),
            None => (10, digits),
        };
        let number = u64::from_str_radix(digits, radix)
            .map_err(|_| Error::generic(format!("Parameter '{name}' expects integer")))?;
        let small = u16::try_from(number).ok().filter(|number| *number == 0 || !negative);
        small.ok_or_else(|| Error::generic(format!("Parameter '{name}' expects uint16_t")))
    }
}

impl Model {
    /// The model of that name.
    #[must_use]
    pub fn find(driver: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.driver == driver)
    }

    /// A device whose back end is behind the socket of this name.
    ///
    /// # Errors
    /// A property is missing or has a value that it cannot have.
    pub fn device(&self, properties: &Properties<'_>, socket: String) -> Result<Virtio, Error> {
        let Shape { device_type, queues, queue_size, config, resumes } = (self.build)(properties)?;
        Ok(Virtio {
            device_type,
            queues,
            queue_size,
            config,
            without: 0,
            socket,
            listens: false,
            side: None,
            resumes,
            memory: None,
        })
    }
}
