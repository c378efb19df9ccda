//! Messages of the control links and the configuration blobs of each process.
//!
//! A message is one `SOCK_SEQPACKET` packet of at most [`MAX_MESSAGE`] bytes in postcard encoding.
//! Every link begins with a [`Hello`] each way; the connecting side speaks first.

pub mod balloon;
pub mod config;
pub mod console;
pub mod core;
pub mod dump;
pub mod loader;
pub mod opener;
pub mod pci;
pub mod plug;
pub mod side;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of everything in this crate; both ends of a link must have the same.
pub const VERSION: u16 = 4;
/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// The largest configuration blob, in bytes.
pub const MAX_CONFIG: usize = 1 << 20;
/// First bytes of every link, little-endian "BLKH".
pub const MAGIC: u32 = u32::from_le_bytes(*b"BLKH");

/// First message each way on every link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: u32,
    /// Version of the link's protocol.
    pub version: u16,
}

/// A message could not be encoded or decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed control message")]
pub struct Malformed;

/// Encodes one message.
///
/// # Errors
/// [`Malformed`] if it would be longer than [`MAX_MESSAGE`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, Malformed> {
    encode_up_to(MAX_MESSAGE, message)
}

/// Encodes a configuration blob.
///
/// # Errors
/// [`Malformed`] if it would be longer than [`MAX_CONFIG`].
pub fn encode_config<T: Serialize>(config: &T) -> Result<Vec<u8>, Malformed> {
    encode_up_to(MAX_CONFIG, config)
}

fn encode_up_to<T: Serialize>(limit: usize, message: &T) -> Result<Vec<u8>, Malformed> {
    let bytes = postcard::to_allocvec(message).map_err(|_| Malformed)?;
    if bytes.len() > limit { Err(Malformed) } else { Ok(bytes) }
}

/// Decodes one message; bytes left over are an error.
///
/// # Errors
/// [`Malformed`] for anything that is not exactly one `T`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_exact() {
        let hello = Hello { magic: MAGIC, version: VERSION };
        let mut bytes = encode(&hello).unwrap();
        assert_eq!(decode::<Hello>(&bytes), Ok(hello));
        bytes.push(0);
        assert_eq!(decode::<Hello>(&bytes), Err(Malformed));
        assert_eq!(decode::<Hello>(&bytes[..2]), Err(Malformed));
        assert_eq!(encode(&vec![0u8; MAX_MESSAGE]), Err(Malformed));
    }

    #[test]
    fn a_claimed_length_sizes_no_allocation() {
        // A vector of 2^32 - 1 elements that is not there.
        assert_eq!(decode::<Vec<u64>>(&[0xff, 0xff, 0xff, 0xff, 0x0f]), Err(Malformed));
    }
}
