use std::fmt::Write as _;

use bulkhead_control_api::config::DeviceMemory;

use super::*;
use crate::machine::tests::{planned, try_plan};
use crate::options::Backing;

fn virtio(device: &PciDevice) -> &Virtio {
    match &device.kind {
        PciKind::Virtio(virtio) => virtio,
        PciKind::RootPort { .. } => panic!("{device:?}"),
    }
}

#[test]
fn a_disk_has_a_daemon() {
    let plan = planned(
        "-drive if=none,id=d0,file=disk.img,format=raw,readonly=on -object iothread,id=t0,poll-grow=3 \
         -device virtio-blk-pci,drive=d0,id=b0,serial=s,num-queues=2,iothread=t0",
    );
    let bus = plan.bus;
    let device = &bus.config.devices[0];
    assert_eq!((device.id.as_str(), device.driver.as_str()), ("b0", "virtio-blk-pci"));
    let place = PciPlace { bus: "pcie.0".into(), addr: Some((1, 0)), multifunction: false };
    assert_eq!(device.place, place);
    let expected = Virtio {
        device_type: 2,
        queues: 2,
        queue_size: 256,
        config: vec![0; 60],
        without: 0,
        socket: "vhost.b0".into(),
        listens: false,
        side: Some("side.b0".into()),
        resumes: true,
        memory: None,
    };
    assert_eq!(virtio(device), &expected);
    let iothread = config::IoThread { id: "t0".into(), poll_max_ns: 32768, poll_grow: 3, poll_shrink: 0 };
    let config = config::Block {
        life: plan.console.life,
        id: "b0".into(),
        disk: "disk".into(),
        path: "disk.img".into(),
        read_only: true,
        serial: "s".into(),
        queues: 2,
        discard: true,
        iothread,
    };
    let fds = vec![("disk.b0".to_owned(), "disk".to_owned())];
    let what = plug::What::Drive { id: "d0".into(), is_node: false };
    let daemon = Daemon { key: "b0".into(), config: DaemonConfig::Block(config), fds, what, used: true };
    assert_eq!(bus.daemons, [daemon]);
    let disk = plan.opens.iter().find(|open| open.name == "disk.b0").unwrap();
    assert_eq!(disk.what, What::Disk { path: "disk.img".into(), read_only: true });
}

#[test]
fn drives_and_nodes_stand_for_each_other() {
    let plan = planned(
        "-blockdev file,node-name=f,filename=/a,read-only=on -blockdev raw,node-name=r,file=f \
         -drive file=/b -device virtio-blk-pci,drive=r",
    );
    let disks: Vec<_> = plan.opens.iter().filter(|open| open.name.starts_with("disk.")).collect();
    assert_eq!(disks[0].what, What::Disk { path: "/a".into(), read_only: true });
    assert_eq!((disks[1].name.as_str(), disks[1].at.as_str()), ("disk.#1", "-drive file=/b"));
    assert_eq!(disks[1].what, What::Disk { path: "/b".into(), read_only: false });
    assert_eq!(plan.bus.config.devices.len(), 2);
}

#[test]
fn networks() {
    let plan = planned(
        "-netdev tap,id=n0,ifname=tap0,queues=2 -device virtio-net-pci,netdev=n0,mq=on,id=a \
         -netdev tap,id=n1,fd=7 -device virtio-net-pci,netdev=n1 \
         -chardev socket,id=c,path=/s,reconnect=1 -netdev vhost-user,id=n2,chardev=c \
         -device virtio-net-pci,netdev=n2,mac=52:54:00:00:00:01",
    );
    let devices: Vec<&Virtio> = plan.bus.config.devices.iter().map(virtio).collect();
    let queues: Vec<u16> = devices.iter().map(|device| device.queues).collect();
    assert_eq!(queues, [5, 2, 2]);
    assert_eq!(devices[0].config, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 2, 0]);
    assert_eq!(devices[1].config, [0x52, 0x54, 0, 0x12, 0x34, 0x57, 1, 0, 1, 0]);
    assert_eq!(devices[2].config, [0x52, 0x54, 0, 0, 0, 1, 1, 0, 1, 0]);
    let DaemonConfig::Net(net) = &plan.bus.daemons[0].config else { panic!("no network daemon") };
    assert_eq!(net.taps, ["tap.0", "tap.1"]);
    let tap = What::Tap { netdev: "n0".into(), name: Some("tap0".into()), several: true };
    let whats = |name: &str| plan.opens.iter().find(|open| open.name == name).map(|open| open.what.clone());
    assert_eq!((whats("tap.a.0"), whats("tap.a.1")), (Some(tap.clone()), Some(tap)));
    assert_eq!(whats("tap.#1.0"), Some(What::TapFd(7)));
    assert_eq!(devices[2].socket, "chardev.c");
    assert_eq!(plan.bus.paths, BTreeMap::from([("chardev.c".to_owned(), "/s".to_owned())]));
    assert_eq!(plan.bus.daemons.len(), 2);
}

