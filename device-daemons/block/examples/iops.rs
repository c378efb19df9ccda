//! Random reads of 4 KiB without a VM: this daemon under its seccomp filter and qemu-storage-daemon, driven in turns over
//! vhost-user by the same driver. Run it in release form; with an argument, the host's cache is emptied all the time.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a measurement that cannot go on fails")]

use std::env;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_block::transport::Transport;
use bulkhead_control_api::config::{Block, IoThread};
use bulkhead_frontend::{EVENT_IDX, FrontEnd, Life, Memory, Queue, Sockets};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::topology::BLOCK;
use bulkhead_kit::device::{Listeners, Notices};
use bulkhead_kit::serve::Daemon;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use vm_memory::{Bytes as _, GuestAddress};

const DISK: &str = "BULKHEAD_TEST_DISK";
const POLL: &str = "BULKHEAD_TEST_POLL";
const SIZE: u64 = 256 << 20;
const ROUND: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(10);

fn main() {
    if let Ok(disk) = env::var(DISK) {
        return be_daemon(Path::new(&disk));
    }
    let cold = env::args().nth(1).is_some();
    let sockets = Sockets::new();
    let mut disk = File::create(sockets.path("disk")).unwrap();
    for _ in 0..SIZE >> 20 {
        disk.write_all(&vec![0x5a; 1 << 20]).unwrap();
    }
    disk.sync_all().unwrap();
    println!("depth  round  bulkhead-block  qemu-storage-daemon  ratio  (IOPS; CPU us per request)");
    for depth in [1, 4, 32] {
        for round in 1..=3 {
            let ours = {
                let life = Life::begin(&sockets, (DISK, &sockets.path("disk")));
                measure(sockets.connect(), depth, life.id(), cold.then_some(&disk))
            };
            let theirs = {
                let (child, stream) = storage_daemon(&sockets);
                let result = measure(stream, depth, child.0.id(), cold.then_some(&disk));
                drop(child);
                result
            };
            println!(
                "{depth:5}  {round:5}  {:8.0} ({:4.1})  {:13.0} ({:4.1})  {:5.2}",
                ours.0,
                ours.1,
                theirs.0,
                theirs.1,
                ours.0 / theirs.0
            );
        }
    }
}

fn be_daemon(disk: &Path) {
    let poll_max_ns = env::var(POLL).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let config = Block {
        life: 1,
        id: "d0".into(),
        disk: "disk".into(),
        path: String::new(),
        read_only: false,
        serial: String::new(),
        queues: 1,
        discard: true,
        iothread: IoThread { id: "io0".into(), poll_max_ns, ..IoThread::default() },
    };
    let disk = File::options().read(true).write(true).open(disk).unwrap();
    let listeners = Listeners {
        vhost: std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
        side: std::io::stdout().as_fd().try_clone_to_owned().unwrap(),
    };
    let device = Transport::new(&config, disk.into()).unwrap();
    let mut daemon =
        Daemon::new(Box::new(device), &config.iothread, Notices::new().unwrap(), listeners).unwrap();
    seccompiler::apply_filter_all_threads(BLOCK.filter).unwrap();
    daemon.serve(&Starter::default()).unwrap();
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn storage_daemon(sockets: &Sockets) -> (Killed, UnixStream) {
    let path = sockets.path("qsd");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let disk = format!("driver=file,node-name=d0,filename={}", sockets.path("disk").display());
    let child = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &disk, "--object", "iothread,id=io0,poll-max-ns=0", "--export"])
        .arg("type=vhost-user-blk,id=e0,node-name=d0,addr.type=fd,addr.str=0,writable=on,iothread=io0")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .unwrap();
    (Killed(child), UnixStream::connect(&path).unwrap())
}

/// User and system time of a process, in clock ticks of 10 ms.
fn ticks(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()
}

/// Requests a second and microseconds of the back end's processor time for each.
fn measure(stream: UnixStream, depth: u64, process: u32, cold: Option<&File>) -> (f64, f64) {
    let memory = Memory::new(64 << 20);
    let mut front_end = FrontEnd::new(stream, &memory, EVENT_IDX);
    let event_idx = front_end.features & EVENT_IDX != 0;
    let mut queue = Queue::new(&memory.map, 0, 128, 0x10_0000, event_idx);
    front_end.start(&queue, 0);
    let mut random = 12_345u64;
    let mut slots = vec![0u64; 128];
    let mut send = |queue: &mut Queue, slot: u64, slots: &mut Vec<u64>| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let sector = (random >> 33) % (SIZE / 4096) * 8;
        let at = 0x80_0000 + slot * 0x2000;
        let header = [&0u32.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        memory.map.write_slice(&header, GuestAddress(at)).unwrap();
        let head = queue.add(&[(at, 16, false), (at + 0x1000, 4096, true), (at + 0x100, 1, true)]).unwrap();
        slots[usize::from(head)] = slot;
    };
    (0..depth).for_each(|slot| send(&mut queue, slot, &mut slots));
    queue.kick(0);
    let mut run = |span: Duration| {
        let (mut count, begin) = (0u64, Instant::now());
        while begin.elapsed() < span {
            assert!(queue.wait(LIMIT));
            let since = queue.avail_index();
            while let Some((head, _)) = queue.take() {
                let slot = slots[usize::from(head)];
                send(&mut queue, slot, &mut slots);
                count += 1;
            }
            queue.kick(since);
            if let Some(disk) = cold.filter(|_| count % 64 < depth) {
                posix_fadvise(disk, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            }
        }
        (count, begin.elapsed())
    };
    run(ROUND / 4);
    let before = ticks(process);
    let (count, time) = run(ROUND);
    let used = (ticks(process) - before) * 10_000.0;
    #[expect(clippy::cast_precision_loss, reason = "a figure")]
    let count = count as f64;
    (count / time.as_secs_f64(), used / count)
}
