//! The encrypted connection by which an agent dials back to the head: the handshake and the messages after it.
//! No I/O happens here.
//!
//! The handshake is `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`. The key of the agent's launcher authenticates both
//! sides. Each Noise message follows its length (two bytes, little-endian).
//!
//! 1. The dialer sends [`OPENING`], the number of its launcher and a message with its [`Introduction`].
//! 2. The head answers with a message without content.
//! 3. The dialer sends "ready". Only the holder of the key can do so: a replayed first message gets no further.
//! 4. The head sends its [`Verdict`]. The stream of the agent follows in both directions.
//!
//! An empty message ends a direction of the stream, so that nobody else can end the stream unnoticed.

use crate::protocol::control::PROTOCOL;
use crate::protocol::truncate;
use snow::{Builder, HandshakeState, TransportState};
use std::sync::Arc;
use zeroize::Zeroizing;

/// The first bytes of a connection. The last of them is the version of this handshake.
pub const OPENING: &[u8] = b"rustcluster dial 1\n";

/// A key, which is overwritten when it is dropped.
pub type Key = Zeroizing<[u8; 32]>;

/// Bytes that a dialer may send before it is authenticated.
pub const MAX_UNAUTHENTICATED: usize = 4096;

/// The longest Noise message.
const MAX_MESSAGE: usize = 65535;
/// Bytes that a message is longer than its content.
const TAG: usize = 16;
/// Bytes of the length before each message.
const LENGTH: usize = 2;
/// The longest content of a message.
pub const MAX_CONTENT: usize = MAX_MESSAGE - TAG;
/// Bytes of a sealed message with the longest content.
pub const MAX_SEALED: usize = LENGTH + MAX_MESSAGE;

const PREFIX: usize = OPENING.len() + 4;
const READY: &[u8] = b"ready";
/// The longest reason of a verdict, hostname and job, in bytes.
const MAX_REASON: usize = 2000;
const MAX_TEXT: usize = 255;

/// Why a handshake has failed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoiseError(&'static str);

const NOT_AUTHENTIC: NoiseError =
    NoiseError("the other side has another key, or the connection was tampered with");
const NOT_OURS: NoiseError = NoiseError("the other side is no rustcluster process");
const TOO_LONG: NoiseError = NoiseError("the other side sent more than the handshake allows");
const OUT_OF_ORDER: NoiseError = NoiseError("the handshake is not at this step");

fn other(_: snow::Error) -> NoiseError {
    NOT_AUTHENTIC
}

/// What a dialer says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Introduction {
    /// The version of the messages that follow.
    pub protocol: u32,
    /// A random number of this start of the agent.
    pub incarnation: [u8; 16],
    /// The name of the agent's machine.
    pub hostname: String,
    /// The name that the batch engine gives to the agent's job; empty if it is not known.
    pub job: String,
    /// Of an agent that has workers and looks for another head, the name that the head before gave to it, and its pid;
    /// empty for others.
    pub lingers: String,
}

