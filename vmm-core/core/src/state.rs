//! The run-state machine of QEMU 5.1 (`softmmu/vl.c`): which request leads where, with which events.
//!
//! Pure: each request appends the effects that the machine carries out, in order.

use bulkhead_control_api::core::{Cause, Event, Refusal, RunState};

/// What the machine has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Stop all vCPUs and devices; when done, nothing is half done.
    Halt,
    /// Let the vCPUs run as soon as there is something to run.
    Release,
    /// Put everything into its power-on state and boot anew. Only while halted.
    Reset,
    /// Tell the broker.
    Tell(Event, RunState),
    /// End the process.
    Exit,
}

/// Run state and the options that bend it.
#[derive(Debug)]
pub struct State {
    run: RunState,
    /// A first start is still to come (not with `-S`, not after a stop).
    to_start: bool,
    no_reboot: bool,
    no_shutdown: bool,
}

impl State {
    /// The state at power-on.
    pub fn new(autostart: bool, no_reboot: bool, no_shutdown: bool) -> Self {
        Self { run: RunState::Prelaunch, to_start: autostart, no_reboot, no_shutdown }
    }

    /// The present run state.
    pub fn run(&self) -> RunState {
        self.run
    }

    /// Whether `start` would still do something.
    pub fn to_start(&self) -> bool {
        self.to_start
    }

    fn running(&self) -> bool {
        self.run == RunState::Running
    }

    /// Leaves `Running` for `to`, if that is the state.
    fn halt(&mut self, to: RunState, effects: &mut Vec<Effect>) {
        if self.running() {
            self.run = to;
            effects.extend([Effect::Halt, Effect::Tell(Event::Stop, to)]);
        }
    }

    /// The first start.
    pub fn start(&mut self, effects: &mut Vec<Effect>) {
        if self.to_start && self.run == RunState::Prelaunch {
            self.go(effects);
        }
        self.to_start = false;
    }

    fn go(&mut self, effects: &mut Vec<Effect>) {
        self.run = RunState::Running;
        effects.extend([Effect::Tell(Event::Resume, self.run), Effect::Release]);
    }

    /// `stop`.
    pub fn stop(&mut self, effects: &mut Vec<Effect>) {
        self.to_start = false;
        self.halt(RunState::Paused, effects);
    }

    /// `cont`.
    pub fn cont(&mut self, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        self.to_start = false;
        match self.run {
            RunState::InternalError | RunState::Shutdown => return Err(Refusal::ResetRequired),
            RunState::Running => {}
            RunState::Prelaunch | RunState::Paused | RunState::GuestPanicked => self.go(effects),
        }
        Ok(())
    }

    /// A reset by `cause`; with `-no-reboot` a shutdown.
    pub fn reset(&mut self, cause: Cause, effects: &mut Vec<Effect>) {
        if self.no_reboot {
            return self.shutdown(cause, effects);
        }
        let running = self.running();
        if !running {
            self.run = RunState::Prelaunch;
        }
        effects.extend([Effect::Halt, Effect::Reset, Effect::Tell(Event::Reset(cause), self.run)]);
        if running {
            effects.push(Effect::Release);
        }
    }

    /// A shutdown by `cause`; with `-no-shutdown` the VM stays, unless the host asked.
    pub fn shutdown(&mut self, cause: Cause, effects: &mut Vec<Effect>) {
        let stays = self.no_shutdown && !matches!(cause, Cause::HostQmpQuit | Cause::HostSignal);
        if stays {
            let after = if self.running() { RunState::Shutdown } else { self.run };
            effects.push(Effect::Tell(Event::Shutdown(cause), after));
            self.halt(RunState::Shutdown, effects);
        } else {
            effects.extend([Effect::Halt, Effect::Tell(Event::Shutdown(cause), self.run), Effect::Exit]);
        }
    }

    /// KVM or a compartment cannot go on.
    pub fn internal_error(&mut self, effects: &mut Vec<Effect>) {
        if self.running() {
            self.halt(RunState::InternalError, effects);
        } else if self.run != RunState::Shutdown {
            self.run = RunState::InternalError;
        }
    }

    /// The guest panicked.
    pub fn panicked(&mut self, effects: &mut Vec<Effect>) {
        let to = if self.running() { RunState::GuestPanicked } else { self.run };
        effects.push(Effect::Tell(Event::GuestPanicked, to));
        self.halt(RunState::GuestPanicked, effects);
        if !self.no_shutdown {
            self.shutdown(Cause::GuestPanic, effects);
        }
    }
}

