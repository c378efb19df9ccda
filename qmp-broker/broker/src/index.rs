//! What the state says of the descriptors that clients passed.

use serde::{Deserialize, Serialize};

use crate::held::Held;

/// A member of a set.
#[derive(Debug)]
pub struct Member {
    /// What clients call it.
    pub number: i64,
    /// What its client wants to remember.
    pub opaque: Option<String>,
    /// The descriptor.
    pub fd: Held,
}

/// What [`Descriptors`](crate::descriptors::Descriptors) are beside the descriptors themselves, which it names by
/// their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Monitor, name and key.
    pub names: Vec<(String, String, u64)>,
    /// Sets by id, with number, `opaque` and key of their members.
    pub sets: Vec<(i64, Vec<IndexedMember>)>,
    /// Members there have been.
    pub count: i64,
    /// The next key.
    pub next_key: u64,
}

/// Number, `opaque` and key of a member.
pub type IndexedMember = (i64, Option<String>, u64);

/// The highest key that is believed: nobody gets there by counting.
pub const MAX_KEY: u64 = u64::MAX / 2;

impl Index {
    /// Whether its counters can have come about by counting.
    #[must_use]
    pub fn is_plausible(&self) -> bool {
        (0..=i64::MAX / 2).contains(&self.count) && self.next_key <= MAX_KEY
    }
}
