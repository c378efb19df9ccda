//! Descriptors that do not fit. Alone in its process: it lowers the limit of descriptors.

use std::os::fd::AsFd;

use bulkhead_jail::link::{LinkError, MAX_FDS, recv_packet, send_packet};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

#[test]
fn descriptors_that_do_not_fit_are_closed() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let flags = SockFlag::SOCK_CLOEXEC;
    let (sender, receiver) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let many = vec![sender.as_fd(); MAX_FDS];
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    for limited in [false, true] {
        send_packet(sender.as_fd(), &[0; 64], &many, MsgFlags::empty()).unwrap();
        let limit = if limited { count() + 20 } else { hard };
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
        let (before, mut short) = (count(), [0; 8]);
        let received = recv_packet(receiver.as_fd(), &mut short, MsgFlags::empty());
        assert!(matches!(received, Err(LinkError::Malformed)));
        assert_eq!(count(), before);
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    }
}
