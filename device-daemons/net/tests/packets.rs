//! Packets through the network daemon, between a driver and a TAP interface of the kernel, in a network namespace of the
//! test's own. The daemon runs under its seccomp filter.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on fails")]
#![expect(unsafe_code, reason = "ioctl of TAP interfaces")]

use std::env;
use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_control_api::VERSION;
use bulkhead_control_api::config::{IoThread, Net};
use bulkhead_control_api::side::ToPci;
use bulkhead_frontend::{FrontEnd, Life, Memory, Part, Queue, Sockets, next_word};
use bulkhead_jail::link::Link;
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::NET;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use bulkhead_net::device::{F_CSUM, F_CTRL_VQ, F_GUEST_CSUM, F_MQ, F_MRG_RXBUF, HEAD};
use bulkhead_net::transport::Transport;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;
use vm_memory::{Bytes as _, GuestAddress};

/// Names the state file, in the process that is the daemon.
const STATE: &str = "BULKHEAD_TEST_STATE";
const LIMIT: Duration = Duration::from_secs(20);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const HOST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
const PAIRS: u16 = 2;
const SIZE: u16 = 256;

fn main() {
    if let Ok(state) = env::var(STATE) {
        return be_daemon(Path::new(&state));
    }
    make_network();
    let tests: [(&str, fn()); 6] = [
        ("packets_go_both_ways", packets_go_both_ways),
        ("a_packet_lies_in_several_buffers", a_packet_lies_in_several_buffers),
        ("the_buffers_of_a_packet_are_used_at_once", the_buffers_of_a_packet_are_used_at_once),
        ("checksums_are_the_devices_if_the_driver_says_so", checksums_are_the_devices_if_the_driver_says_so),
        (
            "a_driver_that_breaks_the_rules_harms_its_own_ring",
            a_driver_that_breaks_the_rules_harms_its_own_ring,
        ),
        (
            "queue_pairs_are_used_as_commanded_and_after_a_death",
            queue_pairs_are_used_as_commanded_and_after_a_death,
        ),
    ];
    for (name, test) in tests {
        test();
        println!("{name} ... ok");
    }
    println!("test result: ok. {} passed; 0 failed", tests.len());
}

fn ip(arguments: &str) {
    assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
}

/// The host's side is 10.0.0.1, the driver's 10.0.0.2.
fn make_network() {
    let (user, group) = (nix::unistd::getuid(), nix::unistd::getgid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).unwrap();
    std::fs::write("/proc/self/setgroups", "deny").unwrap();
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1")).unwrap();
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1")).unwrap();
    ip("tuntap add dev tap0 mode tap multi_queue vnet_hdr");
    // The only packets are the test's. There may be no IPv6 at all.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    ip("link set tap0 address 02:00:00:00:00:01");
    ip("addr add 10.0.0.1/24 dev tap0");
    ip("link set tap0 up");
    ip("neigh add 10.0.0.2 lladdr 52:54:00:12:34:56 dev tap0");
}