/// A machine with a port has daemons that may be started later, for all that no device uses.
#[test]
fn what_no_device_uses_is_declared() {
    let rest = "-drive if=none,id=d0,file=/a -drive if=none,id=empty -drive if=none,id=x,file=/b \
                -blockdev file,node-name=f,filename=/c -blockdev raw,node-name=r,file=f \
                -netdev tap,id=n0,ifname=tap0,queues=2 -netdev tap,id=n1,fd=7 \
                -device virtio-blk-pci,drive=d0,id=x -device virtio-net-pci,netdev=n1";
    let without = planned(rest);
    assert_eq!(without.bus.daemons.iter().map(|d| d.key.as_str()).collect::<Vec<_>>(), ["x", "#1"]);
    let plan = planned(&format!("{rest} -device pcie-root-port,id=p"));
    let keys: Vec<_> = plan.bus.daemons.iter().map(|d| (d.key.as_str(), d.used)).collect();
    let spare = |key| (key, false);
    assert_eq!(keys, [("x", true), ("#1", true), spare("x-2"), spare("r"), spare("n0"), spare("balloon")]);
    let opened: Vec<&str> = plan.opens.iter().map(|open| open.name.as_str()).collect();
    for name in ["disk.x", "disk.x-2", "disk.r", "tap.#1.0", "tap.n0.0", "tap.n0.1"] {
        assert!(opened.contains(&name), "{name}");
    }
    assert!(!opened.iter().any(|name| name.contains("empty") || *name == "disk.f"), "{opened:?}");
    assert_eq!(plan.broker.declared, plan.bus.declared());
    let mac = |last| [0x52, 0x54, 0, 0x12, 0x34, last];
    let nets: Vec<_> = plan.bus.daemons.iter().filter(|d| matches!(d.what, plug::What::Net { .. })).collect();
    assert_eq!(nets[0].what, plug::What::Net { id: "n1".into(), mac: mac(0x56), pairs: 1 });
    assert_eq!(nets[1].what, plug::What::Net { id: "n0".into(), mac: mac(0x57), pairs: 2 });
    let settings = |pairs| plug::Settings::Net { mac: mac(1), pairs, iothread: config::IoThread::default() };
    let Some(DaemonConfig::Net(net)) = nets[1].configured(&settings(2)) else { panic!("no network") };
    assert_eq!((net.taps.len(), net.mac), (2, mac(1)));
    assert_eq!(nets[1].given().len(), 1, "as many as are used");
    assert!(nets[1].configured(&settings(3)).is_none() && nets[0].configured(&settings(2)).is_none());
    let disk = plan.bus.daemons.iter().find(|daemon| daemon.key == "r").unwrap();
    assert!(disk.configured(&settings(1)).is_none(), "a disk is no network");
    assert!(plan.without_spare_balloon().broker.declared.iter().all(|own| own.what != plug::What::Balloon));
}

