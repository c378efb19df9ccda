//! The native guest: a small PVH program for any KVM
