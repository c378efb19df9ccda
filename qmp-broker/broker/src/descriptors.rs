//! Descriptors that clients passed: named ones of each monitor, and the fd sets of all.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};

use bulkhead_qapi::Error;
use bulkhead_qapi::types::misc::{
    AddFdArg, AddfdInfo, ClosefdArg, FdsetFdInfo, FdsetInfo, GetfdArg, RemoveFdArg,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::json;

use crate::commands::{Reply, reply};
use crate::held::Held;
use crate::index::{Index, IndexedMember, Member};

/// Descriptors that may be kept, over all names and sets. With one more for each client, 253 of a
/// message that is being received and the clients themselves, this process stays below its limit.
pub const MAX_KEPT: usize = 1024;
/// Names that a monitor may have.
pub const MAX_NAMES: usize = 256;
/// Descriptors that a set may have.
pub const MAX_MEMBERS: usize = 256;
/// Bytes that a name may have.
pub const MAX_NAME: usize = 1024;
/// Bytes that the `opaque` texts of all sets may have together: `query-fdsets` returns them all.
pub const MAX_OPAQUE: usize = 64 << 10;
/// The first number of a set's member. No number is given twice, and none is the process's own.
const FIRST_NUMBER: i64 = 3;

/// What a path begins with that stands for a member of a set.
const FDSET: &str = "/dev/fdset/";

/// What is to be done.
#[derive(Debug)]
pub enum Op {
    /// Names the descriptor that waits.
    Getfd(GetfdArg),
    /// Closes a named one.
    Closefd(ClosefdArg),
    /// Adds the descriptor that waits to a set.
    AddFd(AddFdArg),
    /// Closes one of a set, or all.
    RemoveFd(RemoveFdArg),
    /// Lists the sets.
    QueryFdsets,
}

impl Op {
    /// Whether it may change what is held.
    #[must_use]
    pub const fn changes(&self) -> bool {
        !matches!(self, Self::QueryFdsets)
    }
}

/// All of them. Dropping one closes it.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// By monitor, then by name.
    names: BTreeMap<String, BTreeMap<String, Held>>,
    /// By id; in a set the oldest first.
    sets: BTreeMap<i64, Vec<Member>>,
    /// Sets of which a character device uses a member. They stay, without members if clients remove those.
    used: BTreeSet<i64>,
    /// Members there have been.
    count: i64,
    /// The key of the next descriptor that is none of those that are held.
    next_key: u64,
    /// What the starter keeps, by key. What only this holds is leaving: until the starter has been told,
    /// whoever passes that file description again gets it under its key.
    kept: BTreeMap<u64, Held>,
}

impl Descriptors {
    /// Nothing but what the starter keeps from a former life, or has given back. Sets in `used` stay.
    #[must_use]
    pub fn new(kept: BTreeMap<u64, Held>, used: impl IntoIterator<Item = i64>) -> Self {
        let next_key = kept.keys().next_back().map_or(0, |key| key.saturating_add(1));
        Self { kept, next_key, used: used.into_iter().collect(), ..Self::default() }
    }

    /// The sets of a command line. `kept` is what the starter keeps from a former life.
    ///
    /// # Errors
    /// A limit is reached.
    pub fn of_command_line(
        members: impl IntoIterator<Item = (AddFdArg, OwnedFd)>,
        kept: BTreeMap<u64, Held>,
        used: impl IntoIterator<Item = i64>,
    ) -> Result<Self, Error> {
        let mut all = Self::new(kept, used);
        for (args, fd) in members {
            all.add(args, fd)?;
        }
        Ok(all)
    }

    /// Executes a command of a monitor's client. `take` gives the descriptor that waits.
    ///
    /// # Errors
    /// QEMU's, or a limit is reached. A descriptor that was taken is closed then.
    pub fn execute(&mut self, op: Op, monitor: &str, take: impl FnOnce() -> Option<OwnedFd>) -> Reply {
        let supplied = || take().ok_or_else(|| Error::generic("No file descriptor supplied via SCM_RIGHTS"));
        match op {
            Op::Getfd(args) => self.name(monitor, args.fdname, supplied()?),
            Op::Closefd(args) => self.close_name(monitor, &args.fdname),
            Op::AddFd(args) => self.add(args, supplied()?),
            Op::RemoveFd(args) => self.remove(&args),
            Op::QueryFdsets => reply(self.list()),
        }
    }

