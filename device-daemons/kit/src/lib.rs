//! What the device daemons share: listener, queues, side link, start and end.
