//! Tests on the native guest