    /// Takes a named one of a monitor out.
    pub fn take_named(&mut self, monitor: &str, name: &str) -> Option<OwnedFd> {
        self.names.get_mut(monitor)?.remove(name)?.into_fd().ok()
    }

    /// A copy of the first member of a set that was opened to write only, if the path is one of a set.
    ///
    /// # Errors
    /// QEMU's: EINVAL for no set's name, ENOENT, and EACCES if no member was opened in that way.
    pub fn output(&self, path: &str) -> Option<Result<OwnedFd, Errno>> {
        let id = path.strip_prefix(FDSET)?.parse::<i32>().ok().filter(|id| *id >= 0);
        let Some(id) = id.map(i64::from) else { return Some(Err(Errno::EINVAL)) };
        let Some(members) = self.sets.get(&id) else { return Some(Err(Errno::ENOENT)) };
        let is_written = |fd: &Held| {
            // A descriptor with O_PATH has no mode.
            let mode = OFlag::O_ACCMODE | OFlag::O_PATH;
            fcntl(fd, FcntlArg::F_GETFL)
                .is_ok_and(|flags| OFlag::from_bits_retain(flags) & mode == OFlag::O_WRONLY)
        };
        let member = members.iter().find(|member| is_written(&member.fd));
        Some(member.map_or(Err(Errno::EACCES), |member| {
            member.fd.as_fd().try_clone_to_owned().map_err(|_| Errno::EMFILE)
        }))
    }

    /// Everything but the descriptors themselves.
    #[must_use]
    pub fn index(&self) -> Index {
        let names = self.names.iter().flat_map(|(monitor, names)| {
            names.iter().map(|(name, fd)| (monitor.clone(), name.clone(), fd.key()))
        });
        let member = |member: &Member| (member.number, member.opaque.clone(), member.fd.key());
        let sets = self.sets.iter().map(|(id, members)| (*id, members.iter().map(member).collect()));
        Index { names: names.collect(), sets: sets.collect(), count: self.count, next_key: self.next_key }
    }

    /// What clients have.
    fn held(&self) -> impl Iterator<Item = &Held> {
        let named = self.names.values().flat_map(BTreeMap::values);
        named.chain(self.sets.values().flatten().map(|member| &member.fd))
    }

    /// What the starter does not keep yet, by key.
    #[must_use]
    pub fn unkept(&self) -> BTreeMap<u64, Held> {
        let new = self.held().filter(|held| !self.kept.contains_key(&held.key()));
        new.map(|held| (held.key(), held.clone())).collect()
    }

    /// The starter keeps it.
    pub fn set_kept(&mut self, held: Held) {
        self.kept.insert(held.key(), held);
    }

    /// What the starter keeps and no client has, by key.
    #[must_use]
    pub fn leaving(&self) -> Vec<u64> {
        self.kept.iter().filter(|(_, held)| held.is_last()).map(|(key, _)| *key).collect()
    }

    /// Whether it still is.
    #[must_use]
    pub fn is_leaving(&self, key: u64) -> bool {
        self.kept.get(&key).is_some_and(Held::is_last)
    }

    /// The starter keeps it no longer.
    pub fn set_forgotten(&mut self, key: u64) {
        self.kept.remove(&key);
    }

    /// What an index says, of the descriptors that have come back; returns how many entries are dropped, because
    /// their descriptor has not, or they are more than clients may have. Sets in `used` stay.
    #[must_use]
    pub fn restored(
        index: Index,
        kept: BTreeMap<u64, Held>,
        used: impl IntoIterator<Item = i64>,
    ) -> (Self, usize) {
        let mut all = Self::new(kept, used);
        all.next_key = all.next_key.max(index.next_key);
        all.count = index.count;
        let members: usize = index.sets.iter().map(|(_, members)| members.len()).sum();
        let lost = index.names.len() + members;
        for (monitor, name, key) in index.names.into_iter().take(MAX_KEPT) {
            // What cannot be is counted below.
            let _ = all.restore_name(&monitor, name, key);
        }
        for id in index.sets.iter().map(|(id, _)| *id).filter(|id| all.used.contains(id)) {
            all.sets.entry(id).or_default();
        }
        let members =
            index.sets.into_iter().flat_map(|(id, members)| members.into_iter().map(move |m| (id, m)));
        for (id, member) in members.take(MAX_KEPT) {
            let _ = all.restore_member(id, member);
        }
        let lost = lost.saturating_sub(all.held().count());
        (all, lost)
    }

