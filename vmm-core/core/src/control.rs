//! The broker's link: requests, checked against the topology, and events.

use bulkhead_control_api::core::{Event, FromCore, Op, Refusal, Request, RunState};
use bulkhead_jail::door::{Arrival, Door};
use bulkhead_jail::link::LinkError;
use bulkhead_jail::topology::LINK_CONTROL_BROKER;
use bulkhead_jail::warn;
use nix::sys::socket::MsgFlags;

/// Whether the topology lets the broker ask `op` in `state`.
pub fn permitted(op: Op, state: RunState) -> Result<(), Refusal> {
    let permits = LINK_CONTROL_BROKER.permits(op.name(), state.name());
    permits.then_some(()).ok_or(Refusal::NotPermitted)
}

/// The broker, if it is there; the machine does not depend on it.
#[derive(Debug)]
pub struct Broker {
    /// Where it connects.
    pub door: Door,
}

impl Broker {
    /// The next request, once the door is readable.
    pub fn advance(&mut self) -> Option<Request> {
        if self.door.advance() != Arrival::Message {
            return None;
        }
        match self.door.link()?.recv::<Request>() {
            Ok(request) => return Some(request),
            Err(LinkError::WouldBlock) => {}
            Err(LinkError::Closed) => self.door.close(),
            Err(error) => {
                warn!("control-broker: {error}; the link is closed");
                self.door.close();
            }
        }
        None
    }

    /// Sends without waiting: a broker that does not read loses its link, not the machine its time.
    pub fn send(&mut self, message: &FromCore) {
        let Some(link) = self.door.link() else { return };
        match link.send_with(message, &[], MsgFlags::MSG_DONTWAIT) {
            Ok(()) => return,
            Err(LinkError::WouldBlock) => warn!("control-broker: it does not read; the link is closed"),
            Err(LinkError::Closed) => {}
            Err(error) => warn!("control-broker: {error}; the link is closed"),
        }
        self.door.close();
    }

    /// Tells what happened.
    pub fn tell(&mut self, event: Event, state: RunState) {
        self.send(&FromCore::Event { event, state });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topology_names_every_request() {
        let ops = [
            Op::Status,
            Op::Start,
            Op::Stop,
            Op::Cont,
            Op::Reset,
            Op::Quit,
            Op::InjectNmi,
            Op::Cpus,
            Op::Counters,
            Op::LogDirty(true),
        ];
        for op in ops {
            assert_eq!(permitted(op, RunState::Running), Ok(()), "{op:?}");
        }
        assert_eq!(LINK_CONTROL_BROKER.requests.len(), ops.len());
    }
}
