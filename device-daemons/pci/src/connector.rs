//! Connections that devices lack: asked of the opener at a pace, without end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The first repetition comes after this, each later one after twice the time ...
const FIRST: Duration = Duration::from_millis(10);
/// ... up to this.
const LONGEST: Duration = Duration::from_secs(1);
/// One that was there for so long is asked for at once when it is lost, and at the first pace: a daemon of ours that dies is
/// there again in less.
const WHILE: Duration = Duration::from_millis(100);
/// No answer is as good as a refusal after this.
const PATIENCE: Duration = Duration::from_secs(5);

/// One name.
#[derive(Clone, Copy, Debug)]
struct Want {
    /// Index of the device.
    device: u16,
    /// It is missing now.
    missing: bool,
    /// It has been asked for and not yet been answered.
    asked: bool,
    /// When it may be asked for.
    next: Instant,
    delay: Duration,
    /// When it was answered last.
    answered: Instant,
}

/// All names that were ever missing.
#[derive(Debug, Default)]
pub struct Connector {
    wants: BTreeMap<String, Want>,
}

impl Connector {
    /// What a device lacks now.
    pub fn update(&mut self, device: u16, missing: &[String], now: Instant) {
        for (name, want) in self.wants.iter_mut().filter(|(_, want)| want.device == device) {
            let lost = missing.contains(name) && !want.missing && !want.asked;
            if lost && now.saturating_duration_since(want.answered) >= WHILE {
                (want.next, want.delay) = (now, FIRST);
            }
            want.missing = false;
        }
        for name in missing {
            let new = Want { device, missing: true, asked: false, next: now, delay: FIRST, answered: now };
            let want = self.wants.entry(name.clone()).or_insert(new);
            want.device = device;
            want.missing = true;
        }
    }

    /// The device is gone.
    pub fn forget(&mut self, device: u16) {
        self.wants.retain(|_, want| want.device != device);
    }

    /// The names to ask for now.
    pub fn due(&mut self, now: Instant) -> Vec<String> {
        let mut due = Vec::new();
        for (name, want) in &mut self.wants {
            if !want.missing || now < want.next {
                continue;
            }
            // One that was there for a while begins anew.
            if !want.asked && now.saturating_duration_since(want.next) > LONGEST {
                want.delay = FIRST;
            }
            want.asked = true;
            want.next = now + PATIENCE;
            due.push(name.clone());
        }
        due
    }

    /// The opener has answered; returns the device that lacks it.
    pub fn answered(&mut self, name: &str, now: Instant) -> Option<u16> {
        let want = self.wants.get_mut(name)?;
        want.asked = false;
        want.answered = now;
        want.next = now + want.delay;
        want.delay = (2 * want.delay).min(LONGEST);
        Some(want.device).filter(|_| want.missing)
    }

    /// When the next name is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.wants.values().filter(|want| want.missing).map(|want| want.next).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_come_at_a_pace_and_without_end() {
        let mut connector = Connector::default();
        let start = Instant::now();
        let mut now = start;
        let name = ["vhost.d".to_owned()];
        connector.update(3, &name, now);
        let mut delays = Vec::new();
        for _ in 0..10 {
            assert_eq!(connector.due(now), name);
            assert!(connector.due(now).is_empty(), "asked and not yet answered");
            assert_eq!(connector.answered("vhost.d", now), Some(3));
            let next = connector.deadline().unwrap();
            delays.push((next - now).as_millis());
            assert!(connector.due(next - Duration::from_millis(1)).is_empty());
            now = next;
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
        // Connected, and lost after a while.
        connector.update(3, &[], now);
        assert!(connector.due(now).is_empty() && connector.deadline().is_none());
        assert_eq!(connector.answered("vhost.d", now), None);
        for (there, due) in [(WHILE / 2, false), (WHILE, true)] {
            connector.answered("vhost.d", now);
            connector.update(3, &[], now);
            now += there;
            connector.update(3, &name, now);
            assert_eq!(!connector.due(now).is_empty(), due, "lost after {there:?}");
        }
        connector.answered("vhost.d", now);
        connector.update(3, &[], now);
        now += Duration::from_secs(10);
        connector.update(3, &name, now);
        assert_eq!(connector.due(now), name);
        connector.answered("vhost.d", now);
        assert_eq!((connector.deadline().unwrap() - now).as_millis(), 10);
    }

    #[test]
    fn an_opener_that_does_not_answer_is_asked_again() {
        let mut connector = Connector::default();
        let now = Instant::now();
        connector.update(0, &["side.d".to_owned()], now);
        assert_eq!(connector.due(now).len(), 1);
        assert!(connector.due(now + Duration::from_secs(4)).is_empty());
        assert_eq!(connector.due(now + Duration::from_secs(5)).len(), 1);
        connector.forget(0);
        assert_eq!(connector.answered("side.d", now), None);
    }
}