#[cfg(test)]
mod tests {
    use Effect::{Exit, Halt, Release, Reset, Tell};
    use RunState::{GuestPanicked, InternalError, Paused, Prelaunch, Running, Shutdown};

    use super::*;

    fn state(run: RunState) -> State {
        State { run, ..State::new(true, false, false) }
    }

    fn effects(state: &mut State, f: impl FnOnce(&mut State, &mut Vec<Effect>)) -> Vec<Effect> {
        let mut out = vec![];
        f(state, &mut out);
        out
    }

    #[test]
    fn stop_and_cont_tell_only_changes() {
        let mut s = state(Running);
        assert_eq!(effects(&mut s, State::stop), [Halt, Tell(Event::Stop, Paused)]);
        assert_eq!(effects(&mut s, State::stop), []);
        let cont = |s: &mut State, out: &mut Vec<Effect>| s.cont(out).unwrap();
        assert_eq!(effects(&mut s, cont), [Tell(Event::Resume, Running), Release]);
        assert_eq!(effects(&mut s, cont), []);
    }

    #[test]
    fn start_is_for_once() {
        let mut s = state(Prelaunch);
        assert_eq!(effects(&mut s, State::start), [Tell(Event::Resume, Running), Release]);
        assert_eq!(effects(&mut s, State::start), []);
        let mut s = state(Prelaunch);
        assert_eq!(effects(&mut s, State::stop), []);
        assert_eq!((s.run(), s.to_start()), (Prelaunch, false));
        assert_eq!(effects(&mut s, State::start), []);
        let mut s = State::new(false, false, false);
        assert_eq!(effects(&mut s, State::start), []);
    }

    #[test]
    fn reset_keeps_running_or_leaves_prelaunch() {
        let reset = |s: &mut State, out: &mut Vec<Effect>| s.reset(Cause::GuestReset, out);
        let event = Event::Reset(Cause::GuestReset);
        assert_eq!(effects(&mut state(Running), reset), [Halt, Reset, Tell(event, Running), Release]);
        for run in [Prelaunch, Paused, Shutdown, InternalError, GuestPanicked] {
            let mut s = state(run);
            assert_eq!(effects(&mut s, reset), [Halt, Reset, Tell(event, Prelaunch)]);
            assert_eq!(s.run(), Prelaunch);
        }
        let mut s = State { no_reboot: true, ..state(Running) };
        assert_eq!(effects(&mut s, reset), [Halt, Tell(Event::Shutdown(Cause::GuestReset), Running), Exit]);
    }

    #[test]
    fn only_a_reset_leads_out_of_shutdown_and_internal_error() {
        for run in [Shutdown, InternalError] {
            assert_eq!(state(run).cont(&mut vec![]), Err(Refusal::ResetRequired));
        }
        assert!(state(GuestPanicked).cont(&mut vec![]).is_ok());
    }

    #[test]
    fn no_shutdown_keeps_the_vm_but_not_against_the_host() {
        let mut s = State { no_shutdown: true, ..state(Running) };
        let off = |s: &mut State, out: &mut Vec<Effect>| s.shutdown(Cause::GuestShutdown, out);
        let told = Tell(Event::Shutdown(Cause::GuestShutdown), Shutdown);
        assert_eq!(effects(&mut s, off), [told, Halt, Tell(Event::Stop, Shutdown)]);
        let quit = |s: &mut State, out: &mut Vec<Effect>| s.shutdown(Cause::HostQmpQuit, out);
        assert_eq!(effects(&mut s, quit).last(), Some(&Exit));
    }

    #[test]
    fn a_panic_is_told_and_ends_the_vm() {
        let out = effects(&mut state(Running), State::panicked);
        assert_eq!(
            out[..3],
            [Tell(Event::GuestPanicked, GuestPanicked), Halt, Tell(Event::Stop, GuestPanicked)]
        );
        assert_eq!(out.last(), Some(&Exit));
        let mut s = State { no_shutdown: true, ..state(Running) };
        effects(&mut s, State::panicked);
        assert_eq!(s.run(), GuestPanicked);
    }

    #[test]
    fn an_internal_error_stops() {
        let out = effects(&mut state(Running), State::internal_error);
        assert_eq!(out, [Halt, Tell(Event::Stop, InternalError)]);
        let mut s = state(Paused);
        assert_eq!(effects(&mut s, State::internal_error), []);
        assert_eq!(s.run(), InternalError);
    }
}
