//! The options of `bulkhead run` with their types, before they are put together to a machine.

mod acpi;
mod addfd;
mod backend;
mod block;
mod chardev;
mod device;
mod memory;
mod monitor;
mod netdev;
mod smp;

pub use acpi::AcpiTable;
pub use addfd::AddFd;
pub use backend::{Backing, MemoryBackEnd};
pub use block::{Below, Drive, Node};
pub use chardev::{Backend, Chardev, Place};
pub use device::{Balloon, Block, Device, MemoryDevice, Model, Net, VhostUser};
pub use memory::Memory;
pub use monitor::Monitor;
pub use netdev::{IoThread, NetBackend, NetDev};

use bulkhead_control_api::config::CpuTopology;

use crate::cli::{Error, Given, Opt, Params, Problem, Value};

/// A value with the option that it came from, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    /// The option as given.
    pub at: String,
    /// Its value.
    pub value: T,
}

impl<T> At<T> {
    /// A message about this option.
    pub fn error(&self, problem: Problem) -> Error {
        Error::at(&self.at, problem)
    }
}

/// What a serial port or a monitor is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing: the port does not exist.
    Nothing,
    /// The character device of this id.
    Chardev(String),
    /// A character device of its own.
    Own(Backend),
}

/// The options of `bulkhead run`.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "one per flag of the command line")]
pub struct Options {
    /// `-name`.
    pub name: Option<String>,
    /// `-uuid`, all zero without it.
    pub uuid: [u8; 16],
    /// `-m`.
    pub memory: Memory,
    /// `-smp`.
    pub cpus: CpuTopology,
    /// `-kernel`.
    pub kernel: Option<At<String>>,
    /// `-initrd`.
    pub initrd: Option<At<String>>,
    /// `-append`.
    pub append: Option<String>,
    /// `-serial`.
    pub serial: Option<At<Target>>,
    /// `-chardev`, in their order.
    pub chardevs: Vec<At<Chardev>>,
    /// `-mon` and `-qmp`, in their order.
    pub monitors: Vec<At<Monitor>>,
    /// `-add-fd`, in their order.
    pub add_fds: Vec<At<AddFd>>,
    /// `-acpitable`, in their order.
    pub tables: Vec<At<AcpiTable>>,
    /// `-device`, in their order.
    pub devices: Vec<At<Device>>,
    /// `-drive`, in their order.
    pub drives: Vec<At<Drive>>,
    /// `-blockdev`, in their order.
    pub nodes: Vec<At<Node>>,
    /// `-netdev`, in their order.
    pub netdevs: Vec<At<NetDev>>,
    /// `-object memory-backend-*`, in their order.
    pub memory_back_ends: Vec<At<MemoryBackEnd>>,
    /// `-object iothread`, in their order.
    pub iothreads: Vec<At<IoThread>>,
    /// `-S`.
    pub stopped: bool,
    /// `--preconfig`.
    pub preconfig: bool,
    /// `-no-reboot`.
    pub no_reboot: bool,
    /// `-no-shutdown`.
    pub no_shutdown: bool,
    /// `-nodefaults`.
    pub nodefaults: bool,
    /// `-nographic`.
    pub nographic: bool,
    /// `-pidfile`.
    pub pidfile: Option<String>,
}

/// Options that may be given in parts: later parameters win, messages name the last one.
#[derive(Default)]
struct Parts {
    at: String,
    params: Params,
}

impl Parts {
    fn add(&mut self, given: &Given) {
        if let Value::Params(params) = &given.value {
            self.at.clone_from(&given.at);
            self.params.merge(params);
        }
    }

    fn read<T>(&self, reader: impl FnOnce(&Params) -> Result<T, Problem>) -> Result<T, Error> {
        reader(&self.params).map_err(|problem| Error::at(&self.at, problem))
    }
}

impl Options {
    /// Gives the options their types.
    ///
    /// # Errors
    /// The first option with a value that it does not accept.
    pub fn new(given: &[Given]) -> Result<Self, Error> {
        let (mut memory, mut smp) = (Parts::default(), Parts::default());
        for option in given {
            match option.opt {
                Opt::Memory => memory.add(option),
                Opt::Smp => smp.add(option),
                _ => {}
            }
        }
        let mut options = Self {
            name: None,
            uuid: [0; 16],
            memory: memory.read(memory::memory)?,
            cpus: smp.read(smp::topology)?,
            kernel: None,
            initrd: None,
            append: None,
            serial: None,
            chardevs: Vec::new(),
            monitors: Vec::new(),
            add_fds: Vec::new(),
            tables: Vec::new(),
            devices: Vec::new(),
            drives: Vec::new(),
            nodes: Vec::new(),
            netdevs: Vec::new(),
            memory_back_ends: Vec::new(),
            iothreads: Vec::new(),
            stopped: false,
            preconfig: false,
            no_reboot: false,
            no_shutdown: false,
            nodefaults: false,
            nographic: false,
            pidfile: None,
        };
        for option in given {
            options.apply(option).map_err(|problem| option.error(problem))?;
        }
        Ok(options)
    }