fn open_tap() -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE.
    request[16..18].copy_from_slice(&0x5102u16.to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` of 40 bytes.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) }, 0);
    file.into()
}

fn be_daemon(state: &Path) {
    let names = (0..PAIRS).map(|index| format!("tap.{index}")).collect();
    let config = Net { life: 7, id: "n0".into(), taps: names, mac: MAC, iothread: IoThread::default() };
    let taps = (0..PAIRS).map(|_| open_tap()).collect();
    let state = File::options().read(true).write(true).create(true).truncate(false).open(state).unwrap();
    let listeners = Listeners {
        vhost: std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
        side: std::io::stdout().as_fd().try_clone_to_owned().unwrap(),
    };
    let device = Transport::new(&config, taps, state.into()).unwrap();
    let mut daemon =
        Daemon::new(Box::new(device), &config.iothread, Notices::new().unwrap(), listeners).unwrap();
    seccompiler::apply_filter_all_threads(NET.filter).unwrap();
    daemon.serve(&Starter::default()).unwrap();
}

/// A driver of the device.
struct Rig {
    sockets: Sockets,
    memory: Memory,
    life: Option<Life>,
    front_end: Option<FrontEnd>,
    features: u64,
    queues: Vec<Queue>,
}

impl Rig {
    /// With buffers of `len` bytes for packets.
    fn new(features: u64, len: u32) -> Self {
        let (sockets, memory) = (Sockets::new(), Memory::new(64 << 20));
        let count = if features & F_MQ != 0 { PAIRS * 2 + 1 } else { 2 };
        let queue =
            |index: u16| Queue::new(&memory.map, index, SIZE, 0x1_0000 * (1 + u64::from(index)), false);
        let queues = (0..count).map(queue).collect();
        let mut rig = Self { sockets, memory, life: None, front_end: None, features, queues };
        rig.begin();
        for pair in 0..(count / 2) {
            for slot in 0..200 {
                rig.give_buffer(pair, slot, len);
            }
        }
        rig
    }

    /// The daemon lives, for the first time or again.
    fn begin(&mut self) {
        (self.front_end, self.life) = (None, None);
        self.life = Some(Life::begin(&self.sockets, (STATE, &self.sockets.path("state"))));
        let mut front_end = FrontEnd::new(self.sockets.connect(), &self.memory, self.features);
        for queue in &self.queues {
            front_end.start(queue, queue.used_index());
        }
        self.front_end = Some(front_end);
    }

    fn give_buffer(&mut self, pair: u16, slot: u64, len: u32) {
        let queue = &mut self.queues[usize::from(pair) * 2];
        let since = queue.avail_index();
        let at = 0x100_0000 + u64::from(pair) * 0x100_0000 + slot * 0x1000;
        queue.add(&[(at, len, true)]).unwrap();
        queue.kick(since);
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.map.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// The next packet of any pair in the order of its buffers: each one's content. Buffers were given in the order of
    /// their places, which are taken in that order.
    fn receive(&mut self, pair: u16, first: u64) -> Vec<Vec<u8>> {
        let queue = usize::from(pair) * 2;
        let mut pieces = Vec::new();
        let mut count = 1;
        while pieces.len() < count {
            assert!(self.queues[queue].wait(LIMIT), "no packet");
            let (_, len) = self.queues[queue].take().unwrap();
            let slot = first + u64::try_from(pieces.len()).unwrap();
            let at = 0x100_0000 + u64::from(pair) * 0x100_0000 + slot * 0x1000;
            let piece = self.bytes(at, usize::try_from(len).unwrap());
            if pieces.is_empty() {
                count = usize::from(u16::from_le_bytes([piece[10], piece[11]]));
            }
            pieces.push(piece);
        }
        pieces
    }

    fn transmit(&mut self, head: [u8; HEAD], frame: &[u8]) {
        let packet = [&head[..], frame].concat();
        self.memory.map.write_slice(&packet, GuestAddress(0x80_0000)).unwrap();
        let queue = &mut self.queues[1];
        let since = queue.avail_index();
        let rest = u32::try_from(packet.len() - 20).unwrap();
        queue.add(&[(0x80_0000, 20, false), (0x80_0000 + 20, rest, false)]).unwrap();
        queue.kick(since);
        assert!(queue.wait(LIMIT));
        queue.take().unwrap();
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.memory.map.write_slice(&[bytes, &[0xff]].concat(), GuestAddress(0x90_0000)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let queue = self.queues.last_mut().unwrap();
        let since = queue.avail_index();
        queue.add(&[(0x90_0000, len, false), (0x90_0000 + u64::from(len), 1, true)]).unwrap();
        queue.kick(since);
        assert!(queue.wait(LIMIT));
        queue.take().unwrap();
        self.bytes(0x90_0000 + u64::from(len), 1)[0]
    }
}

fn sum(bytes: &[u8], begin: u32) -> u16 {
    let mut sum = begin;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// An Ethernet frame of UDP from the driver's side. `partial`: only the pseudo head is in the checksum.
fn frame(port: u16, payload: &[u8], partial: bool) -> Vec<u8> {
    let udp_len = u16::try_from(8 + payload.len()).unwrap();
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
    ip[2..4].copy_from_slice(&(20 + udp_len).to_be_bytes());
    let header = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&header.to_be_bytes());
    let mut udp = [&7777u16.to_be_bytes()[..], &port.to_be_bytes(), &udp_len.to_be_bytes(), &[0, 0]].concat();
    udp.extend(payload);
    let pseudo = sum(&ip[12..20], 17 + u32::from(udp_len));
    let checksum = if partial { pseudo } else { !sum(&udp, pseudo.into()) };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
    [&HOST_MAC[..], &MAC, &[8, 0], &ip, &udp].concat()
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

fn arrives(socket: &UdpSocket, payload: &[u8]) {
    let mut buffer = vec![0; 2000];
    let len = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], payload);
}

// #[test], run by `main`
fn packets_go_both_ways() {
    let mut rig = Rig::new(0, 2048);
    let socket = socket();
    let port = socket.local_addr().unwrap().port();
    for round in 0..100u8 {
        let payload = vec![round; 1000];
        rig.transmit([0; HEAD], &frame(port, &payload, false));
        arrives(&socket, &payload);
        socket.send_to(&payload, "10.0.0.2:7777").unwrap();
        let pieces = rig.receive(0, round.into());
        let [packet] = &pieces[..] else { unreachable!("{} buffers", pieces.len()) };
        assert_eq!(packet[HEAD..HEAD + 6], MAC);
        assert_eq!(packet[HEAD + 42..], payload);
        // The checksum was made by the kernel: this driver does not take packets without.
        assert_eq!(packet[..2], [0, 0]);
    }
    // Nonsense in a head, and an empty packet, are lost; nothing else is.
    rig.transmit([0xff; HEAD], &frame(port, b"nonsense", false));
    rig.transmit([0; HEAD], &[0; 9]);
    rig.transmit([0; HEAD], &frame(port, b"sense", false));
    arrives(&socket, b"sense");
}

// #[test], run by `main`
fn a_packet_lies_in_several_buffers() {
    let mut rig = Rig::new(F_MRG_RXBUF, 400);
    let payload: Vec<u8> = (0..1400u16).map(|i| u8::try_from(i % 251).unwrap()).collect();
    socket().send_to(&payload, "10.0.0.2:7777").unwrap();
    let pieces = rig.receive(0, 0);
    assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [400, 400, 400, HEAD + 1442 - 1200]);
    assert_eq!(pieces.concat()[HEAD + 42..], payload);
}

/// Has all threads of a process run on these processors, as far as they exist.
fn pin(process: u32, processors: &[usize]) {
    let mut set = CpuSet::new();
    processors.iter().for_each(|processor| set.set(*processor).unwrap());
    for thread in std::fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let id = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let _there_is_only_one = sched_setaffinity(Pid::from_raw(id), &set);
    }
}

/// A driver that looks at the ring all the time never sees a part of a packet.
// #[test], run by `main`
fn the_buffers_of_a_packet_are_used_at_once() {
    let mut rig = Rig::new(F_MRG_RXBUF, 16);
    // Side by side, so that it looks while they are used.
    pin(std::process::id(), &[0]);
    pin(rig.life.as_ref().unwrap().id(), &[1]);
    let (socket, payload) = (socket(), [7; 1400]);
    let buffers = u16::try_from((HEAD + 42 + payload.len()).div_ceil(16)).unwrap();
    for round in 0..200 {
        let before = rig.queues[0].used_index();
        socket.send_to(&payload, "10.0.0.2:7777").unwrap();
        let begun = Instant::now();
        let seen = loop {
            match rig.queues[0].used_index().wrapping_sub(before) {
                0 => assert!(begun.elapsed() < LIMIT, "no packet"),
                seen => break seen,
            }
        };
        assert_eq!(seen, buffers, "round {round}");
        for slot in 0..u64::from(buffers) {
            rig.queues[0].take().unwrap();
            rig.give_buffer(0, slot, 16);
        }
    }
    pin(std::process::id(), &[0, 1]);
}

// #[test], run by `main`
fn checksums_are_the_devices_if_the_driver_says_so() {
    let mut rig = Rig::new(F_CSUM | F_GUEST_CSUM, 2048);
    let socket = socket();
    let port = socket.local_addr().unwrap().port();
    // flags NEEDS_CSUM, csum_start at the UDP head, csum_offset of its field.
    let head = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    rig.transmit(head, &frame(port, b"partial", true));
    arrives(&socket, b"partial");
    socket.send_to(b"unfinished", "10.0.0.2:7777").unwrap();
    let packet = rig.receive(0, 0).concat();
    assert_eq!((packet[0], packet[6], packet[8]), (1, 34, 6));
}

// #[test], run by `main`
fn queue_pairs_are_used_as_commanded_and_after_a_death() {
    let mut rig = Rig::new(F_MQ | F_CTRL_VQ | F_MRG_RXBUF, 2048);
    assert_eq!(rig.command(&[4, 0, 3, 0]), 1);
    assert_eq!(rig.command(&[9, 9]), 1);
    // Flows are spread over the pairs in use, here by their ports: one pair first.
    let spread = |rig: &mut Rig, total: &mut [u16; 2]| {
        for _ in 0..30 {
            socket().send_to(b"flow", "10.0.0.2:7777").unwrap();
        }
        let before = *total;
        let done = |total: &[u16; 2]| total[0] + total[1] - before[0] - before[1] == 30;
        for _ in 0..1000 {
            *total = [rig.queues[0].used_index(), rig.queues[2].used_index()];
            if done(total) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(done(total), "{total:?} after {before:?}");
        [total[0] - before[0], total[1] - before[1]]
    };
    let mut total = [0, 0];
    assert_eq!(spread(&mut rig, &mut total), [30, 0]);
    assert_eq!(rig.command(&[4, 0, 2, 0]), 0);
    assert!(spread(&mut rig, &mut total)[1] > 0);
    // Another life uses as many, although nobody tells it.
    rig.begin();
    assert!(spread(&mut rig, &mut total)[1] > 0);
    assert_eq!(rig.command(&[4, 0, 1, 0]), 0);
    assert_eq!(spread(&mut rig, &mut total), [30, 0]);
}

// #[test], run by `main`
fn a_driver_that_breaks_the_rules_harms_its_own_ring() {
    let mut rig = Rig::new(F_MRG_RXBUF, 2048);
    let mut side = Link::connect(rig.sockets.connect_side(), VERSION).unwrap();
    let socket = socket();
    let port = socket.local_addr().unwrap().port();
    // Longer than any packet: lost, and nothing else.
    let queue = &mut rig.queues[1];
    queue.add(&[(0x80_0000, 100_000, false)]).unwrap();
    queue.kick(0);
    assert!(queue.wait(LIMIT));
    queue.take().unwrap();
    let table: [&[Part]; 3] = [&[(0x80_0000, 11, false)], &[(64 << 20, 100, false)], &[(0, u32::MAX, false)]];
    for (round, parts) in (0u64..).zip(table) {
        let queue = &mut rig.queues[1];
        let since = queue.avail_index();
        queue.add(parts).unwrap();
        queue.kick(since);
        assert_eq!(next_word(&mut side), ToPci::NeedsReset);
        // The other direction goes on.
        socket.send_to(b"still there", "10.0.0.2:7777").unwrap();
        assert_eq!(rig.receive(0, round).concat()[HEAD + 42..], *b"still there");
        let front_end = rig.front_end.as_mut().unwrap();
        front_end.stop(1);
        rig.queues[1] = Queue::new(&rig.memory.map, 1, SIZE, 0x2_0000, false);
        front_end.start(&rig.queues[1], 0);
        rig.transmit([0; HEAD], &frame(port, b"mended", false));
        arrives(&socket, b"mended");
    }
    // Buffers that cannot be written, without room, or too small in all: packets are lost, nothing else is.
    let front_end = rig.front_end.as_mut().unwrap();
    front_end.stop(0);
    rig.queues[0] = Queue::new(&rig.memory.map, 0, SIZE, 0x1_0000, false);
    for _ in 0..SIZE {
        rig.queues[0].add(&[(0x80_0000, 2, true)]).unwrap();
    }
    front_end.start(&rig.queues[0], 0);
    for _ in 0..10 {
        socket.send_to(&[0; 1400], "10.0.0.2:7777").unwrap();
    }
    rig.transmit([0; HEAD], &frame(port, b"alive", false));
    arrives(&socket, b"alive");
    assert_eq!(rig.queues[0].used_index(), 0);
}
