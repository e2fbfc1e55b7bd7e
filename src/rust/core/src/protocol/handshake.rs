//! The start of an agent's stream, as the head reads it: anything that a login shell prints, the
//! magic line, a hello. No I/O happens here.

use crate::protocol::control::{self, Hello, ToHead};
use crate::protocol::frame::{self, Frame, Kind};
use bytes::BytesMut;

/// Environment variable of processes that the package starts: the number of the process that
/// started them. Other processes recognise by it what ends with its head.
pub const ENDS_WITH_HEAD: &str = "RUSTCLUSTER_ENDS_WITH_HEAD";

/// Opens each direction of a stream; whatever comes before it is a login shell's or a profile's.
pub const MAGIC: &[u8] = b"\n<rustcluster stream 1>\n";

/// The most noise before [`MAGIC`] that is skipped.
pub const MAX_NOISE: usize = 64 * 1024;

/// Looks for [`MAGIC`] at the start of a stream. Holds what came before it.
#[derive(Debug, Default)]
pub struct Preamble {
    seen: Vec<u8>,
}

/// The result of [`Preamble::feed`].
#[derive(Debug, PartialEq, Eq)]
pub enum PreambleState {
    /// The magic has not arrived yet.
    Incomplete,
    /// The stream proper begins with these bytes.
    Open(Vec<u8>),
    /// More than [`MAX_NOISE`] bytes and no magic among them.
    NotOurs,
}

impl Preamble {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) -> PreambleState {
        // The magic can only end in the new bytes, so only its overlap with the old is searched.
        let from = self.seen.len().saturating_sub(MAGIC.len());
        self.seen.extend_from_slice(bytes);
        let found = self.seen[from..]
            .windows(MAGIC.len())
            .position(|window| window == MAGIC);
        match found {
            Some(at) => {
                let rest = self.seen[from + at + MAGIC.len()..].to_vec();
                self.seen.truncate(from + at);
                PreambleState::Open(rest)
            }
            None if self.seen.len() > MAX_NOISE => PreambleState::NotOurs,
            None => PreambleState::Incomplete,
        }
    }

    /// The bytes before the magic, as text.
    pub fn noise(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

/// Upper bound on the announced number of cores, because the number of workers may depend on it.
const MAX_CORES: u32 = 1 << 16;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Greeting {
    preamble: Preamble,
    open: bool,
    received: BytesMut,
}

/// Why the started process is not an agent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UntrustedPeer(String);

impl Greeting {
    /// Takes the next bytes of the stream. `None`: the hello is still to come.
    ///
    /// # Errors
    /// When no agent would send these bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<Hello>, UntrustedPeer> {
        if self.open {
            self.received.extend_from_slice(bytes);
        } else {
            match self.preamble.feed(bytes) {
                PreambleState::Incomplete => return Ok(None),
                PreambleState::NotOurs => {
                    let what = "what was started is no rustcluster agent: it prints without end";
                    return Err(UntrustedPeer(what.to_owned()));
                }
                PreambleState::Open(rest) => {
                    self.open = true;
                    self.received.extend_from_slice(&rest);
                }
            }
        }
        let decoded = frame::decode(&mut self.received)
            .map_err(|error| UntrustedPeer(format!("the agent sent {error}")))?;
        decoded.map(|frame| hello(&frame)).transpose()
    }

    /// The bytes before the magic line, as text.
    pub fn noise(&self) -> String {
        self.preamble.noise()
    }

    /// The bytes after the hello.
    pub fn take_rest(&mut self) -> BytesMut {
        std::mem::take(&mut self.received)
    }
}

fn hello(frame: &Frame) -> Result<Hello, UntrustedPeer> {
    match control::decode(&frame.body) {
        Ok(ToHead::Hello(hello)) if frame.header.kind == Kind::Control => {
            if hello.cores > MAX_CORES {
                return Err(UntrustedPeer(format!(
                    "the agent claims {} cores",
                    hello.cores
                )));
            }
            Ok(hello)
        }
        _ => Err(UntrustedPeer("the agent did not greet".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::control::ToAgent;
    use proptest::prelude::*;

    fn says(message: &impl serde::Serialize) -> Vec<u8> {
        let frame = control::encode(message).unwrap();
        [MAGIC, &frame.header.to_bytes(), &frame.body].concat()
    }

    #[test]
    fn a_hello_is_found_after_noise_and_the_rest_is_returned() {
        let hello = Hello::default();
        let mut wire = b"Last login: 100%\n".to_vec();
        wire.extend(says(&ToHead::Hello(hello.clone())));
        wire.extend(b"more");
        for slice in [1, 7, wire.len()] {
            let mut greeting = Greeting::default();
            let mut found = None;
            for bytes in wire.chunks(slice) {
                match found {
                    None => found = greeting.feed(bytes).unwrap(),
                    Some(_) => greeting.received.extend_from_slice(bytes),
                }
            }
            assert_eq!(found.as_ref(), Some(&hello));
            assert_eq!(greeting.noise(), "Last login: 100%\n");
            assert_eq!(&greeting.take_rest()[..], b"more");
        }
    }

    #[test]
    fn a_peer_without_a_hello_is_untrusted() {
        let cores = u32::MAX;
        let boaster = Hello {
            cores,
            ..Hello::default()
        };
        for (wire, why) in [
            (says(&ToHead::Alive), "did not greet"),
            (says(&ToAgent::Stop), "did not greet"),
            (says(&ToHead::Hello(boaster)), "cores"),
            ([MAGIC, &[255; 20]].concat(), "frame kind"),
            (vec![b'y'; MAX_NOISE + 1], "prints without end"),
        ] {
            let error = Greeting::default().feed(&wire).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn noise_before_the_magic_is_skipped(
            noise in prop::collection::vec(any::<u8>(), 0..500),
            rest in prop::collection::vec(any::<u8>(), 0..50),
            cut in 1usize..60,
        ) {
            let mut wire = noise.clone();
            wire.extend_from_slice(MAGIC);
            wire.extend_from_slice(&rest);
            let mut preamble = Preamble::default();
            let mut opened = None;
            for piece in wire.chunks(cut) {
                match &mut opened {
                    None => match preamble.feed(piece) {
                        PreambleState::Open(bytes) => opened = Some(bytes),
                        state => prop_assert_eq!(state, PreambleState::Incomplete),
                    },
                    Some(bytes) => bytes.extend_from_slice(piece),
                }
            }
            prop_assert_eq!(opened, Some(rest));
            prop_assert_eq!(preamble.noise(), String::from_utf8_lossy(&noise));
        }
    }

    #[test]
    fn a_flood_without_the_magic_is_not_ours() {
        let mut preamble = Preamble::default();
        assert_eq!(
            preamble.feed(&vec![b'x'; MAX_NOISE]),
            PreambleState::Incomplete
        );
        assert_eq!(preamble.feed(b"x"), PreambleState::NotOurs);
    }
}