    fn apply(&mut self, given: &Given) -> Result<(), Problem> {
        match &given.value {
            Value::Nothing => self.apply_flag(given.opt),
            Value::Text(text) => self.apply_text(given, text)?,
            Value::Params(params) => self.apply_params(given, params)?,
        }
        Ok(())
    }

    fn apply_flag(&mut self, opt: Opt) {
        match opt {
            Opt::Stopped => self.stopped = true,
            Opt::Preconfig => self.preconfig = true,
            Opt::NoReboot => self.no_reboot = true,
            Opt::NoShutdown => self.no_shutdown = true,
            Opt::NoDefaults => self.nodefaults = true,
            Opt::NoGraphic => self.nographic = true,
            // -enable-kvm and -no-user-config say what is always so.
            _ => {}
        }
    }

    fn apply_text(&mut self, given: &Given, text: &str) -> Result<(), Problem> {
        let at = |value| At { at: given.at.clone(), value };
        match given.opt {
            Opt::Cpu if text != "host" => return Err(Problem::CpuModel(text.to_owned())),
            Opt::Display if text != "none" => return Err(Problem::BadValue("type", text.to_owned())),
            Opt::Uuid => self.uuid = parse_uuid(text).ok_or(Problem::Uuid)?,
            Opt::Kernel => self.kernel = Some(at(text.to_owned())),
            Opt::Initrd => self.initrd = Some(at(text.to_owned())),
            Opt::Append => self.append = Some(text.to_owned()),
            Opt::PidFile => self.pidfile = Some(text.to_owned()),
            Opt::Serial => {
                let target = if text == "none" { Target::Nothing } else { chardev::target(text)? };
                let serial = At { at: given.at.clone(), value: target };
                if self.serial.replace(serial).is_some() {
                    return Err(Problem::OneSerialPort);
                }
            }
            Opt::Qmp => {
                let target = chardev::target(text)?;
                self.monitors.push(At { at: given.at.clone(), value: Monitor::open(target) });
            }
            _ => {}
        }
        Ok(())
    }

    fn apply_params(&mut self, given: &Given, params: &Params) -> Result<(), Problem> {
        match given.opt {
            Opt::Name => self.name = params.text("guest").map(str::to_owned).or(self.name.take()),
            Opt::Machine => {
                check_is(params, "type", "bulkhead", Problem::MachineType)?;
                check_is(params, "accel", "kvm", Problem::Accelerator)?;
            }
            Opt::Accel => check_is(params, "accel", "kvm", Problem::Accelerator)?,
            Opt::Chardev => push(&mut self.chardevs, given, chardev::chardev(params)?),
            Opt::AddFd => push(&mut self.add_fds, given, addfd::add_fd(params)?),
            Opt::AcpiTable => push(&mut self.tables, given, acpi::table(params)?),
            Opt::Monitor => push(&mut self.monitors, given, monitor::monitor(params)?),
            Opt::Device => push(&mut self.devices, given, device::device(params)?),
            Opt::Drive => push(&mut self.drives, given, block::drive(params)?),
            Opt::BlockDev => push(&mut self.nodes, given, block::node(params)?),
            Opt::NetDev => push(&mut self.netdevs, given, netdev::netdev(params)?),
            Opt::Object => match params.text("qom-type") {
                Some("iothread") => push(&mut self.iothreads, given, netdev::iothread(params)?),
                _ => push(&mut self.memory_back_ends, given, backend::memory(params)?),
            },
            _ => {}
        }
        Ok(())
    }
}

fn push<T>(list: &mut Vec<At<T>>, given: &Given, value: T) {
    list.push(At { at: given.at.clone(), value });
}

fn check_is(params: &Params, name: &str, only: &str, problem: fn(String) -> Problem) -> Result<(), Problem> {
    match params.text(name) {
        Some(other) if other != only => Err(problem(other.to_owned())),
        _ => Ok(()),
    }
}