#[test]
fn back_ends_of_others() {
    let plan = planned(
        "-chardev socket,id=c,path=/s,server=on -device vhost-user-fs-pci,chardev=c,tag=home \
         -chardev socket,id=d,path=/t -device vhost-user-rng-pci,chardev=d \
         -chardev socket,id=e,fd=9 -device vhost-user-blk-pci,chardev=e",
    );
    let devices: Vec<&Virtio> = plan.bus.config.devices.iter().map(virtio).collect();
    let sockets: Vec<_> = devices.iter().map(|device| (device.socket.as_str(), device.listens)).collect();
    assert_eq!(sockets, [("chardev.c", true), ("chardev.d", false), ("chardev.e", false)]);
    assert_eq!(plan.bus.listeners().collect::<Vec<_>>(), ["chardev.c"]);
    assert_eq!(plan.bus.paths, BTreeMap::from([("chardev.d".to_owned(), "/t".to_owned())]));
    let opened: Vec<&str> = plan
        .opens
        .iter()
        .map(|open| open.name.as_str())
        .filter(|name| name.starts_with("chardev."))
        .collect();
    assert_eq!(opened, ["chardev.e", "chardev.c"]);
    assert!(plan.console.chardevs.iter().all(|chardev| chardev.id == "serial0"));
}

#[test]
fn places_are_taken_as_in_qemu() {
    let plan = planned(
        "-device pcie-root-port,id=p0,slot=1 -device pcie-root-port,id=p1,slot=2,addr=3.0,multifunction=on \
         -device pcie-root-port,id=p2,slot=3,addr=3.1 -device pcie-root-port,id=p3,slot=4 \
         -device pcie-root-port,id=p4,slot=5 -device virtio-balloon-pci,bus=p1",
    );
    let places: Vec<_> =
        plan.bus.config.devices.iter().map(|d| (d.place.bus.as_str(), d.place.addr.unwrap())).collect();
    assert_eq!(
        places,
        [
            ("pcie.0", (1, 0)),
            ("pcie.0", (3, 0)),
            ("pcie.0", (3, 1)),
            ("pcie.0", (2, 0)),
            ("pcie.0", (4, 0)),
            ("p1", (0, 0))
        ]
    );
}

#[test]
fn what_contradicts_is_refused_in_qemus_words() {
    let drive = "-drive if=none,id=d0,file=d.img";
    let chardev = "-chardev socket,id=c,path=/s";
    let port = "-device pcie-root-port,id=p0";
    for (line, error) in [
        ("-device virtio-blk-pci,drive=d0", "Property 'virtio-blk-device.drive' can't find value 'd0'"),
        ("-drive if=none,id=d0 -device virtio-blk-pci,drive=d0", "Device needs media, but drive is empty"),
        (&format!("{drive} {drive}"), "Duplicate ID 'd0' for drive"),
        (
            &format!("{drive} -device virtio-blk-pci,drive=d0 -device virtio-blk-pci,drive=d0"),
            "Drive 'd0' is already in use by another device",
        ),
        (&format!("{drive} -device virtio-blk-pci,drive=d0,bus=nope"), "Bus 'nope' not found"),
        (&format!("{drive} -device virtio-blk-pci,drive=d0,iothread=nope"), "Device 'nope' not found"),
        ("-blockdev raw,node-name=a,file=nope", "Cannot find device='nope' nor node-name='nope'"),
        (
            "-blockdev file,node-name=a,filename=/a -blockdev file,node-name=a,filename=/a",
            "Duplicate nodes with node-name='a'",
        ),
        ("-object iothread,id=i -object iothread,id=i", "Duplicate ID 'i' for object"),
        ("-device virtio-balloon-pci,id=a -device pcie-root-port,id=a", "Duplicate ID 'a' for device"),
        ("-device virtio-balloon-pci -device virtio-balloon-pci", "Only one balloon device is supported"),
        (
            "-device virtio-balloon-pci,addr=3 -device pcie-root-port,addr=3",
            "PCI: slot 3 function 0 not available for pcie-root-port, in use by virtio-balloon-pci,id=(null)",
        ),
        (
            "-device virtio-balloon-pci,addr=0",
            "PCI: slot 0 function 0 not available for virtio-balloon-pci, in use by mch,id=(null)",
        ),
        (
            "-device virtio-balloon-pci,addr=3.1 -device pcie-root-port,addr=3",
            "PCI: 3.0 indicates single function, but 3.1 is already populated.",
        ),
        (
            "-device pcie-root-port,addr=3 -device virtio-balloon-pci,addr=3.1",
            "PCI: single function device can't be populated in function 3.1",
        ),
        (&format!("{port} -device pcie-root-port,id=p1"), "Can't add chassis slot, error -16"),
        (
            &format!("{port} -device pcie-root-port,bus=p0,slot=1"),
            "PCI: pcie-root-port is plugged into pcie.0 only",
        ),
        (
            &format!("{port} -device virtio-balloon-pci,bus=p0,addr=1"),
            "PCI: slot 1 is not valid for virtio-balloon-pci, parent device only allows plugging into slot 0.",
        ),
        (
            &format!(
                "{port} {chardev} -device virtio-balloon-pci,bus=p0 -device vhost-user-rng-pci,bus=p0,chardev=c"
            ),
            "PCI: no slot/function available for vhost-user-rng-pci, all in use or reserved",
        ),
        ("-device virtio-net-pci,netdev=n0", "Property 'virtio-net-device.netdev' can't find value 'n0'"),
        (
            "-netdev tap,id=n0 -device virtio-net-pci,netdev=n0 -device virtio-net-pci,netdev=n0",
            "Property 'virtio-net-device.netdev' can't take value 'n0', it's in use",
        ),
        ("-netdev vhost-user,id=n0,chardev=x -device virtio-net-pci,netdev=n0", "chardev \"x\" not found"),
        ("-device vhost-user-rng-pci,chardev=x", "chardev \"x\" not found"),
        ("-chardev null,id=c -device vhost-user-rng-pci,chardev=c", "chardev \"c\" is not a unix socket"),
        (
            &format!("{chardev} -device vhost-user-rng-pci,chardev=c -device vhost-user-rng-pci,chardev=c"),
            "Device 'c' is in use",
        ),
    ] {
        let found = try_plan(line).unwrap_err();
        assert!(found.ends_with(&format!(": {error}")), "{line}: {found}");
    }
}

