//! What the broker may ask.

use bulkhead_control_api::core::{Op, Refusal, RunState};
use bulkhead_jail::topology::LINK_CONTROL_BROKER;

/// Whether the topology lets the broker ask `op` in `state`.
pub fn permitted(op: Op, state: RunState) -> Result<(), Refusal> {
    let permits = LINK_CONTROL_BROKER.permits(op.name(), state.name());
    permits.then_some(()).ok_or(Refusal::NotPermitted)
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