    fn restore_name(&mut self, monitor: &str, name: String, key: u64) -> Option<()> {
        let fd = self.kept.get(&key)?.clone();
        if monitor.len() > MAX_NAME || self.held().count() >= MAX_KEPT {
            return None;
        }
        self.check_name(monitor, &name).ok()?;
        self.names.entry(monitor.to_owned()).or_default().insert(name, fd);
        Some(())
    }

    fn restore_member(&mut self, id: i64, (number, opaque, key): IndexedMember) -> Option<()> {
        let fd = self.kept.get(&key)?.clone();
        let given = FIRST_NUMBER..FIRST_NUMBER.saturating_add(self.count);
        if !given.contains(&number) || self.held().count() >= MAX_KEPT {
            return None;
        }
        self.check_member(id, opaque.as_deref()).ok()?;
        self.sets.entry(id).or_default().push(Member { number, opaque, fd });
        Some(())
    }

    /// Shares what is held already of that file description.
    fn hold(&mut self, fd: OwnedFd) -> Held {
        let leaving = self.kept.values().filter(|held| held.is_last());
        if let Some(same) = self.held().chain(leaving).find(|held| held.is_same(&fd)) {
            return same.clone();
        }
        let key = self.next_key;
        self.next_key = self.next_key.saturating_add(1);
        Held::new(key, fd)
    }

    /// Closes the members of all sets that no character device uses.
    pub fn clear_sets(&mut self) {
        self.sets.retain(|id, _| self.used.contains(id));
    }

    /// How many there are, with those that the starter is still to be told of.
    fn count(&self) -> usize {
        self.held().count() + self.kept.values().filter(|held| held.is_last()).count()
    }

    fn check_room(&self) -> Result<(), Error> {
        if self.count() < MAX_KEPT {
            return Ok(());
        }
        Err(Error::generic(format!("Too many file descriptors: {MAX_KEPT} are kept")))
    }

    fn name(&mut self, monitor: &str, name: String, fd: OwnedFd) -> Reply {
        self.check_name(monitor, &name)?;
        let fd = self.hold(fd);
        if !self.names.get(monitor).is_some_and(|names| names.contains_key(&name)) {
            self.check_room()?;
        }
        self.names.entry(monitor.to_owned()).or_default().insert(name, fd);
        Ok(json!({}))
    }

    /// Whether a monitor may have this name.
    fn check_name(&self, monitor: &str, name: &str) -> Result<(), Error> {
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(Error::generic("Parameter 'fdname' expects a name not starting with a digit"));
        }
        if name.len() > MAX_NAME {
            return Err(Error::generic(format!("Parameter 'fdname' expects at most {MAX_NAME} bytes")));
        }
        let is_full = |names: &BTreeMap<_, _>| !names.contains_key(name) && names.len() >= MAX_NAMES;
        if self.names.get(monitor).is_some_and(is_full) {
            return Err(Error::generic(format!(
                "Too many file descriptors: the monitor has {MAX_NAMES} names"
            )));
        }
        Ok(())
    }

    fn close_name(&mut self, monitor: &str, name: &str) -> Reply {
        match self.names.get_mut(monitor).and_then(|names| names.remove(name)) {
            Some(_) => Ok(json!({})),
            None => Err(not_found(name)),
        }
    }

    fn add(&mut self, args: AddFdArg, fd: OwnedFd) -> Reply {
        let id = args.fdset_id.unwrap_or_else(|| self.lowest_free_id());
        self.check_room()?;
        self.check_member(id, args.opaque.as_deref())?;
        let fd = self.hold(fd);
        let number = FIRST_NUMBER.saturating_add(self.count);
        self.count = self.count.saturating_add(1);
        self.sets.entry(id).or_default().push(Member { number, opaque: args.opaque, fd });
        reply(AddfdInfo { fdset_id: id, fd: number })
    }

    /// Whether a set may have one more member.
    fn check_member(&self, id: i64, opaque: Option<&str>) -> Result<(), Error> {
        if id < 0 {
            return Err(Error::generic("Parameter 'fdset-id' expects a non-negative value"));
        }
        if self.sets.get(&id).is_some_and(|members| members.len() >= MAX_MEMBERS) {
            return Err(Error::generic(format!("Too many file descriptors: fdset {id} has {MAX_MEMBERS}")));
        }
        let held: usize = self.sets.values().flatten().map(opaque_len).sum();
        if held + opaque.map_or(0, str::len) > MAX_OPAQUE {
            return Err(Error::generic(format!(
                "Parameter 'opaque' expects at most {MAX_OPAQUE} bytes over all fdsets"
            )));
        }
        Ok(())
    }

    fn lowest_free_id(&self) -> i64 {
        let taken = (0..).zip(self.sets.keys()).take_while(|(expected, id)| expected == *id);
        taken.last().map_or(0, |(last, _)| last + 1)
    }

    fn remove(&mut self, args: &RemoveFdArg) -> Reply {
        let id = args.fdset_id;
        let unknown = || match args.fd {
            Some(number) => not_found(&format!("fdset-id:{id}, fd:{number}")),
            None => not_found(&format!("fdset-id:{id}")),
        };
        let members = self.sets.get_mut(&id).ok_or_else(unknown)?;
        if let Some(number) = args.fd {
            let index = members.iter().position(|member| member.number == number).ok_or_else(unknown)?;
            members.remove(index);
        } else {
            members.clear();
        }
        if members.is_empty() && !self.used.contains(&id) {
            self.sets.remove(&id);
        }
        Ok(json!({}))
    }

    fn list(&self) -> Vec<FdsetInfo> {
        let member = |member: &Member| FdsetFdInfo { fd: member.number, opaque: member.opaque.clone() };
        let set = |(id, members): (&i64, &Vec<Member>)| FdsetInfo {
            fdset_id: *id,
            fds: members.iter().map(member).collect(),
        };
        self.sets.iter().rev().map(set).collect()
    }
}

