//! The bytes of a file of records. All numbers are in the byte order of the machine that wrote the file.
//!
//! A file starts with a head of [`FILE_HEAD`] bytes: [`FILE_MAGIC`], then the id of the run (16 hexadecimal digits).
//! Records follow. A record is a head of [`RECORD_HEAD`] bytes, the numbers of its elements (32-bit integers, from 1),
//! and the payload.
//!
//! | byte | what |
//! |---|---|
//! | 0 | [`RECORD_MAGIC`] |
//! | 4 | 32-bit integer: kind, 1 for a list with the result of each element, 2 for one result |
//! | 8 | 32-bit integer: number of elements |
//! | 12 | 32-bit integer: 1 if the result is an error, else 0 |
//! | 16 | double: bytes of the payload |
//! | 24 | double: bytes of the file that were durable when the record was written |
//! | 32 | double: when the record was written, in seconds since 1970-01-01 UTC |
//! | 40 | XXH3 (128 bits) of the payload |
//! | 56 | XXH3 (64 bits) of the bytes before, and of the numbers of the elements |
//!
//! The payload is in R's serialization format, version 3, binary.

use xxhash_rust::xxh3::Xxh3;

/// The first bytes of a file.
pub const FILE_MAGIC: [u8; 16] = *b"rustcluster-run\n";
/// Bytes of the head of a file.
pub const FILE_HEAD: usize = 32;
/// The first bytes of a record.
pub const RECORD_MAGIC: [u8; 4] = *b"RCR1";
/// Bytes of the head of a record.
pub const RECORD_HEAD: usize = 64;

/// The id of a run.
pub type RunId = [u8; 16];

/// What the payload of a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A list with the result of each element.
    List,
    /// The result of the only element.
    Value,
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecordHead {
    /// What the payload is.
    pub kind: Kind,
    /// Number of elements.
    pub count: u32,
    /// The result is an error.
    pub failed: bool,
    /// Bytes of the payload.
    pub length: u64,
    /// Bytes of the file that were durable when the record was written.
    pub durable: u64,
    /// When the record was written, in seconds since 1970-01-01 UTC.
    pub at: f64,
    /// The hash of the payload.
    pub digest: u128,
}

/// Returns the head of a file.
pub fn file_head(run: RunId) -> [u8; FILE_HEAD] {
    let mut head = [0; FILE_HEAD];
    head[..16].copy_from_slice(&FILE_MAGIC);
    head[16..].copy_from_slice(&run);
    head
}

/// Returns the numbers of elements as bytes.
pub fn numbers(elements: &[u32]) -> Vec<u8> {
    elements.iter().flat_map(|n| n.to_ne_bytes()).collect()
}

fn seal(head: &[u8], numbers: &[u8]) -> [u8; 8] {
    let mut hash = Xxh3::new();
    hash.update(head);
    hash.update(numbers);
    hash.digest().to_ne_bytes()
}

impl RecordHead {
    /// Returns the head as bytes. `numbers`: see [`numbers`].
    pub fn encode(&self, numbers: &[u8]) -> [u8; RECORD_HEAD] {
        let mut out = [0; RECORD_HEAD];
        out[..4].copy_from_slice(&RECORD_MAGIC);
        let kind: u32 = match self.kind {
            Kind::List => 1,
            Kind::Value => 2,
        };
        out[4..8].copy_from_slice(&kind.to_ne_bytes());
        out[8..12].copy_from_slice(&self.count.to_ne_bytes());
        out[12..16].copy_from_slice(&u32::from(self.failed).to_ne_bytes());
        out[16..24].copy_from_slice(&(self.length as f64).to_ne_bytes());
        out[24..32].copy_from_slice(&(self.durable as f64).to_ne_bytes());
        out[32..40].copy_from_slice(&self.at.to_ne_bytes());
        out[40..56].copy_from_slice(&self.digest.to_ne_bytes());
        let seal = seal(&out[..56], numbers);
        out[56..].copy_from_slice(&seal);
        out
    }

    /// Parses a head. Its seal has to be checked by [`RecordHead::is_sealed`], once the numbers of the elements have
    /// been read.
    pub fn decode(bytes: &[u8; RECORD_HEAD]) -> Option<RecordHead> {
        let int = |at: usize| {
            let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_ne_bytes(bytes))
        };
        let double = |at: usize| {
            let bytes = bytes.get(at..at + 8)?.try_into().ok()?;
            Some(f64::from_ne_bytes(bytes))
        };
        let whole = |at: usize| {
            double(at)
                .filter(|n| (0.0..=9e15).contains(n))
                .map(|n| n as u64)
        };
        let kind = match int(4)? {
            1 => Kind::List,
            2 => Kind::Value,
            _ => return None,
        };
        (bytes[..4] == RECORD_MAGIC).then_some(RecordHead {
            kind,
            count: int(8)?,
            failed: int(12)? != 0,
            length: whole(16)?,
            durable: whole(24)?,
            at: double(32)?,
            digest: u128::from_ne_bytes(bytes[40..56].try_into().ok()?),
        })
    }

    /// Whether these are the bytes of a head and of its elements, unchanged.
    pub fn is_sealed(head: &[u8; RECORD_HEAD], numbers: &[u8]) -> bool {
        seal(&head[..56], numbers) == head[56..]
    }

    /// Bytes of the numbers of the elements.
    pub fn numbers_length(&self) -> u64 {
        4 * u64::from(self.count)
    }

    /// Bytes of the whole record.
    pub fn size(&self) -> u64 {
        RECORD_HEAD as u64 + self.numbers_length() + self.length
    }
}
