//! The link to the broker and the opener's, which brings another one when the broker was started anew.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use bulkhead_control_api::VERSION;
use bulkhead_control_api::balloon::{FromBalloon, Op, Request};
use bulkhead_control_api::opener::FromOpener;
use bulkhead_jail::link::{Link, LinkError};
use bulkhead_jail::topology::LINK_CONTROL_BALLOON;
use bulkhead_jail::{info, warn};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::MsgFlags;

/// Answers that the broker has not read: it asks for one thing at a time.
const MAX_WAITING: usize = 16;
/// What the event loop calls the broker's link.
pub const BROKER: u64 = 1;
/// What it calls the opener's.
pub const OPENER: u64 = 2;

#[derive(Debug)]
enum Peer {
    Gone,
    /// Its hello is still to come.
    Greeting(Link),
    Up(Link),
}

/// The broker, which may come and go.
#[derive(Debug)]
pub struct Broker {
    peer: Peer,
    opener: Option<Link>,
    /// What it has no room for now: answers, and the last change. The guest makes changes faster than it reads.
    waiting: VecDeque<FromBalloon>,
    /// The event loop waits for room.
    full: bool,
}

fn permitted(op: &Op) -> bool {
    let name = match op {
        Op::Target { .. } => "target",
        Op::Query => "query",
        Op::Stats => "stats",
        Op::PollingInterval { .. } => "polling-interval",
    };
    // This process does not know the run state, and no request depends on it.
    LINK_CONTROL_BALLOON.permits(name, "running")
}

impl Broker {
    /// Begins the link; `epoll` is told of both.
    ///
    /// # Errors
    /// The event loop's.
    pub fn new(epoll: &Epoll, broker: OwnedFd, opener: Option<Link>) -> Result<Self, Errno> {
        if let Some(link) = &opener {
            epoll.add(link, EpollEvent::new(EpollFlags::EPOLLIN, OPENER))?;
        }
        let mut this = Self { peer: Peer::Gone, opener, waiting: VecDeque::new(), full: false };
        this.greet(epoll, broker);
        Ok(this)
    }

    fn greet(&mut self, epoll: &Epoll, fd: OwnedFd) {
        self.forget(epoll);
        let begun = Link::begin(fd, VERSION).and_then(|link| {
            epoll.add(&link, EpollEvent::new(EpollFlags::EPOLLIN, BROKER))?;
            Ok(link)
        });
        match begun {
            Ok(link) => self.peer = Peer::Greeting(link),
            Err(error) => lost(&error),
        }
    }

    fn forget(&mut self, epoll: &Epoll) {
        if let Peer::Greeting(link) | Peer::Up(link) = std::mem::replace(&mut self.peer, Peer::Gone) {
            let _ = epoll.delete(&link);
        }
        self.waiting.clear();
        self.full = false;
    }

    /// The opener has something.
    pub fn on_opener(&mut self, epoll: &Epoll) {
        let Some(link) = &mut self.opener else { return };
        match link.recv_with::<FromOpener>(MsgFlags::MSG_DONTWAIT) {
            Err(LinkError::WouldBlock) => {}
            Ok((FromOpener::Given { name }, fds)) if name == "broker" => {
                if let Some(fd) = fds.into_iter().next() {
                    self.greet(epoll, fd);
                }
            }
            Ok(_) => warn!("opener: a message that is not for this process"),
            Err(error) => {
                warn!("opener: {error}; a broker that is started anew will not be found");
                let _ = epoll.delete(link);
                self.opener = None;
            }
        }
    }

    /// The broker's link has something: a request, perhaps.
    pub fn receive(&mut self, epoll: &Epoll) -> Option<Request> {
        self.flush(epoll);
        let result = match &mut self.peer {
            Peer::Greeting(link) => link.finish(VERSION, MsgFlags::MSG_DONTWAIT).map(|()| None),
            Peer::Up(link) => link.recv_with::<Request>(MsgFlags::MSG_DONTWAIT).map(Some),
            Peer::Gone => return None,
        };
        match result {
            Ok(None) => {
                self.peer = match std::mem::replace(&mut self.peer, Peer::Gone) {
                    Peer::Greeting(link) => Peer::Up(link),
                    other => other,
                };
                return None;
            }
            Ok(Some((request, fds))) if fds.is_empty() && permitted(&request.op) => return Some(request),
            Ok(Some(_)) => lost(&LinkError::Malformed),
            Err(LinkError::WouldBlock) => return None,
            Err(error) => lost(&error),
        }
        self.forget(epoll);
        None
    }

    /// Tells the broker, if it is there. Of changes that it has not read the last one counts.
    pub fn tell(&mut self, epoll: &Epoll, message: FromBalloon) {
        if !matches!(self.peer, Peer::Up(_)) {
            return;
        }
        if matches!(message, FromBalloon::Changed { .. }) {
            self.waiting.retain(|other| !matches!(other, FromBalloon::Changed { .. }));
        }
        self.waiting.push_back(message);
        if self.waiting.len() > MAX_WAITING {
            // It asks and does not read.
            lost(&LinkError::Malformed);
            return self.forget(epoll);
        }
        self.flush(epoll);
    }

    /// Sends what waits, as far as there is room; the event loop waits for more.
    fn flush(&mut self, epoll: &Epoll) {
        let Peer::Up(link) = &self.peer else { return };
        let mut sent = Ok(());
        while let Some(message) = self.waiting.front() {
            sent = link.send_with(message, &[], MsgFlags::MSG_DONTWAIT);
            if sent.is_err() {
                break;
            }
            self.waiting.pop_front();
        }
        let full = matches!(sent, Err(LinkError::WouldBlock));
        let mut result = if full { Ok(()) } else { sent };
        if result.is_ok() && full != self.full {
            let what = if full { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            let changed = epoll.delete(link).and_then(|()| epoll.add(link, EpollEvent::new(what, BROKER)));
            result = changed.map_err(LinkError::from);
            self.full = full;
        }
        if let Err(error) = result {
            lost(&error);
            self.forget(epoll);
        }
    }
}

fn lost(error: &LinkError) {
    match error {
        LinkError::Closed => info!("the broker is gone; the balloon goes on without it"),
        error => warn!("link to the broker: {error}; the balloon goes on without it"),
    }
}
