//! Core with a pci daemon, played by the test.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use bulkhead_bus_api::main_link::Command;
use bulkhead_bus_api::pci::{
    Ask, Change, FromCore, MAX_BELLS, MAX_CHANGES, MAX_EVENTFDS, MAX_VECTORS, MAX_WINDOWS, Memory, Msi,
    Refusal, ToCore, Window,
};
use bulkhead_bus_api::platform::{ECAM, PCI_MEM32};
use bulkhead_bus_api::{Access, Action, MAX_REQUEST_LEN, Op as BusOp, Reply, Request, Space};
use bulkhead_control_api::core::{Answer, Cause, Event, Op, RunState};
use bulkhead_jail::link::{Link, LinkError};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::program::Program;
use super::rig::{Rig, config, connect_to, load, plain_console};

/// Addresses of the first page of configuration space and of memory that nobody has but pci.
const CONFIG: u32 = 0xe000_0000;
const BAR: u32 = 0xc000_0000;

/// One life of a pci daemon.
struct Pci {
    main: Link,
    links: Vec<OwnedFd>,
    memory: Vec<Memory>,
    ecam: File,
    commands: Vec<Command>,
    last_id: u32,
}

/// A request as pci sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    seq: u32,
    access: Access,
}

impl Pci {
    fn connect(rig: &Rig) -> Self {
        let mut main = Link::connect(connect_to(&rig.pci), bulkhead_bus_api::VERSION).unwrap();
        let (welcome, mut fds) = main.recv_with::<FromCore>(MsgFlags::empty()).unwrap();
        let FromCore::Welcome { vcpus, memory } = welcome else { panic!("{welcome:?}") };
        assert_eq!(fds.len(), usize::from(vcpus) + memory.len() + 1);
        let ecam = File::from(fds.pop().unwrap());
        for (memory, fd) in memory.iter().zip(&fds[usize::from(vcpus)..]) {
            assert_eq!(nix::sys::stat::fstat(fd).unwrap().st_size, i64::try_from(memory.len).unwrap());
        }
        fds.truncate(usize::from(vcpus));
        for fd in &fds {
            setsockopt(fd, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
        }
        Self { main, links: fds, memory, ecam, commands: vec![], last_id: 0 }
    }

    fn ready(&self) {
        self.main.send(&ToCore::Ready).unwrap();
    }

    fn ask(&mut self, what: Ask) -> (Result<(), Refusal>, Vec<OwnedFd>) {
        self.ask_with(what, &[])
    }

    /// Asks; carries out commands that come before the answer.
    fn ask_with(&mut self, what: Ask, fds: &[BorrowedFd<'_>]) -> (Result<(), Refusal>, Vec<OwnedFd>) {
        self.last_id += 1;
        let ask = ToCore::Ask { id: self.last_id, what };
        self.main.send_with(&ask, fds, MsgFlags::empty()).unwrap();
        loop {
            match self.main.recv_with::<FromCore>(MsgFlags::empty()).unwrap() {
                (FromCore::Answer { id, result }, fds) => {
                    assert_eq!(id, self.last_id);
                    return (result, fds);
                }
                (FromCore::Command { id, what }, _) => self.done(id, what),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Has core make changes; windows are of the configuration window's memory.
    fn apply(&mut self, changes: &[Change]) -> Result<(), Refusal> {
        let file = self.ecam.try_clone().unwrap();
        self.apply_with(changes, &file)
    }

    /// The same with windows of another file.
    fn apply_with(&mut self, changes: &[Change], file: &File) -> Result<(), Refusal> {
        let ask = Ask::Apply(changes.to_vec());
        let fds = vec![file.as_fd(); ask.descriptors()];
        let (result, fds) = self.ask_with(ask, &fds);
        assert!(fds.is_empty());
        result
    }

    fn done(&mut self, id: u32, what: Command) {
        self.commands.push(what);
        self.main.send(&ToCore::Done { id }).unwrap();
    }

    /// The next command, not yet carried out.
    fn command(&mut self) -> (u32, Command) {
        match self.main.recv().unwrap() {
            FromCore::Command { id, what } => (id, what),
            other => panic!("{other:?}"),
        }
    }

    /// Carries out the next command, which is expected.
    fn obey(&mut self, expected: Command) {
        let (id, what) = self.command();
        assert_eq!(what, expected);
        self.done(id, what);
    }

    /// The next access of a vCPU.
    fn access(&self, vcpu: usize) -> Asked {
        let mut packet = [0; MAX_REQUEST_LEN];
        let len = recv(self.links[vcpu].as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        let request = Request::decode(&packet[..len]).unwrap();
        assert_eq!(request.writes().count(), 0, "what was collected is for the console");
        Asked { seq: request.seq, access: request.access }
    }

    fn reply(&self, vcpu: usize, asked: Asked, data: u64) {
        let reply = Reply { seq: asked.seq, action: Action::None, data }.encode();
        send(self.links[vcpu].as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    /// Answers the next access, which is expected.
    fn serve(&self, addr: u64, size: u8, op: BusOp, data: u64) {
        let asked = self.access(0);
        assert_eq!(asked.access, Access { space: Space::Mmio, addr, size, op });
        self.reply(0, asked, data);
    }

    fn eventfds(&mut self, vectors: &[u16], bells: &[u16]) -> Vec<File> {
        let ask = Ask::Eventfds { vectors: vectors.to_vec(), bells: bells.to_vec() };
        let (result, fds) = self.ask(ask);
        assert_eq!((result, fds.len()), (Ok(()), vectors.len() + bells.len()));
        fds.into_iter().map(File::from).collect()
    }
}

/// What an eventfd has counted, and takes it.
fn count(mut event: &File) -> u64 {
    let mut count = [0; 8];
    std::io::Read::read_exact(&mut event, &mut count).map_or(0, |()| u64::from_ne_bytes(count))
}

/// Pages of configuration space, read from memory.
fn pages(window: u16, first: u64, count: u64) -> Change {
    let (offset, len) = (first << 12, count << 12);
    let to = Some(Window { gpa: ECAM.base + offset, len, offset, writable: false });
    Change::Window { window, to }
}

/// A machine with console and pci that is started.
fn started(program: Program) -> (Rig, Pci) {
    let mut rig = Rig::with(config(1), true, true, load(program));
    rig.connect_console(plain_console());
    let pci = Pci::connect(&rig);
    pci.ready();
    rig.connect_broker();
    assert_eq!(rig.ask(Op::Start), (Ok(Answer::Done), vec![(Event::Resume, RunState::Running)]));
    (rig, pci)
}

/// A guest that reads configuration space again and again, and counts.
fn reading() -> Program {
    Program::default().load(CONFIG, 4).count(0).again()
}

#[test]
fn a_machine_starts_when_pci_says_that_it_is_ready() {
    let mut rig = Rig::with(config(1), true, true, load(reading()));
    rig.connect_console(plain_console());
    rig.connect_broker();
    let start = bulkhead_control_api::core::Request { id: 99, op: Op::Start };
    rig.broker.as_mut().unwrap().send(&start).unwrap();
    let mut pci = Pci::connect(&rig);
    assert_eq!(pci.memory, [Memory { base: 0, len: 16 << 20 }]);
    assert_eq!(pci.ecam.metadata().unwrap().len(), ECAM.len);
    assert!(pci.ecam.set_len(0).is_err());
    // It asks before that, too.
    assert_eq!(pci.eventfds(&[0, 1], &[0]).len(), 3);
    assert_eq!(rig.status(), RunState::Prelaunch);
    pci.ready();
    assert_eq!(rig.event(), (Event::Resume, RunState::Running));
    let reply = rig.broker.as_mut().unwrap().recv::<bulkhead_control_api::core::FromCore>().unwrap();
    assert!(matches!(reply, bulkhead_control_api::core::FromCore::Reply { id: 99, .. }), "{reply:?}");
    pci.serve(CONFIG.into(), 4, BusOp::Read, 0x1234_5678);
    rig.wait_result(0, |count| count == 1);
    assert_eq!(rig.result(4), 0x1234_5678);
    rig.quit();
}

#[test]
fn pci_has_memory_and_nothing_else() {
    let program = Program::default()
        .load(BAR, 0)
        .poke(0xdfff_fffc, 0x1122_3344)
        .load(0xbfff_fffc, 4) // below
        .load(0xf000_0000, 8) // above
        .in32(0x1234, 0xc)
        .in8(0x3fd, 0x10)
        .load(BAR + 0x1000 - 3, 0x14) // across the end of a page
        .count(0x20)
        .halt();
    let (mut rig, pci) = started(program);
    pci.serve(BAR.into(), 4, BusOp::Read, 7);
    pci.serve(0xdfff_fffc, 4, BusOp::Write(0x1122_3344), 0);
    for (at, byte) in (0xffd..0x1001).zip([0x11, 0x22, 0x33, 0x44]) {
        pci.serve(u64::from(BAR) + at, 1, BusOp::Read, byte);
    }
    rig.wait_result(0x20, |n| n == 1);
    assert_eq!([0, 4, 8, 0xc].map(|at| rig.result(at)), [7, u32::MAX, u32::MAX, u32::MAX]);
    assert_eq!((rig.result(0x10), rig.result(0x14)), (0x88, 0x4433_2211));
    assert_eq!((rig.counters().forwarded, rig.counters().unclaimed), (7, 3));
    rig.quit();
}

#[test]
fn a_machine_without_pci_has_nothing_there() {
    let program = Program::default().load(CONFIG, 0).load(BAR, 4).count(8).halt();
    let mut rig = Rig::started(config(1), program, plain_console());
    rig.wait_result(8, |n| n == 1);
    assert_eq!((rig.result(0), rig.result(4)), (u32::MAX, u32::MAX));
    assert_eq!(rig.counters().unclaimed, 2);
    rig.quit();
}

#[test]
fn a_bell_rings_without_an_exit_and_moves() {
    let program = Program::default().poke(BAR + 8, 1).poke(BAR + 0x100, 2).count(0).load(CONFIG, 4).again();
    let (rig, mut pci) = started(program);
    // The first round by exits.
    pci.serve(u64::from(BAR) + 8, 4, BusOp::Write(1), 0);
    pci.serve(u64::from(BAR) + 0x100, 4, BusOp::Write(2), 0);
    let bells = pci.eventfds(&[], &[3, 899]);
    let near = u64::from(BAR) + 8;
    assert_eq!(pci.apply(&[Change::Bell { bell: 3, at: Some(near) }]), Ok(()));
    // The same again, and over another one.
    assert_eq!(pci.apply(&[Change::Bell { bell: 3, at: Some(near) }]), Ok(()));
    let over = Change::Bell { bell: 899, at: Some(near) };
    assert_eq!(pci.apply(&[over]), Err(Refusal::NotPermitted));
    pci.serve(CONFIG.into(), 4, BusOp::Read, 0);
    pci.serve(near - 8 + 0x100, 4, BusOp::Write(2), 0);
    assert_eq!(bells.iter().map(count).collect::<Vec<_>>(), [1, 0]);
    let swap = [Change::Bell { bell: 3, at: Some(near - 8 + 0x100) }, over];
    assert_eq!(pci.apply(&swap), Ok(()));
    pci.serve(CONFIG.into(), 4, BusOp::Read, 0);
    let asked = pci.access(0);
    assert_eq!(asked.access.addr, u64::from(CONFIG));
    assert_eq!(bells.iter().map(count).collect::<Vec<_>>(), [1, 1]);
    let away = [Change::Bell { bell: 3, at: None }, Change::Bell { bell: 899, at: None }];
    assert_eq!(pci.apply(&away), Ok(()));
    assert_eq!(pci.apply(&away), Ok(()));
    pci.reply(0, asked, 0);
    pci.serve(near, 4, BusOp::Write(1), 0);
    rig.quit();
}

#[test]
fn a_page_of_configuration_space_is_read_without_an_exit_and_written_by_one() {
    let program = Program::default().load(CONFIG + 0x8000, 4).poke(CONFIG + 0x8004, 9).count(0).again();
    let (rig, mut pci) = started(program);
    let page = u64::from(CONFIG) + 0x8000;
    pci.ecam.write_all_at(&[0x78, 0x56, 0x34, 0x12], 0x8000).unwrap();
    pci.serve(page, 4, BusOp::Read, 1);
    pci.serve(page + 4, 4, BusOp::Write(9), 0);
    let asked = pci.access(0);
    assert_eq!(pci.apply(&[pages(8, 8, 1)]), Ok(()));
    pci.reply(0, asked, 2);
    pci.serve(page + 4, 4, BusOp::Write(9), 0);
    pci.serve(page + 4, 4, BusOp::Write(9), 0);
    rig.wait_result(0, |n| n >= 3);
    assert_eq!(rig.result(4), 0x1234_5678);
    let asked = pci.access(0);
    assert_eq!(pci.apply(&[Change::Window { window: 8, to: None }]), Ok(()));
    pci.reply(0, asked, 0);
    pci.serve(page, 4, BusOp::Read, 3);
    rig.quit();
}

/// A memfd of so many pages, each of which begins with its number from 1.
fn memory(count: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(count << 12).unwrap();
    for page in 0..count {
        file.write_all_at(&u32::try_from(page + 1).unwrap().to_le_bytes(), page << 12).unwrap();
    }
    file
}

fn word(file: &File, at: u64) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at).unwrap();
    u32::from_le_bytes(bytes)
}

const WINDOW: Window = Window { gpa: BAR as u64, len: 0x2000, offset: 0x1000, writable: true };

fn at(to: Window) -> Change {
    Change::Window { window: 300, to: Some(to) }
}

const GONE: Change = Change::Window { window: 300, to: None };

#[test]
fn a_window_is_memory_until_it_is_taken_away() {
    let program = Program::default().load(BAR, 4).poke(BAR + 0x1008, 9).count(0).load(CONFIG, 8).again();
    let (rig, mut pci) = started(program);
    let file = memory(3);
    pci.serve(BAR.into(), 4, BusOp::Read, 77);
    pci.serve(u64::from(BAR) + 0x1008, 4, BusOp::Write(9), 0);
    assert_eq!(rig.wait_result(4, |word| word == 77), 77);
    let mut asked = pci.access(0);
    // Now and from elsewhere in the file, read-only, and nothing.
    assert_eq!(pci.apply_with(&[at(WINDOW)], &file), Ok(()));
    pci.reply(0, asked, 0);
    asked = pci.access(0);
    assert_eq!((asked.access.addr, rig.result(4), word(&file, 0x2008)), (CONFIG.into(), 2, 9));
    assert_eq!(pci.apply_with(&[at(WINDOW), at(Window { offset: 0, ..WINDOW })], &file), Ok(()));
    pci.reply(0, asked, 0);
    asked = pci.access(0);
    assert_eq!((asked.access.addr, rig.result(4), word(&file, 0x1008)), (CONFIG.into(), 1, 9));
    // Another file at the same place.
    let other = memory(3);
    other.write_all_at(&[5], 0x1000).unwrap();
    assert_eq!(pci.apply_with(&[at(Window { writable: false, ..WINDOW })], &other), Ok(()));
    pci.reply(0, asked, 0);
    pci.serve(u64::from(BAR) + 0x1008, 4, BusOp::Write(9), 0);
    asked = pci.access(0);
    assert_eq!((asked.access.addr, rig.result(4)), (CONFIG.into(), 5));
    assert_eq!(pci.apply(&[GONE, GONE]), Ok(()));
    pci.reply(0, asked, 0);
    pci.serve(BAR.into(), 4, BusOp::Read, 78);
    pci.serve(u64::from(BAR) + 0x1008, 4, BusOp::Write(9), 0);
    rig.quit();
}

#[test]
fn a_window_that_is_asked_for_again_is_not_away_for_a_moment() {
    let (rig, mut pci) = started(Program::default().load(BAR, 4).count(0).again());
    let asked = pci.access(0);
    let file = memory(3);
    assert_eq!(pci.apply_with(&[at(WINDOW)], &file), Ok(()));
    pci.reply(0, asked, 0);
    for _ in 0..500 {
        assert_eq!(pci.apply_with(&[at(WINDOW)], &file), Ok(()));
    }
    let before = rig.result(0);
    rig.wait_result(0, |n| n != before);
    // Nor by what is refused.
    for bad in [Window { offset: 0x2000, ..WINDOW }, Window { gpa: 0, ..WINDOW }] {
        assert_eq!(pci.apply_with(&[at(bad)], &file), Err(Refusal::NotPermitted));
    }
    let before = rig.result(0);
    rig.wait_result(0, |n| n != before);
    let mut byte = [0];
    let flags = MsgFlags::MSG_DONTWAIT;
    assert!(recv(pci.links[0].as_raw_fd(), &mut byte, flags).is_err(), "the guest has come out");
    rig.quit();
}

#[test]
fn windows_are_checked() {
    let (rig, mut pci) = started(Program::default().count(0).again());
    let file = memory(4);
    let high = 0x1_0000_0000;
    let devices = high + (32 << 30);
    let other = Change::Window { window: 301, to: Some(Window { gpa: high + 0x5000, ..WINDOW }) };
    assert_eq!(pci.apply_with(&[at(WINDOW), other], &file), Ok(()));
    let bad = [
        // Not pages.
        Window { gpa: WINDOW.gpa + 8, ..WINDOW },
        Window { len: 0x1800, ..WINDOW },
        Window { offset: 0x800, ..WINDOW },
        Window { len: 0, ..WINDOW },
        // Beyond the end of the file.
        Window { offset: 0x3000, ..WINDOW },
        Window { offset: u64::MAX - 0xfff, ..WINDOW },
        Window { offset: 1 << 63, ..WINDOW },
        // Not, or not wholly, in one of pci's ranges.
        Window { gpa: 0, ..WINDOW },
        Window { gpa: PCI_MEM32.base - 0x1000, ..WINDOW },
        Window { gpa: ECAM.base - 0x1000, ..WINDOW },
        Window { gpa: ECAM.base + ECAM.len - 0x1000, ..WINDOW },
        Window { gpa: 0xfee0_0000, ..WINDOW },
        Window { gpa: high - 0x1000, ..WINDOW },
        Window { gpa: devices - 0x1000, ..WINDOW },
        Window { gpa: devices + (1 << 20) - 0x1000, ..WINDOW },
        Window { gpa: u64::MAX - 0xfff, ..WINDOW },
        Window { len: u64::MAX - 0xfff, ..WINDOW },
        // Over another one.
        Window { gpa: high + 0x4000, ..WINDOW },
        Window { gpa: high + 0x6000, ..WINDOW },
        Window { gpa: high + 0x5000, len: 0x1000, ..WINDOW },
        Window { gpa: high + 0x4000, len: 0x4000, offset: 0, ..WINDOW },
    ];
    for window in bad {
        assert_eq!(pci.apply_with(&[at(window)], &file), Err(Refusal::NotPermitted), "{window:x?}");
    }
    // Beside it, and where memory devices are.
    for gpa in [high + 0x3000, high + 0x7000, devices, devices + (1 << 20) - 0x2000] {
        assert_eq!(pci.apply_with(&[at(Window { gpa, ..WINDOW })], &file), Ok(()));
    }
    // No regular file, and one that is not open for writing.
    let (end, _other) = std::io::pipe().unwrap();
    let pipe = File::from(OwnedFd::from(end));
    for file in [File::open("/dev/zero").unwrap(), File::open("/").unwrap(), pipe] {
        assert_eq!(pci.apply_with(&[at(WINDOW)], &file), Err(Refusal::NotPermitted));
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let readable = File::open(path).unwrap();
    assert!(matches!(pci.apply_with(&[at(WINDOW)], &readable), Err(Refusal::Host(_))));
    assert_eq!(pci.apply_with(&[at(Window { writable: false, ..WINDOW })], &readable), Ok(()));
    rig.quit();
}

#[test]
fn a_file_that_shrinks_below_its_window_stops_the_machine_and_a_reset_helps() {
    // The guest runs in the window: what KVM reads for its own emulation may end as an exit instead.
    let (mut rig, mut pci) = started(Program::default().load(BAR, 4).jump(BAR + 0x1000));
    let asked = pci.access(0);
    let file = memory(3);
    let code = Program::default().count(0).again();
    file.write_all_at(code.bytes(), 0x2000).unwrap();
    assert_eq!(pci.apply_with(&[at(WINDOW)], &file), Ok(()));
    pci.reply(0, asked, 0);
    rig.wait_result(0, |count| count > 2);
    file.set_len(0).unwrap();
    pci.obey(Command::Pause);
    assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
    assert_eq!(rig.ask(Op::Cont).0, Err(bulkhead_control_api::core::Refusal::ResetRequired));
    let reset = thread::spawn(move || (rig.ask(Op::Reset).0, rig));
    pci.obey(Command::Reset);
    let (answer, mut rig) = reset.join().unwrap();
    assert_eq!((answer, rig.status()), (Ok(Answer::Done), RunState::Prelaunch));
    let good = memory(3);
    good.write_all_at(code.bytes(), 0x2000).unwrap();
    assert_eq!(pci.apply_with(&[at(WINDOW)], &good), Ok(()));
    let before = rig.result(0);
    let go = thread::spawn(move || (rig.ask(Op::Cont).0, rig));
    pci.obey(Command::Resume);
    let (answer, rig) = go.join().unwrap();
    assert_eq!(answer, Ok(Answer::Done));
    rig.wait_result(0, |count| count > before);
    assert_eq!(rig.result(4), 2);
    rig.quit();
}

#[test]
fn what_is_not_pcis_to_ask_is_refused_and_nothing_else() {
    let (mut rig, mut pci) = started(Program::default().count(0).again());
    let msi = |address| Some(Msi { address, data: 0x41 });
    let good = Change::Vector { vector: 0, to: msi(0xfee0_0000) };
    let bad = [
        Change::Vector { vector: MAX_VECTORS, to: None },
        Change::Vector { vector: MAX_VECTORS, to: msi(0xfee0_0000) },
        Change::Vector { vector: 0, to: msi(0xfed0_0000) },
        Change::Vector { vector: 0, to: msi(0xfef0_0000) },
        Change::Bell { bell: MAX_BELLS, at: None },
        Change::Bell { bell: 0, at: Some(0x1000) },
        Change::Bell { bell: 0, at: Some(PCI_MEM32.base - 1) },
        Change::Bell { bell: 0, at: Some(ECAM.base) },
        Change::Bell { bell: 0, at: Some(0xfee0_0000) },
        Change::Bell { bell: 0, at: Some(0x1_0000_0000 - 1) },
        Change::Bell { bell: 0, at: Some(0x1_0000_0000 + (32 << 30)) },
        Change::Bell { bell: 0, at: Some(u64::MAX) },
        pages(0, 0xffff, 2),
        pages(MAX_WINDOWS, 0, 1),
        Change::Window { window: MAX_WINDOWS, to: None },
    ];
    for change in bad {
        assert_eq!(pci.apply(&[good, change]), Err(Refusal::NotPermitted), "{change:?}");
    }
    assert_eq!(pci.apply(&vec![good; MAX_CHANGES + 1]), Err(Refusal::NotPermitted));
    for (vectors, bells) in
        [(vec![MAX_VECTORS], vec![]), (vec![], vec![MAX_BELLS]), (vec![0; MAX_EVENTFDS], vec![0])]
    {
        let (result, fds) = pci.ask(Ask::Eventfds { vectors, bells });
        assert_eq!((result, fds.len()), (Err(Refusal::NotPermitted), 0));
    }
    // The ends of what is.
    let last = [
        Change::Bell { bell: MAX_BELLS - 1, at: Some(0x1_0000_0000 + (32 << 30) - 1) },
        Change::Bell { bell: MAX_BELLS - 2, at: Some(ECAM.base - 1) },
        Change::Vector { vector: MAX_VECTORS - 1, to: msi(0xfeef_fffc) },
        pages(MAX_WINDOWS - 1, 0xffff, 1),
    ];
    assert_eq!(pci.apply(&last), Ok(()));
    let before = rig.result(0);
    rig.wait_result(0, |n| n != before);
    assert_eq!(rig.status(), RunState::Running);
    rig.quit();
}

#[test]
fn all_wires_and_windows_that_there_are() {
    let (rig, mut pci) = started(Program::default().count(0).again());
    let all: Vec<u16> = (0..MAX_VECTORS).collect();
    let bells: Vec<u16> = (0..MAX_BELLS).collect();
    for (vectors, bells) in all.chunks(64).zip(bells.chunks(64).chain(std::iter::repeat(&[][..]))) {
        pci.eventfds(vectors, bells);
        let to = Some(Msi { address: 0xfee0_0000, data: 0x41 });
        let vectors = vectors.iter().map(|vector| Change::Vector { vector: *vector, to });
        let at = |bell: u16| Some(u64::from(BAR) + u64::from(bell) * 4);
        let bells = bells.iter().map(|bell| Change::Bell { bell: *bell, at: at(*bell) });
        assert_eq!(pci.apply(&vectors.chain(bells).collect::<Vec<_>>()), Ok(()));
    }
    let windows: Vec<Change> = (0..MAX_WINDOWS).map(|n| pages(n, u64::from(n) * 2, 1)).collect();
    for windows in windows.chunks(MAX_CHANGES) {
        assert_eq!(pci.apply(windows), Ok(()));
    }
    let gone: Vec<Change> = (0..MAX_WINDOWS).map(|window| Change::Window { window, to: None }).collect();
    for gone in gone.chunks(MAX_CHANGES) {
        assert_eq!(pci.apply(gone), Ok(()));
    }
    assert_eq!(pci.apply(&[pages(0, 0, 0x10000)]), Ok(()));
    rig.quit();
}

#[test]
fn a_daemon_that_breaks_the_protocol_is_sent_away_and_the_next_one_comes() {
    let (mut rig, mut pci) = started(reading());
    let done = |pci: &Pci| pci.main.send(&ToCore::Done { id: 77 }).unwrap();
    let garbage = |pci: &Pci| {
        send(pci.main.as_raw_fd(), &[0xff; 9], MsgFlags::empty()).unwrap();
    };
    let out_of_order = |pci: &Pci| {
        let asked = pci.access(0);
        pci.reply(0, Asked { seq: asked.seq + 1, ..asked }, 0);
    };
    let descriptor = |pci: &Pci| {
        let ask = ToCore::Ask { id: 1, what: Ask::Apply(vec![]) };
        let fd = std::os::fd::AsFd::as_fd(&pci.ecam);
        pci.main.send_with(&ask, &[fd], MsgFlags::empty()).unwrap();
    };
    let no_descriptor = |pci: &Pci| {
        pci.main.send(&ToCore::Ask { id: 1, what: Ask::Apply(vec![pages(0, 0, 1)]) }).unwrap();
    };
    let breaches: [&dyn Fn(&Pci); 5] = [&done, &garbage, &out_of_order, &descriptor, &no_descriptor];
    for breach in breaches {
        breach(&pci);
        assert_eq!(pci.main.recv::<FromCore>().unwrap(), FromCore::Leave);
        assert!(matches!(pci.main.recv::<FromCore>(), Err(LinkError::Closed)));
        pci = Pci::connect(&rig);
        pci.obey(Command::Resume);
        pci.ready();
    }
    pci.serve(CONFIG.into(), 4, BusOp::Read, 5);
    rig.wait_result(4, |data| data == 5);
    assert_eq!(rig.status(), RunState::Running);
    rig.quit();
}

#[test]
fn an_access_outlives_the_daemon_and_waits_until_the_next_one_is_ready() {
    let (rig, pci) = started(reading());
    let asked = pci.access(0);
    drop(pci);
    let mut pci = Pci::connect(&rig);
    pci.obey(Command::Resume);
    setsockopt(&pci.links[0], sockopt::ReceiveTimeout, &TimeVal::milliseconds(300)).unwrap();
    let early = recv(pci.links[0].as_raw_fd(), &mut [0; 64], MsgFlags::empty());
    assert_eq!(early, Err(nix::errno::Errno::EAGAIN));
    pci.ready();
    assert_eq!(pci.access(0), asked, "the same number");
    pci.reply(0, asked, 0xabcd);
    rig.wait_result(4, |data| data == 0xabcd);
    rig.quit();
}

#[test]
fn pci_asks_while_it_is_told_to_pause_and_while_vcpus_wait_for_it() {
    let (mut rig, mut pci) = started(reading());
    let asked = pci.access(0);
    let stop = thread::spawn(move || {
        let stopped = rig.ask(Op::Stop);
        (rig, stopped)
    });
    thread::sleep(Duration::from_millis(200));
    // Core waits for the vCPU, the vCPU for pci, pci for core.
    let change = [pages(8, 8, 1)];
    assert_eq!(pci.apply(&change), Ok(()));
    assert!(!stop.is_finished());
    pci.reply(0, asked, 1);
    let (id, what) = pci.command();
    assert_eq!(what, Command::Pause);
    for _ in 0..100 {
        assert_eq!(pci.apply(&change), Ok(()));
    }
    assert!(!stop.is_finished());
    pci.done(id, what);
    let (mut rig, stopped) = stop.join().unwrap();
    assert_eq!(stopped, (Ok(Answer::Done), vec![(Event::Stop, RunState::Paused)]));
    // While nothing runs, too.
    assert_eq!(pci.apply(&change), Ok(()));
    let go = thread::spawn(move || (rig.ask(Op::Cont).0, rig));
    pci.obey(Command::Resume);
    let (answer, rig) = go.join().unwrap();
    assert_eq!(answer, Ok(Answer::Done));
    pci.serve(CONFIG.into(), 4, BusOp::Read, 2);
    rig.wait_result(4, |data| data == 2);
    rig.quit();
}

#[test]
fn a_reset_takes_nothing_away_that_pci_has_asked_for() {
    let (mut rig, mut pci) = started(Program::default().poke(BAR, 1).load(CONFIG, 4).count(0).halt());
    pci.serve(BAR.into(), 4, BusOp::Write(1), 0);
    let asked = pci.access(0);
    let bells = pci.eventfds(&[], &[0]);
    let wired = [
        Change::Bell { bell: 0, at: Some(BAR.into()) },
        pages(0, 0, 1),
        Change::Vector { vector: 5, to: Some(Msi { address: 0xfee0_0000, data: 0x41 }) },
    ];
    assert_eq!(pci.apply(&wired), Ok(()));
    pci.reply(0, asked, 0);
    rig.wait_result(0, |n| n == 1);
    let reset = thread::spawn(move || (rig.ask(Op::Reset).1, rig));
    pci.obey(Command::Pause);
    pci.obey(Command::Reset);
    pci.obey(Command::Resume);
    let (events, rig) = reset.join().unwrap();
    assert_eq!(events, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
    rig.wait_result(0, |n| n == 2);
    assert_eq!(count(&bells[0]), 1);
    rig.quit();
}

#[test]
fn the_next_daemon_learns_of_a_reset_and_a_pause_and_a_stop_waits_for_none() {
    let (mut rig, pci) = started(Program::default().count(0).halt());
    rig.wait_result(0, |n| n == 1);
    drop(pci);
    assert_eq!(rig.ask(Op::Stop).1, [(Event::Stop, RunState::Paused)]);
    assert_eq!(rig.ask(Op::Reset).1, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Prelaunch)]);
    assert_eq!(rig.ask(Op::Cont).1, [(Event::Resume, RunState::Running)]);
    let mut pci = Pci::connect(&rig);
    pci.obey(Command::Reset);
    pci.obey(Command::Pause);
    // A paused one asks as well.
    assert_eq!(pci.apply(&[Change::Vector { vector: 9, to: None }]), Ok(()));
    assert_eq!(rig.result(0), 1, "it waits for pci");
    pci.ready();
    pci.obey(Command::Resume);
    rig.wait_result(0, |n| n == 2);
    rig.quit();
}

#[test]
fn the_next_guest_is_not_loaded_while_a_back_end_may_touch_memory() {
    let (mut rig, mut pci) = started(Program::default().count(0).halt());
    for (round, (done, dies)) in [(true, false), (true, true), (false, true)].into_iter().enumerate() {
        let count = u32::try_from(round).unwrap() + 1;
        rig.wait_result(0, |n| n == count);
        let reset = thread::spawn(move || (rig.ask(Op::Reset).1, rig));
        pci.obey(Command::Pause);
        let (id, what) = pci.command();
        assert_eq!(what, Command::Reset);
        pci.main.send(&ToCore::NotReady).unwrap();
        if done {
            pci.done(id, what);
        }
        let kept = (!dies).then_some(pci);
        let (events, back) = reset.join().unwrap();
        rig = back;
        assert_eq!(events, [(Event::Reset(Cause::HostQmpSystemReset), RunState::Running)]);
        pci = kept.unwrap_or_else(|| {
            let mut next = Pci::connect(&rig);
            next.obey(Command::Reset);
            next.obey(Command::Pause);
            next
        });
        // The broker is answered, and nothing comes into memory.
        for _ in 0..3 {
            assert_eq!(rig.status(), RunState::Running);
            thread::sleep(Duration::from_millis(300));
        }
        assert_eq!((rig.loads.load(Ordering::SeqCst), rig.result(0)), (round + 1, count));
        pci.ready();
        pci.obey(Command::Resume);
    }
    rig.wait_result(0, |n| n == 4);
    // What is over is not done again.
    drop(pci);
    let mut pci = Pci::connect(&rig);
    pci.obey(Command::Resume);
    pci.ready();
    rig.quit();
}

#[test]
fn a_daemon_that_does_not_answer_is_given_up() {
    let (mut rig, pci) = started(reading());
    pci.access(0);
    assert_eq!(rig.event(), (Event::Stop, RunState::InternalError));
    rig.quit();
}

#[test]
fn an_absent_daemon_holds_up_no_end_and_a_stop_gives_it_up() {
    let (mut rig, pci) = started(reading());
    pci.access(0);
    drop(pci);
    thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.ask(Op::Stop).0, Ok(Answer::Done));
    assert_eq!(rig.status(), RunState::InternalError);
    rig.quit();
    let (rig, pci) = started(reading());
    pci.access(0);
    drop(pci);
    let began = std::time::Instant::now();
    rig.quit();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}
