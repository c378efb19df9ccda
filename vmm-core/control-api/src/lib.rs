//! Messages of the control links and the configuration blobs of each process
