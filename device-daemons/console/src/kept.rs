//! Descriptors that the starter keeps beyond the process's death, under numbers.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bulkhead_control_api::config::Chardev as Config;
pub use bulkhead_jail::keeper::Keeper;
use bulkhead_jail::keeper::name;
use bulkhead_jail::start::{Start, StartError};
use bulkhead_jail::starter::Starter;
use bulkhead_jail::warn;

use crate::chardev::{Chardev, Inherited, needs_pair};
use crate::state::{Names, State};

/// Keeps a descriptor under a new number, if the starter can at once.
fn keep(starter: &Starter, state: &mut State, fd: impl AsFd) -> Option<u32> {
    let number = state.next_name();
    match starter.keep(&name(number), fd.as_fd()) {
        Ok(()) => Some(number),
        Err(error) => {
            warn!("a connection is not kept and will be lost if this process dies: {error}");
            None
        }
    }
}

/// Takes what a predecessor has left of a character device out of what has come back.
fn inherit(kept: &mut BTreeMap<String, OwnedFd>, names: Names, restarted: bool) -> Inherited {
    let mut take = |number: Option<u32>| {
        let fd = kept.remove(&name(number?));
        if fd.is_none() {
            warn!("a descriptor that was kept has not come back; its client is lost");
        }
        fd
    };
    Inherited { restarted, peer: take(names.peer), far: take(names.far) }
}

/// Puts a new pair in the place of a pump's of which not both ends have come back.
fn replace_pair(
    starter: &Starter,
    state: &mut State,
    index: usize,
    inherited: &mut Inherited,
) -> std::io::Result<()> {
    let former = state.names(index);
    let (near, far) = UnixStream::pair()?;
    let names = Names { peer: keep(starter, state, &near), far: keep(starter, state, &far) };
    state.set_names(index, names);
    // The end that has come back is of no use without the other one.
    for number in [former.peer, former.far].into_iter().flatten() {
        let _ = starter.forget(&name(number));
    }
    (inherited.peer, inherited.far) = (Some(near.into()), Some(far.into()));
    Ok(())
}

/// Opens the character devices, with what a predecessor has left of them.
///
/// # Errors
/// As [`Chardev::new`].
pub fn open<E: From<StartError> + From<std::io::Error>>(
    start: &mut Start,
    configs: &[Config],
    state: &mut State,
    restarted: bool,
) -> Result<Vec<Chardev>, E> {
    let mut kept = start.kept();
    if !restarted {
        // What they were for is not known any more, and their numbers begin anew.
        for (name, _) in std::mem::take(&mut kept) {
            let _ = start.starter().forget(&name);
        }
    }
    let mut chardevs = Vec::new();
    for (index, config) in configs.iter().enumerate() {
        let mut inherited = inherit(&mut kept, state.names(index), restarted);
        if needs_pair(config) && (inherited.peer.is_none() || inherited.far.is_none()) {
            replace_pair(start.starter(), state, index, &mut inherited)?;
        }
        let chardev = Chardev::new(config, inherited, |name| start.take(name).map_err(E::from))?;
        if let (Some(peer), None) = (chardev.peer(), state.names(index).peer) {
            let peer = keep(start.starter(), state, peer);
            state.set_names(index, Names { peer, far: None });
        }
        chardevs.push(chardev);
    }
    for name in kept.keys() {
        // Kept by a predecessor that died before it noted what for.
        let _ = start.starter().forget(name);
    }
    Ok(chardevs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn the_end_of_a_pair_that_came_back_alone_is_forgotten() {
        let (starter, words) = UnixDatagram::pair().unwrap();
        let starter = Starter::new(Some(starter.into()));
        let fd = memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap();
        let (mut state, _) = State::open(fd, 1, 1, true).unwrap();
        let names = Names { peer: Some(state.next_name()), far: Some(state.next_name()) };
        state.set_names(0, names);
        let mut kept = BTreeMap::from([("kept.1".to_owned(), UnixStream::pair().unwrap().0.into())]);
        let mut inherited = inherit(&mut kept, names, true);
        assert!(inherited.peer.is_none() && inherited.far.is_some());
        replace_pair(&starter, &mut state, 0, &mut inherited).unwrap();
        assert!(inherited.peer.is_some() && inherited.far.is_some());
        assert_eq!(state.names(0), Names { peer: Some(2), far: Some(3) });
        drop(starter);
        words.set_nonblocking(true).unwrap();
        let mut heard = Vec::new();
        let mut word = [0; 64];
        while let Ok(len @ 1..) = words.recv(&mut word) {
            heard.push(String::from_utf8_lossy(word.get(..len).unwrap()).into_owned());
        }
        let forgotten = [0, 1].map(|number| format!("FDSTOREREMOVE=1\nFDNAME=kept.{number}"));
        assert_eq!(heard.get(2..), Some(&forgotten[..]), "{heard:?}");
    }
}