#[test]
fn there_is_a_most_of_everything() {
    let ports = |count: usize| {
        (0..count).fold(String::new(), |mut line, port| {
            let (slot, function) = (1 + port / 8, port % 8);
            let _ =
                write!(line, "-device pcie-root-port,slot={port},addr={slot:x}.{function},multifunction=on ");
            line
        })
    };
    assert_eq!(planned(&ports(248)).bus.config.devices.len(), 248);
    let full = (0..28).fold(String::new(), |mut line, index| {
        let _ = write!(line, "-drive file=/{index} ");
        line
    });
    assert_eq!(planned(&full).bus.daemons.len(), 28);
    let wide = (0..16).fold(String::new(), |mut line, index| {
        let _ = write!(
            line,
            "-drive if=none,id=d{index},file=/{index} -device virtio-blk-pci,drive=d{index},num-queues=64 "
        );
        line
    });
    let error = try_plan(&wide).unwrap_err();
    assert_eq!(error, "-device: all devices together have 1024 queues, at most 900 fit");
}

const MEMORY: &str = "-m 1G,maxmem=4G -object memory-backend-memfd,id=m,size=1536M \
     -object memory-backend-file,id=f,size=64M,mem-path=p,share=on ";

#[test]
fn memory_devices_have_addresses_and_daemons() {
    let plan = planned(&format!(
        "{MEMORY} -device virtio-mem-pci,memdev=m,id=v,requested-size=4M,block-size=4M -device virtio-pmem-pci,memdev=f"
    ));
    let (gib, mib) = (1 << 30, 1 << 20);
    // RAM ends below 4 GiB, the PCI window has 32.
    let base = 36 * gib;
    assert_eq!(plan.core.device_memory, 5 * gib);
    let [mem, pmem] = &plan.bus.config.devices[..] else { panic!("two devices") };
    let device = DeviceMemory { addr: base, len: 1536 * mib, pieces: 12, first: 0 };
    let virtio_mem = virtio(mem);
    assert_eq!((virtio_mem.memory, virtio_mem.device_type, virtio_mem.config.len()), (Some(device), 24, 56));
    let device = DeviceMemory { addr: base + 2 * gib, len: 64 * mib, pieces: 1, first: 12 };
    assert_eq!((virtio(pmem).memory, virtio(pmem).device_type), (Some(device), 27));
    let life = plan.console.life;
    let iothread = config::IoThread::default();
    let config = config::Mem {
        life,
        id: "v".into(),
        addr: base,
        size: 1536 * mib,
        block_size: 4 * mib,
        requested_size: 4 * mib,
        node: None,
        iothread: iothread.clone(),
    };
    assert_eq!(plan.bus.daemons[0].config, DaemonConfig::Mem(config));
    let config = config::Pmem { life, id: "#1".into(), addr: base + 2 * gib, size: 64 * mib, iothread };
    assert_eq!(plan.bus.daemons[1].config, DaemonConfig::Pmem(config));
    let memory: Vec<_> = plan.opens.iter().filter(|open| open.name.starts_with("memory.")).collect();
    let memfd = What::Memory { backing: Backing::Memfd, size: 1536 * mib, prealloc: false };
    let file = What::Memory { backing: Backing::File("p".into()), size: 64 * mib, prealloc: false };
    assert_eq!((&memory[0].what, &memory[1].what), (&memfd, &file));
    assert_eq!(plan.bus.daemons[1].given(), [("memory.#1".to_owned(), "memory".to_owned())]);
    assert_eq!(plan.broker.memory_devices.len(), 2);
    assert_eq!(plan.broker.memory_back_ends[1].path.as_deref(), Some("p"));
}

