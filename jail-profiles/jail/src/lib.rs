//! The start contract of every process: named fds, jail, readiness, links, logs
