//! A broker at its limit of descriptors. The limit is the process's, so this test has one of its own.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use bulkhead_framework::Result;
use bulkhead_qmp_tests::broker::{Broker, Kind};
use bulkhead_qmp_tests::wire::{LIMIT, Wire};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

const GETFD: &str = "{'execute': 'getfd', 'arguments': {'fdname': 'a'}}";

#[test]
fn truncated_descriptors_are_closed_and_the_request_is_answered() -> Result<()> {
    let broker = Broker::start(&[Kind::Server], false)?;
    let mut wire = Wire::connect(&broker.path(0))?;
    wire.negotiate(false)?;
    let (passed, mut end) = UnixStream::pair()?;
    end.set_read_timeout(Some(LIMIT))?;
    let null = File::open("/dev/null")?;
    // One waits; what comes after it is cut, and does not leave it in place.
    wire.send_fds(b" ", &[null.as_fd()])?;
    let io = std::io::Error::from;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(io)?;
    let open = std::fs::read_dir("/proc/self/fd")?.count();
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(open).unwrap_or(0) + 20, hard).map_err(io)?;
    for _ in 0..100 {
        let refused = wire.ask_with(GETFD, &[passed.as_fd(); 253])?;
        let desc = "No file descriptor supplied via SCM_RIGHTS";
        assert_eq!(refused.pointer("/error/desc"), Some(&json!(desc)));
    }
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io)?;
    drop(passed);
    assert_eq!(end.read(&mut [0; 1])?, 0, "closed");
    assert_eq!(wire.ask_with(GETFD, &[null.as_fd()])?, json!({"return": {}}));
    Ok(())
}