/// So many devices of 256 pieces each.
fn ids(count: u32) -> String {
    let device =
        |n| format!(" -object memory-backend-memfd,id=m{n},size=32G -device virtio-mem-pci,memdev=m{n}");
    (0..count).map(device).collect()
}

#[test]
fn what_memory_devices_cannot_be() {
    assert!(planned(&format!("-m 1G,maxmem=1T{}", ids(2))).core.device_memory > 0);
    for (line, error) in [
        (
            "-m 1G -object memory-backend-ram,id=m,size=64M -device virtio-mem-pci,memdev=m",
            "memory devices (e.g. for memory hotplug) are not enabled, please specify the maxmem option",
        ),
        ("-m 1G,maxmem=2G -device virtio-mem-pci,memdev=x", "Device 'x' not found"),
        ("-device virtio-pmem-pci", "'memdev' property must be set"),
        (
            "-m 1G,maxmem=1088M -object memory-backend-ram,id=m,size=128M -device virtio-mem-pci,memdev=m",
            "not enough space, currently 0x0 in use of total space for memory devices 0x4000000",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m -device virtio-mem-pci,memdev=m"),
            "'memdev' property specifies a busy memdev: m",
        ),
        (
            &format!("{MEMORY} -device virtio-pmem-pci,memdev=f -device virtio-pmem-pci,memdev=f"),
            "can't use already busy memdev: f",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,block-size=3M"),
            "'block-size' property has to be a power of two",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,block-size=1M"),
            "'block-size' property has to be at least 0x200000",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,block-size=1G"),
            "backend memory size must be multiple of 0x40000000",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,requested-size=3M"),
            "'requested-size' property has to be multiples of 'block-size' (0x200000)",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,requested-size=2G"),
            "'requested-size' cannot exceed the memory backend size(0x60000000)",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,memaddr=0x1000"),
            "address must be aligned to 0x200000 bytes",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,memaddr=1G"),
            "can't add memory device [0x40000000:0x60000000], usable range for memory devices [0x900000000:0x100000000]",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,memaddr=18446744073707454464"),
            "can't add memory device [0xffffffffffe00000:0x60000000], usable range for memory devices [0x900000000:0x100000000]",
        ),
        (
            &format!(
                "{MEMORY} -device virtio-mem-pci,id=v,memdev=m -device virtio-pmem-pci,memdev=f,memaddr=36G"
            ),
            "address range conflicts with memory device id='v'",
        ),
        (
            &format!("{MEMORY} -device virtio-mem-pci,memdev=m,node=1"),
            "'node' property has value '1', which exceeds the number of numa nodes: 1",
        ),
        (
            "-m 1G,maxmem=4G -object memory-backend-memfd,id=m,size=64M,hugetlb=on,hugetlbsize=1G -device virtio-mem-pci,memdev=m,block-size=2M",
            "'block-size' property has to be at least the page size (0x40000000)",
        ),
        (
            &format!("-m 1G,maxmem=1T{}", ids(3)),
            "all memory devices together have at most 512 pieces: use larger memory back ends, and fewer of them",
        ),
        ("-object iothread,id=o -object memory-backend-ram,id=o,size=1M", "Duplicate ID 'o' for object"),
    ] {
        let said = try_plan(line).unwrap_err();
        assert!(said.ends_with(error), "{line}: {said}");
    }
}
