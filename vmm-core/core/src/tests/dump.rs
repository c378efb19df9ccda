//! A dump process: guest memory, and where pages are.

use bulkhead_control_api::VERSION;
use bulkhead_control_api::core::{Answer, Op};
use bulkhead_control_api::dump::{MAX_PAGES, Memory, PAGE, Translate, Translated};
use bulkhead_jail::link::Link;
use nix::sys::socket::MsgFlags;

use super::program::Program;
use super::rig::{Rig, config, connect_to, load, plain_console};

fn connect(rig: &Rig) -> Link {
    let mut link = Link::connect(connect_to(&rig.dump), VERSION).unwrap();
    let (memory, fds) = link.recv_with::<Memory>(MsgFlags::empty()).unwrap();
    assert_eq!((memory.regions.len(), fds.len()), (1, 1));
    assert_eq!((memory.regions[0].gpa, memory.regions[0].len), (0, 16 << 20));
    link
}

/// Asks for pages in flat mode, where each is at its own address.
fn expect_pages(link: &mut Link, cpu: u32, addr: u64, pages: u32, found: u32) {
    let what = Translate { cpu, addr, pages };
    link.send(&what).unwrap();
    let pages = (0..found).map(|page| addr.wrapping_add(u64::from(page) * PAGE)).collect();
    assert_eq!(link.recv::<Translated>().unwrap(), Translated { what, pages });
}

#[test]
fn pages_are_looked_up_whether_the_vcpu_runs_or_not() {
    let mut rig = Rig::bare(config(2), true, load(Program::default().count(0).halt()));
    rig.connect_console(plain_console());
    rig.connect_broker();
    let mut link = connect(&rig);
    // Not started; the second one waits for its start until the end.
    expect_pages(&mut link, 0, 0x1000, 3, 3);
    assert_eq!(rig.ask(Op::Start).0, Ok(Answer::Done));
    rig.wait_result(0, |count| count == 1);
    for _ in 0..100 {
        expect_pages(&mut link, 0, 0x7000, 1, 1);
        expect_pages(&mut link, 1, 0u64.wrapping_sub(PAGE), 2, 2);
    }
    expect_pages(&mut link, 1, 0, u32::MAX, MAX_PAGES);
    expect_pages(&mut link, 2, 0, 1, 0);
    expect_pages(&mut link, u32::MAX, 0, 1, 0);
    for _ in 0..20 {
        assert_eq!(rig.ask(Op::Stop).0, Ok(Answer::Done));
        expect_pages(&mut link, 0, 0, 1, 1);
        // Asked while it comes in, or goes out.
        assert_eq!(rig.ask(Op::Cont).0, Ok(Answer::Done));
        expect_pages(&mut link, 0, 0x3000, 1, 1);
    }
    rig.quit();
}

#[test]
fn what_a_gone_process_asked_is_not_answered_to_the_next() {
    let rig = Rig::started(config(1), Program::default().count(0).halt(), plain_console());
    for round in 0..20u64 {
        let link = connect(&rig);
        link.send(&Translate { cpu: 0, addr: 0, pages: MAX_PAGES }).unwrap();
        drop(link);
        let mut link = connect(&rig);
        let what = Translate { cpu: 0, addr: round * PAGE, pages: 1 };
        link.send(&what).unwrap();
        // One that comes late says what it is for.
        while link.recv::<Translated>().unwrap().what != what {}
    }
    // One that says nonsense loses its link and nothing else happens.
    let mut link = connect(&rig);
    link.send(&u64::MAX).unwrap();
    assert!(link.recv::<Translated>().is_err());
    drop(connect(&rig));
    assert_eq!(rig.result(0), 1);
    rig.quit();
}