impl Introduction {
    /// The introduction of an agent of this version.
    pub fn new(incarnation: [u8; 16], hostname: &str, job: &str) -> Introduction {
        Introduction {
            protocol: PROTOCOL,
            incarnation,
            hostname: truncate::beginning(hostname, MAX_TEXT).to_owned(),
            job: truncate::beginning(job, MAX_TEXT).to_owned(),
            lingers: String::new(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.protocol.to_le_bytes().to_vec();
        bytes.extend(self.incarnation);
        for text in [&self.hostname, &self.job, &self.lingers] {
            let text = truncate::beginning(text, MAX_TEXT);
            bytes.push(text.len() as u8);
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    /// Later versions may append fields.
    fn decode(bytes: &[u8]) -> Option<Introduction> {
        let (protocol, bytes) = bytes.split_first_chunk::<4>()?;
        let (incarnation, mut bytes) = bytes.split_first_chunk::<16>()?;
        let mut text = || {
            let (&len, rest) = bytes.split_first()?;
            let (text, rest) = rest.split_at_checked(usize::from(len))?;
            bytes = rest;
            Some(String::from_utf8_lossy(text).into_owned())
        };
        Some(Introduction {
            protocol: u32::from_le_bytes(*protocol),
            incarnation: *incarnation,
            hostname: text()?,
            job: text()?,
            lingers: text().unwrap_or_default(),
        })
    }

    /// The reason why the head cannot talk to this agent, if there is one.
    pub fn problem(&self) -> Option<String> {
        (self.protocol != PROTOCOL).then(|| {
            format!(
                "the rustcluster of the head (protocol {PROTOCOL}) cannot talk to that on {} \
                 (protocol {}): install the same version on both",
                self.hostname, self.protocol
            )
        })
    }
}

/// The head's answer to an authenticated dialer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The agent has a slot, and its stream follows.
    Accepted,
    /// The head does not need this agent, which is no failure.
    NotNeeded(String),
    /// The head cannot use this agent.
    Refused(String),
}

impl Verdict {
    fn encode(&self) -> Vec<u8> {
        let (kind, reason) = match self {
            Verdict::Accepted => (0, ""),
            Verdict::NotNeeded(reason) => (1, reason.as_str()),
            Verdict::Refused(reason) => (2, reason.as_str()),
        };
        [&[kind], truncate::beginning(reason, MAX_REASON).as_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Verdict> {
        let (kind, reason) = bytes.split_first()?;
        let reason = String::from_utf8_lossy(reason).into_owned();
        match kind {
            0 if reason.is_empty() => Some(Verdict::Accepted),
            1 => Some(Verdict::NotNeeded(reason)),
            2 => Some(Verdict::Refused(reason)),
            _ => None,
        }
    }
}

/// A random number from the system.
///
/// # Errors
/// When the system has none.
pub fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn builder<'a>(key: &'a Key, prologue: &'a [u8]) -> Result<Builder<'a>, NoiseError> {
    const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
    let params = PATTERN
        .parse()
        .map_err(|_| NoiseError("the Noise pattern is not available"))?;
    let builder = Builder::new(params).psk(0, key).map_err(other)?;
    builder.prologue(prologue).map_err(other)
}

fn prologue(launcher: u32) -> Vec<u8> {
    [OPENING, &launcher.to_le_bytes()].concat()
}

fn push_message(
    out: &mut Vec<u8>,
    content: &[u8],
    write: impl FnOnce(&[u8], &mut [u8]) -> Result<usize, snow::Error>,
) -> Result<(), NoiseError> {
    let start = out.len();
    // A handshake message has a public key, too.
    let max = (content.len() + 32 + TAG).min(MAX_MESSAGE);
    out.resize(start + LENGTH + max, 0);
    match write(content, &mut out[start + LENGTH..]) {
        Ok(written) => {
            out.truncate(start + LENGTH + written);
            out[start..start + LENGTH].copy_from_slice(&(written as u16).to_le_bytes());
            Ok(())
        }
        Err(error) => {
            out.truncate(start);
            Err(other(error))
        }
    }
}

/// The first message in `bytes`, if it is complete, and the bytes that it takes.
fn split_message(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH>()?;
    let length = usize::from(u16::from_le_bytes(*length));
    Some((rest.get(..length)?, LENGTH + length))
}

/// Takes the first message out of `received`, and returns its content.
fn take_message(
    received: &mut Vec<u8>,
    read: impl FnOnce(&[u8], &mut [u8]) -> Result<usize, snow::Error>,
) -> Result<Option<Vec<u8>>, NoiseError> {
    let Some((message, taken)) = split_message(received) else {
        return Ok(None);
    };
    let mut content = vec![0; message.len()];
    let len = read(message, &mut content).map_err(other)?;
    content.truncate(len);
    received.drain(..taken);
    Ok(Some(content))
}

enum Step {
    Hands(Box<HandshakeState>),
    Transport(TransportState),
    /// The handshake has failed.
    Failed,
}

/// The dialer's side of the handshake.
pub struct Dialer {
    step: Step,
    received: Vec<u8>,
}

impl Dialer {
    /// Starts the handshake, and returns the bytes to send.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn start(
        key: &Key,
        launcher: u32,
        introduction: &Introduction,
    ) -> Result<(Dialer, Vec<u8>), NoiseError> {
        let mut out = prologue(launcher);
        let mut hands = builder(key, &out)?.build_initiator().map_err(other)?;
        push_message(&mut out, &introduction.encode(), |content, message| {
            hands.write_message(content, message)
        })?;
        let dialer = Dialer {
            step: Step::Hands(Box::new(hands)),
            received: Vec::new(),
        };
        Ok((dialer, out))
    }

    /// Takes the next bytes from the head, and appends the bytes to send to `out`. Returns the head's verdict
    /// once it has arrived.
    ///
    /// # Errors
    /// When the other side is not the head.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Option<Verdict>, NoiseError> {
        self.received.extend_from_slice(bytes);
        loop {
            match std::mem::replace(&mut self.step, Step::Failed) {
                Step::Hands(mut hands) => {
                    let message = take_message(&mut self.received, |message, content| {
                        hands.read_message(message, content)
                    })?;
                    if message.is_none() {
                        self.step = Step::Hands(hands);
                        return Ok(None);
                    }
                    let mut transport = hands.into_transport_mode().map_err(other)?;
                    push_message(out, READY, |content, message| {
                        transport.write_message(content, message)
                    })?;
                    self.step = Step::Transport(transport);
                }
                Step::Transport(mut transport) => {
                    let message = take_message(&mut self.received, |message, content| {
                        transport.read_message(message, content)
                    })?;
                    self.step = Step::Transport(transport);
                    let Some(message) = message else {
                        return Ok(None);
                    };
                    return Verdict::decode(&message).map(Some).ok_or(NOT_OURS);
                }
                Step::Failed => return Err(OUT_OF_ORDER),
            }
        }
    }

    /// The connection after the verdict, and the bytes that have arrived behind it.
    ///
    /// # Errors
    /// When the handshake is not complete.
    pub fn finish(self) -> Result<(Transport, Vec<u8>), NoiseError> {
        match self.step {
            Step::Transport(state) => Ok((Transport { state }, self.received)),
            _ => Err(OUT_OF_ORDER),
        }
    }
}

/// The head's side of the handshake. `keys`: each launcher's number and key.
pub struct Listener {
    keys: Arc<[(u32, Key)]>,
    launcher: Option<u32>,
    introduction: Option<Introduction>,
    step: Option<Step>,
    received: Vec<u8>,
    /// Bytes that have arrived in all.
    count: usize,
}

/// An authenticated dialer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialled {
    /// The number of the launcher whose key the dialer has.
    pub launcher: u32,
    /// What the dialer says of itself.
    pub introduction: Introduction,
}

impl Listener {
    /// Waits for the first bytes of a connection.
    pub fn new(keys: Arc<[(u32, Key)]>) -> Listener {
        Listener {
            keys,
            launcher: None,
            introduction: None,
            step: None,
            received: Vec::new(),
            count: 0,
        }
    }

    /// Takes the next bytes, and appends the bytes to send to `out`. Returns who dialled once it is
    /// authenticated.
    ///
    /// # Errors
    /// When the other side does not have a launcher's key.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Option<Dialled>, NoiseError> {
        self.count += bytes.len();
        if self.count > MAX_UNAUTHENTICATED {
            return Err(TOO_LONG);
        }
        self.received.extend_from_slice(bytes);
        let step = match self.step.take() {
            Some(step) => step,
            None => match self.open()? {
                Some(step) => step,
                None => return Ok(None),
            },
        };
        let mut transport = match step {
            Step::Hands(mut hands) => {
                let message = take_message(&mut self.received, |message, content| {
                    hands.read_message(message, content)
                })?;
                let Some(message) = message else {
                    self.step = Some(Step::Hands(hands));
                    return Ok(None);
                };
                self.introduction = Some(Introduction::decode(&message).ok_or(NOT_OURS)?);
                push_message(out, &[], |content, message| {
                    hands.write_message(content, message)
                })?;
                hands.into_transport_mode().map_err(other)?
            }
            Step::Transport(transport) => transport,
            Step::Failed => return Err(OUT_OF_ORDER),
        };
        // From here on, an error leaves the step failed.
        self.step = Some(Step::Failed);
        let message = take_message(&mut self.received, |message, content| {
            transport.read_message(message, content)
        })?;
        let Some(message) = message else {
            self.step = Some(Step::Transport(transport));
            return Ok(None);
        };
        // Nothing may follow before the verdict.
        if message != READY || !self.received.is_empty() {
            return Err(NOT_OURS);
        }
        let (Some(launcher), Some(introduction)) = (self.launcher, self.introduction.clone())
        else {
            return Err(OUT_OF_ORDER);
        };
        self.step = Some(Step::Transport(transport));
        Ok(Some(Dialled {
            launcher,
            introduction,
        }))
    }

    /// Reads the opening. `None`: it has not arrived yet.
    fn open(&mut self) -> Result<Option<Step>, NoiseError> {
        let begun = self.received.len().min(OPENING.len());
        if self.received[..begun] != OPENING[..begun] {
            self.step = Some(Step::Failed);
            return Err(NOT_OURS);
        }
        let Some(prefix) = self.received.get(..PREFIX) else {
            return Ok(None);
        };
        let launcher = prefix[OPENING.len()..].try_into().map(u32::from_le_bytes);
        let launcher = launcher.map_err(|_| NOT_OURS)?;
        self.step = Some(Step::Failed);
        let key = self.keys.iter().find(|(number, _)| *number == launcher);
        let (_, key) = key.ok_or(NOT_AUTHENTIC)?;
        let hands = builder(key, prefix)?.build_responder().map_err(other)?;
        self.received.drain(..PREFIX);
        self.launcher = Some(launcher);
        self.step = None;
        Ok(Some(Step::Hands(Box::new(hands))))
    }

    /// Appends the verdict to `out`, and returns the connection. Once [`Listener::feed`] has said who dialled.
    ///
    /// # Errors
    /// When the handshake is not complete.
    pub fn finish(self, verdict: &Verdict, out: &mut Vec<u8>) -> Result<Transport, NoiseError> {
        let Some(Step::Transport(mut state)) = self.step else {
            return Err(OUT_OF_ORDER);
        };
        push_message(out, &verdict.encode(), |content, message| {
            state.write_message(content, message)
        })?;
        Ok(Transport { state })
    }
}

/// Both directions of an authenticated connection.
pub struct Transport {
    state: TransportState,
}

/// The result of [`Transport::open`].
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// No complete message is there.
    Incomplete,
    /// A message of these many bytes was opened: its content was appended.
    Content(usize),
    /// A message of these many bytes was opened: it ends the direction.
    End(usize),
}

impl Transport {
    /// Appends the sealed content, which is at most [`MAX_CONTENT`] bytes; empty content ends the direction.
    ///
    /// # Errors
    /// When the content is too long, or 2^64 messages have been sent.
    pub fn seal(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        push_message(out, content, |content, message| {
            self.state.write_message(content, message)
        })
    }

    /// Opens the first message in `bytes`, and appends its content to `out`.
    ///
    /// # Errors
    /// When somebody has changed, left out or repeated bytes.
    pub fn open(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Opened, NoiseError> {
        let Some((message, taken)) = split_message(bytes) else {
            return Ok(Opened::Incomplete);
        };
        let start = out.len();
        out.resize(start + message.len(), 0);
        let opened = self.state.read_message(message, &mut out[start..]);
        out.truncate(start + *opened.as_ref().unwrap_or(&0));
        match opened.map_err(other)? {
            0 => Ok(Opened::End(taken)),
            _ => Ok(Opened::Content(taken)),
        }
    }
}

#[cfg(test)]
mod tests;
