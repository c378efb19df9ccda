//! The devices with their clocks and interrupt lines.

use std::os::fd::OwnedFd;

use bulkhead_bus_api::{Access, Action, CollectedWrite, platform::CONSOLE_GSIS};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::clock::{Now, RunClock};
use crate::device::{self, Platform, first, serial::Serial};
use crate::queue::Queue;

/// An interrupt line: one write to the eventfd is one edge.
#[derive(Debug, Default)]
struct Line {
    eventfd: Option<OwnedFd>,
    /// An edge came while none could be raised.
    held: bool,
}

impl Line {
    fn raise(&mut self) -> Result<(), Errno> {
        match &self.eventfd {
            Some(fd) => {
                self.held = false;
                nix::unistd::write(fd, &1u64.to_ne_bytes()).map(drop)
            }
            None => {
                self.held = true;
                Ok(())
            }
        }
    }
}

/// The devices in time.
#[derive(Debug)]
pub struct Machine {
    platform: Platform,
    clock: RunClock,
    lines: [Line; CONSOLE_GSIS.len()],
    /// The run clock was stopped or let go, which moves the next event.
    clock_changed: bool,
}

/// What of the machine outlives the process, beside the serial port's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    devices: device::Saved,
    clock: RunClock,
    held: [bool; CONSOLE_GSIS.len()],
}

impl Saved {
    /// Whether a guest can have brought this about on a machine with or without a serial port.
    #[must_use]
    pub fn is_possible(&self, serial: bool) -> bool {
        self.devices.is_possible(serial)
    }
}

/// A clock of the host in nanoseconds; 0 if it had none, which Linux always has.
fn clock(id: ClockId) -> i128 {
    clock_gettime(id).map_or(0, |t| i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec()))
}

/// Monotonic time in nanoseconds.
#[must_use]
pub fn monotonic() -> u64 {
    u64::try_from(clock(ClockId::CLOCK_MONOTONIC)).unwrap_or(0)
}

impl Machine {
    /// A machine that has just been switched on, with COM1 if `serial`.
    #[must_use]
    pub fn new(serial: bool) -> Self {
        let clock = RunClock::running_from(monotonic());
        let now = now(&clock);
        Self { platform: Platform::new(serial, now), clock, lines: Default::default(), clock_changed: false }
    }

    /// A machine that goes on from what was saved, and from output of which `consumed` bytes have gone out
    /// since.
    #[must_use]
    pub fn restored(saved: Saved, output: Queue, consumed: usize) -> Self {
        Self {
            platform: Platform::restored(saved.devices, output, consumed),
            clock: saved.clock,
            lines: saved.held.map(|held| Line { eventfd: None, held }),
            clock_changed: true,
        }
    }

    /// What is to outlive the process.
    #[must_use]
    pub fn save(&self) -> Saved {
        Saved { devices: self.platform.save(), clock: self.clock, held: self.held() }
    }

    /// Whether that is what was saved.
    #[must_use]
    pub fn is_as(&self, saved: &Saved) -> bool {
        self.platform.is_as(&saved.devices) && self.clock == saved.clock && self.held() == saved.held
    }

    fn held(&self) -> [bool; CONSOLE_GSIS.len()] {
        std::array::from_fn(|i| self.lines.get(i).is_some_and(|line| line.held))
    }

    /// Connects the interrupt lines, in the order of [`CONSOLE_GSIS`].
    ///
    /// # Errors
    /// An eventfd could not be written.
    pub fn connect(&mut self, eventfds: impl IntoIterator<Item = OwnedFd>) -> Result<(), Errno> {
        for (line, fd) in self.lines.iter_mut().zip(eventfds) {
            line.eventfd = Some(fd);
        }
        self.raise()
    }

    /// Does one access after the writes that were collected before it.
    ///
    /// # Errors
    /// An eventfd could not be written.
    pub fn access(&mut self, writes: &[CollectedWrite], access: &Access) -> Result<(u64, Action), Errno> {
        let now = now(&self.clock);
        let mut action = Action::None;
        for write in writes {
            action = first(action, self.platform.write(write, now));
        }
        let (data, next) = self.platform.access(access, now);
        self.raise()?;
        Ok((data, first(action, next)))
    }

    /// The serial port may be changed by `change`; interrupts that follow from it are raised.
    ///
    /// # Errors
    /// An eventfd could not be written.
    pub fn with_serial(&mut self, change: impl FnOnce(&mut Serial)) -> Result<(), Errno> {
        if let Some(serial) = &mut self.platform.serial {
            change(serial);
        }
        self.raise()
    }

    /// The serial port, if the machine has one.
    #[must_use]
    pub fn serial(&self) -> Option<&Serial> {
        self.platform.serial.as_ref()
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// An eventfd could not be written.
    pub fn press_power_button(&mut self) -> Result<(), Errno> {
        self.platform.press_power_button();
        self.raise()
    }

    /// Puts every device into its reset state; interrupts that were held are forgotten.
    pub fn reset(&mut self) {
        let now = now(&self.clock);
        self.platform.reset(now);
        self.platform.take_edges();
        for line in &mut self.lines {
            line.held = false;
        }
    }

    /// Stops the run clock and holds interrupts.
    pub fn pause(&mut self) {
        self.clock.pause(monotonic());
        self.clock_changed = true;
    }

    /// Lets the run clock go on and raises the interrupts that were held.
    ///
    /// # Errors
    /// An eventfd could not be written.
    pub fn resume(&mut self) -> Result<(), Errno> {
        self.clock.resume(monotonic());
        self.clock_changed = true;
        self.raise()
    }

    /// Whether the machine is not paused.
    #[must_use]
    pub const fn runs(&self) -> bool {
        self.clock.runs()
    }

    /// Lets time pass.
    ///
    /// # Errors
    /// An eventfd could not be written.
    pub fn update(&mut self) -> Result<(), Errno> {
        self.platform.update(now(&self.clock));
        self.raise()
    }

    /// If it may have changed: nanoseconds until [`Self::update`] is due, `None` for never.
    pub fn take_next_event(&mut self) -> Option<Option<u64>> {
        let changed = self.platform.take_timers_changed() | std::mem::take(&mut self.clock_changed);
        if !changed {
            return None;
        }
        Some(self.platform.next_event(now(&self.clock), self.runs()))
    }

    fn raise(&mut self) -> Result<(), Errno> {
        let edges = self.platform.take_edges();
        let runs = self.clock.runs();
        for (line, edge) in self.lines.iter_mut().zip(edges) {
            if runs && (edge || line.held) {
                line.raise()?;
            } else {
                line.held |= edge;
            }
        }
        Ok(())
    }
}

fn now(run: &RunClock) -> Now {
    Now { wall: clock(ClockId::CLOCK_REALTIME), run: run.at(monotonic()) }
}
