//! The gate between halted and running: no vCPU is inside KVM while it is closed and idle.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Locks even if a thread panicked (release builds abort on a panic).
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Inner {
    /// Counts releases and resets; a vCPU runs at most once per epoch.
    epoch: u64,
    open: bool,
    inside: usize,
}

/// One gate for all vCPUs of the machine.
#[derive(Debug, Default)]
pub struct Gate {
    /// The epoch while the gate is open, 0 while it is closed: what running vCPUs look at.
    current: AtomicU64,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Gate {
    /// Waits until the gate is open in an epoch after `last`, goes in, and returns the epoch.
    pub fn enter(&self, last: u64) -> u64 {
        let inner = lock(&self.inner);
        let mut inner = self
            .changed
            .wait_while(inner, |i| !i.open || i.epoch <= last)
            .unwrap_or_else(PoisonError::into_inner);
        inner.inside += 1;
        inner.epoch
    }

    /// Goes out.
    pub fn leave(&self) {
        lock(&self.inner).inside -= 1;
        self.changed.notify_all();
    }

    /// Whether a vCPU that came in with `epoch` may go on.
    pub fn is_open(&self, epoch: u64) -> bool {
        self.current.load(Ordering::SeqCst) == epoch
    }

    /// Lets everybody in, in a new epoch.
    pub fn open(&self) {
        let mut inner = lock(&self.inner);
        inner.epoch += 1;
        inner.open = true;
        self.current.store(inner.epoch, Ordering::SeqCst);
        drop(inner);
        self.changed.notify_all();
    }

    /// Lets nobody in any more; whoever is inside must be kicked after this.
    pub fn close(&self) {
        lock(&self.inner).open = false;
        self.current.store(0, Ordering::SeqCst);
    }

    /// Waits until nobody is inside; false after `patience`.
    pub fn wait_idle(&self, patience: Duration) -> bool {
        let inner = lock(&self.inner);
        let (_inner, timeout) = self
            .changed
            .wait_timeout_while(inner, patience, |i| i.inside > 0)
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    /// The present epoch.
    pub fn epoch(&self) -> u64 {
        lock(&self.inner).epoch
    }

    /// Makes whatever vCPUs reported in this epoch stale (a reset).
    pub fn next_epoch(&self) {
        lock(&self.inner).epoch += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn one_entry_per_epoch() {
        let gate = Arc::new(Gate::default());
        let other = Arc::clone(&gate);
        let vcpu = thread::spawn(move || {
            let mut epochs = vec![];
            for _ in 0..3 {
                let epoch = other.enter(epochs.last().copied().unwrap_or(0));
                epochs.push(epoch);
                while other.is_open(epoch) {
                    thread::yield_now();
                }
                other.leave();
            }
            epochs
        });
        for _ in 0..3 {
            gate.open();
            while lock(&gate.inner).inside == 0 {
                thread::yield_now();
            }
            assert!(!gate.wait_idle(Duration::from_millis(1)));
            gate.close();
            assert!(gate.wait_idle(Duration::from_secs(10)));
        }
        assert_eq!(vcpu.join().unwrap(), [1, 2, 3]);
    }
}