/// `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, the bytes in that order.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<&str> = text.split('-').collect();
    if !groups.iter().map(|g| g.len()).eq([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits = groups.concat();
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    Some(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};

    fn options(line: &str) -> Result<Options, String> {
        let args: Vec<String> = format!("run {line}").split_whitespace().map(str::to_owned).collect();
        let Command::Run(given) = parse(&args).map_err(|e| e.to_string())? else {
            panic!("not a run: {line}")
        };
        Options::new(&given).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults() {
        let o = options("").unwrap();
        assert_eq!((o.name, o.uuid, o.memory.ram), (None, [0; 16], 128 << 20));
        assert_eq!(o.cpus, CpuTopology { cpus: 1, sockets: 1, cores: 1, threads: 1 });
        assert!(!o.stopped && !o.no_reboot && !o.no_shutdown && !o.nodefaults && !o.nographic);
        assert!(o.serial.is_none() && o.chardevs.is_empty() && o.monitors.is_empty() && o.pidfile.is_none());
    }

    #[test]
    fn what_there_is_only_one_of() {
        let line = "-M bulkhead -machine accel=kvm,type=bulkhead -accel kvm -enable-kvm -cpu host -display none \
                    -no-user-config -nodefaults -nographic -S -no-reboot -no-shutdown";
        let o = options(line).unwrap();
        assert!(o.stopped && o.no_reboot && o.no_shutdown && o.nodefaults && o.nographic);
    }

    #[test]
    fn names_and_files() {
        let o = options(
            "-name a,,b,debug-threads=on -name guest=c -kernel k -kernel K -initrd i -append x -pidfile p",
        );
        let o = o.unwrap();
        assert_eq!(o.name.as_deref(), Some("c"));
        assert_eq!(o.kernel, Some(At { at: "-kernel K".into(), value: "K".into() }));
        assert_eq!(o.initrd.map(|i| i.value).as_deref(), Some("i"));
        assert_eq!((o.append.as_deref(), o.pidfile.as_deref()), (Some("x"), Some("p")));
        assert_eq!(options("-name a,,b,debug-threads=on").unwrap().name.as_deref(), Some("a,b"));
        let uuid = options("-uuid 00112233-4455-6677-8899-AABBCCDDEEFF").unwrap().uuid;
        assert_eq!(uuid[..3], [0, 0x11, 0x22]);
        assert_eq!(uuid[15], 0xff);
    }

    #[test]
    fn options_in_parts_are_merged() {
        assert_eq!(options("-m 1G -m slots=2,maxmem=4G").unwrap().memory.ram, 1 << 30);
        assert_eq!(options("-smp 2 -smp cores=2").unwrap().cpus.cores, 2);
    }

    #[test]
    fn refused_values() {
        for (line, error) in [
            ("-M pc", "-M pc: unsupported machine type 'pc': only 'bulkhead' exists"),
            ("-M bulkhead,foo=1", "-M bulkhead,foo=1: Invalid parameter 'foo'"),
            ("-machine accel=tcg", "-machine accel=tcg: invalid accelerator tcg: only kvm exists"),
            ("-accel xen", "-accel xen: invalid accelerator xen: only kvm exists"),
            ("-cpu qemu64", "-cpu qemu64: unable to find CPU model 'qemu64': only 'host' exists"),
            ("-display gtk", "-display gtk: Parameter 'type' does not accept value 'gtk'"),
            ("-uuid foo", "-uuid foo: failed to parse UUID string: wrong format"),
            ("-name a,foo=b", "-name a,foo=b: Invalid parameter 'foo'"),
            (
                "-name a,debug-threads=x",
                "-name a,debug-threads=x: Parameter 'debug-threads' expects 'on' or 'off'",
            ),
            ("-serial null -serial none", "-serial none: this machine has one serial port"),
            ("-mon mode=control", "-mon mode=control: Parameter 'chardev' is missing"),
            ("-mon a", "-mon a: mode=readline is not available: there is no human monitor; use mode=control"),
            ("-mon a,mode=x", "-mon a,mode=x: Parameter 'mode' does not accept value 'x'"),
            ("-mon a,mode=control,pretty", "-mon a,mode=control,pretty: pretty=on is not available"),
        ] {
            assert_eq!(options(line).unwrap_err(), error);
        }
        let spaced = "00112233-4455-6677-8899-+ABBCCDDEEFF";
        assert!(options(&format!("-uuid {spaced}")).is_err());
    }
}
