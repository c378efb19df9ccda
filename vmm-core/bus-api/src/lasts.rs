//! The number and reply of the request that was answered last on each access link: what lets a daemon answer a
//! request once more that its predecessor has carried out.

use serde::{Deserialize, Serialize};

use crate::REPLY_LEN;

/// A number and the reply to the request of that number.
pub type Last = (u32, [u8; REPLY_LEN]);

/// By access link. Part of what outlives a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lasts(Vec<Option<Last>>);

impl Lasts {
    /// For so many links; what is known of as many stays known.
    pub fn begin(&mut self, links: usize) {
        if self.0.len() != links {
            self.0 = vec![None; links];
        }
    }

    /// The reply to a request that was answered last on its link, if it is this one.
    #[must_use]
    pub fn reply_to(&self, link: usize, number: u32) -> Option<[u8; REPLY_LEN]> {
        let (last, reply) = self.0.get(link).copied().flatten()?;
        Some(reply).filter(|_| last == number)
    }

    /// Notes a reply. A link that there is not is nobody's.
    pub fn set(&mut self, link: usize, last: Last) {
        if let Some(slot) = self.0.get_mut(link) {
            *slot = Some(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_request_of_a_link_is_answered_again() {
        let mut lasts = Lasts::default();
        lasts.begin(2);
        lasts.set(1, (7, [7; REPLY_LEN]));
        lasts.set(2, (7, [7; REPLY_LEN]));
        lasts.begin(2);
        assert_eq!(lasts.reply_to(1, 7), Some([7; REPLY_LEN]));
        assert_eq!([lasts.reply_to(1, 6), lasts.reply_to(0, 7), lasts.reply_to(2, 7)], [None; 3]);
        lasts.begin(3);
        assert_eq!(lasts.reply_to(1, 7), None, "another machine's");
    }
}