fn opaque_len(member: &Member) -> usize {
    member.opaque.as_ref().map_or(0, String::len)
}

fn not_found(name: &str) -> Error {
    Error::generic(format!("File descriptor named '{name}' not found"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use serde_json::Value;

    use super::*;

    fn null() -> Option<OwnedFd> {
        Some(File::open("/dev/null").unwrap().into())
    }

    /// The value or the error's text.
    fn run(all: &mut Descriptors, op: Op) -> Value {
        run_with(all, op, null())
    }

    fn run_with(all: &mut Descriptors, op: Op, fd: Option<OwnedFd>) -> Value {
        all.execute(op, "m", || fd).unwrap_or_else(|error| error.desc.into())
    }

    fn getfd(name: &str) -> Op {
        Op::Getfd(GetfdArg { fdname: name.to_owned() })
    }

    fn add(id: Option<i64>, opaque: Option<String>) -> Op {
        Op::AddFd(AddFdArg { fdset_id: id, opaque })
    }

    fn remove(id: i64, fd: Option<i64>) -> Op {
        Op::RemoveFd(RemoveFdArg { fdset_id: id, fd })
    }

    #[test]
    fn a_name_is_replaced_and_belongs_to_its_monitor() {
        let mut all = Descriptors::default();
        let (one, mut one_end) = UnixStream::pair().unwrap();
        assert_eq!(run_with(&mut all, getfd("a"), Some(one.into())), json!({}));
        assert_eq!(run(&mut all, getfd("a")), json!({}));
        assert_eq!(one_end.read(&mut [0; 1]).unwrap(), 0, "closed");
        let close = || Op::Closefd(ClosefdArg { fdname: "a".to_owned() });
        let other = all.execute(close(), "other", || None).unwrap_err();
        assert_eq!(other.desc, "File descriptor named 'a' not found");
        assert_eq!(run(&mut all, close()), json!({}));
        assert_eq!(all.count(), 0);
    }

    #[test]
    fn sets_fill_the_lowest_gap_and_numbers_are_never_given_again() {
        let mut all = Descriptors::default();
        for (id, expected) in [(None, 0), (Some(2), 2), (None, 1), (None, 3), (Some(i64::MAX), i64::MAX)] {
            assert_eq!(run(&mut all, add(id, None))["fdset-id"], expected);
        }
        assert_eq!(run(&mut all, remove(1, None)), json!({}));
        assert_eq!(run(&mut all, add(None, None)), json!({"fdset-id": 1, "fd": 8}));
        assert_eq!(run(&mut all, remove(1, Some(5))), "File descriptor named 'fdset-id:1, fd:5' not found");
        assert_eq!(run(&mut all, remove(1, Some(8))), json!({}));
        assert_eq!(run(&mut all, remove(1, None)), "File descriptor named 'fdset-id:1' not found");
        all.clear_sets();
        assert_eq!(run(&mut all, Op::QueryFdsets), json!([]));
    }

    #[test]
    fn an_index_brings_everything_back() {
        let mut all = Descriptors::default();
        let (one, mut end) = UnixStream::pair().unwrap();
        let again = one.try_clone().unwrap();
        run_with(&mut all, getfd("a"), Some(one.into()));
        run(&mut all, add(Some(7), Some("x".to_owned())));
        run_with(&mut all, add(Some(7), None), Some(again.into()));
        run(&mut all, add(None, None));
        run(&mut all, remove(0, None));
        let (index, held) = (all.index(), all.unkept());
        assert_eq!(held.len(), 2, "one description, two uses");
        let listed = run(&mut all, Op::QueryFdsets);
        drop(all);
        let (mut all, missing) = Descriptors::restored(index.clone(), held, []);
        assert!(all.unkept().is_empty());
        assert_eq!((missing, all.index()), (0, index.clone()));
        assert_eq!(run(&mut all, Op::QueryFdsets), listed);
        assert_eq!(run(&mut all, add(Some(7), None))["fd"], 6, "no number is given again");
        end.set_nonblocking(true).unwrap();
        assert!(end.read(&mut [0; 1]).is_err(), "still open");
        assert_eq!(run(&mut all, remove(7, None)), json!({}));
        assert!(end.read(&mut [0; 1]).is_err(), "the name has it");
        assert!(all.take_named("m", "a").is_some());
        for key in all.leaving() {
            all.set_forgotten(key);
        }
        assert_eq!(end.read(&mut [0; 1]).unwrap(), 0);

        let (mut all, missing) = Descriptors::restored(index, BTreeMap::new(), []);
        assert_eq!((missing, run(&mut all, Op::QueryFdsets)), (3, json!([])));
    }

    /// systemd keeps a file description once: under another key it would be forgotten with the first one.
    #[test]
    fn what_leaves_comes_back_under_its_key() {
        let mut all = Descriptors::default();
        let (one, mut end) = UnixStream::pair().unwrap();
        let again = one.try_clone().unwrap();
        run_with(&mut all, getfd("a"), Some(one.into()));
        all.unkept().into_values().for_each(|held| all.set_kept(held));
        run(&mut all, Op::Closefd(ClosefdArg { fdname: "a".to_owned() }));
        assert_eq!(all.leaving(), [0]);
        run_with(&mut all, getfd("b"), Some(again.into()));
        assert_eq!((all.leaving(), all.unkept().len()), (vec![], 0));
        run(&mut all, Op::Closefd(ClosefdArg { fdname: "b".to_owned() }));
        assert!(all.is_leaving(0));
        all.set_forgotten(0);
        assert_eq!(end.read(&mut [0; 1]).unwrap(), 0, "closed");
    }

    /// What the starter is still to be told to forget counts: it is held, too.
    #[test]
    fn what_leaves_takes_room() {
        let mut all = Descriptors::default();
        for _ in 0..MAX_KEPT {
            run(&mut all, add(None, None));
        }
        all.unkept().into_values().for_each(|held| all.set_kept(held));
        all.clear_sets();
        assert_eq!(run(&mut all, add(None, None)), "Too many file descriptors: 1024 are kept");
        all.set_forgotten(7);
        assert!(run(&mut all, add(None, None)).is_object());
    }

    #[test]
    fn an_index_restores_no_more_than_clients_may_have() {
        let held = |key| (key, Held::new(key, null().unwrap()));
        let kept = || (0..2000).map(held).collect::<BTreeMap<_, _>>();
        let name = |monitor: &str, number: u64| (monitor.to_owned(), format!("n{number}"), number);
        let names = (0..300).map(|number| name("m", number)).collect();
        let (all, lost) = Descriptors::restored(Index { names, ..Index::default() }, kept(), []);
        assert_eq!((all.held().count(), lost), (MAX_NAMES, 300 - MAX_NAMES));
        let names = (0..2000).map(|number| name(&format!("m{}", number / 100), number)).collect();
        let (all, lost) = Descriptors::restored(Index { names, ..Index::default() }, kept(), []);
        assert_eq!((all.held().count(), lost), (MAX_KEPT, 2000 - MAX_KEPT));
        let long = ("m".to_owned(), "x".repeat(MAX_NAME + 1), 0);
        let digit = ("m".to_owned(), "7".to_owned(), 0);
        let members = (0..400).map(|number| (number + FIRST_NUMBER, None, 0)).collect();
        let opaque = Some("x".repeat(MAX_OPAQUE + 1));
        let sets = vec![
            (0, members),
            (1, vec![(3, opaque, 0)]),
            (-1, vec![(3, None, 0)]),
            (2, vec![(500, None, 0)]),
        ];
        let index = Index { names: vec![long, digit], sets, count: 400, next_key: 0 };
        let (all, lost) = Descriptors::restored(index, kept(), []);
        assert_eq!((all.held().count(), lost), (MAX_MEMBERS, 400 - MAX_MEMBERS + 5));
        assert_eq!(all.index().next_key, 2000);
    }

    #[test]
    fn names_are_limited() {
        let mut all = Descriptors::default();
        for number in 0..MAX_NAMES {
            assert_eq!(run(&mut all, getfd(&format!("n{number}"))), json!({}));
        }
        assert_eq!(run(&mut all, getfd("more")), "Too many file descriptors: the monitor has 256 names");
        assert_eq!(run(&mut all, getfd("n7")), json!({}), "replaced");
        assert!(all.execute(getfd("more"), "other", null).is_ok());
        let long = run(&mut all, getfd(&"x".repeat(MAX_NAME + 1)));
        assert_eq!(long, "Parameter 'fdname' expects at most 1024 bytes");
    }

    /// What is in use is QEMU's list of duplicates: it keeps a set.
    #[test]
    fn a_set_that_is_in_use_stays() {
        let member = |set| {
            let args = AddFdArg { fdset_id: Some(set), opaque: Some("x".to_owned()) };
            (args, File::open("/dev/null").unwrap().into())
        };
        let mut all =
            Descriptors::of_command_line([member(1), member(1), member(2)], BTreeMap::new(), [1]).unwrap();
        assert_eq!(run(&mut all, add(None, None))["fdset-id"], 0);
        assert_eq!(run(&mut all, remove(1, None)), json!({}));
        assert_eq!(run(&mut all, remove(1, None)), json!({}), "without members");
        let listed = run(&mut all, Op::QueryFdsets);
        assert_eq!(listed[1], json!({"fdset-id": 1, "fds": []}));
        assert_eq!(listed[0]["fds"][0]["opaque"], "x");
        assert_eq!(run(&mut all, add(Some(1), None))["fdset-id"], 1);
        all.clear_sets();
        let listed = run(&mut all, Op::QueryFdsets);
        assert_eq!((listed.as_array().unwrap().len(), &listed[0]["fdset-id"]), (1, &json!(1)));
        assert_eq!(listed[0]["fds"].as_array().unwrap().len(), 1);
        assert_eq!(run(&mut all, add(None, None))["fdset-id"], 0);
        let many = (0..=MAX_MEMBERS).map(|_| member(1));
        assert!(Descriptors::of_command_line(many, BTreeMap::new(), []).is_err());
    }

    #[test]
    fn sets_are_limited() {
        let mut all = Descriptors::default();
        for _ in 0..MAX_MEMBERS {
            assert_eq!(run(&mut all, add(Some(0), None))["fdset-id"], 0);
        }
        assert_eq!(run(&mut all, add(Some(0), None)), "Too many file descriptors: fdset 0 has 256");
        for _ in MAX_MEMBERS..MAX_KEPT {
            assert!(run(&mut all, add(None, None)).is_object());
        }
        let full = "Too many file descriptors: 1024 are kept";
        assert_eq!(run(&mut all, add(None, None)), full);
        assert_eq!(run(&mut all, getfd("a")), full);
        assert_eq!(run(&mut all, remove(0, None)), json!({}));
        assert_eq!(run(&mut all, getfd("a")), json!({}));
    }

    #[test]
    fn opaque_texts_are_limited_together() {
        let mut all = Descriptors::default();
        assert!(run(&mut all, add(None, Some("x".repeat(MAX_OPAQUE - 1)))).is_object());
        let long = "Parameter 'opaque' expects at most 65536 bytes over all fdsets";
        assert_eq!(run(&mut all, add(None, Some("xx".to_owned()))), long);
        assert!(run(&mut all, add(None, Some("x".to_owned()))).is_object());
    }
}
