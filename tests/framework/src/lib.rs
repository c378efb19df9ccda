//! Starts VMs, speaks QMP and reads consoles for the tests
