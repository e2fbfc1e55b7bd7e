//! Results in the form in which a run stores them: R's own serialization.

use super::batch;
use super::stream::Source;
use extendr_ffi::SEXPTYPE;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::store::{Item, ListPayload};

/// Words of R's serialization format (serialize.c): types of items, flags, and the bits of a string's encoding.
mod word {
    pub const NIL: u32 = 254;
    pub const PAIRLIST: u32 = 2;
    pub const STRING: u32 = 9;
    pub const HAS_ATTRIBUTES: u32 = 1 << 9;
    pub const HAS_TAG: u32 = 1 << 10;
    pub const LEVELS: u32 = 12;
    pub const BYTES: u32 = 1 << 1;
    pub const LATIN1: u32 = 1 << 2;
    pub const UTF8: u32 = 1 << 3;
    pub const ASCII: u32 = 1 << 6;
}

/// Maximum depth of nested lists: see [`super::plain`].
const DEPTH: u32 = 17;

/// A result of a batch.
pub enum Stored {
    /// A value in the form of [`super::plain`].
    Plain(Body),
    /// A value in R's serialization.
    Serialized(Body),
    /// The worker has saved the value in the directory of the run.
    InRun,
}

/// Takes the next result off the front of an answer to a batch with [`batch::STORED`]. Returns also whether it is an
/// error, or `None` if the answer is damaged.
pub fn take_result(body: &mut Body) -> Option<(Stored, bool)> {
    let [outcome, kind] = front(body)?;
    let stored = match kind {
        batch::PLAIN => {
            let length = u32::from_ne_bytes(front(body)?);
            Stored::Plain(body.split_front(length as usize)?)
        }
        batch::SIZED => {
            let length = u64::from_ne_bytes(front(body)?);
            Stored::Serialized(body.split_front(usize::try_from(length).ok()?)?)
        }
        // The last result extends to the end of the answer.
        batch::SERIALIZED => Stored::Serialized(std::mem::take(body)),
        batch::IN_RUN => Stored::InRun,
        _ => return None,
    };
    Some((stored, outcome == batch::ERROR))
}

fn front<const N: usize>(body: &mut Body) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    body.fill(&mut bytes).then_some(bytes)
}

/// Returns the records of the results of a batch, each with its element, or `None` if they are damaged.
pub fn items_of(mut results: Body, elements: &[u32]) -> Option<Vec<Item>> {
    let mut list = ListPayload::default();
    let mut items = Vec::new();
    for &element in elements {
        let (stored, failed) = take_result(&mut results)?;
        match stored {
            Stored::Plain(mut plain) => {
                plain.join();
                append_plain(plain.whole().unwrap_or_default(), &mut list)?;
                list.elements.push(element);
            }
            Stored::Serialized(body) => items.push(Item::Value {
                element,
                failed,
                body,
            }),
            Stored::InRun => return None,
        }
    }
    if !list.elements.is_empty() {
        items.push(Item::List(list));
    }
    Some(items)
}

/// Returns the results of a batch without the values, which are in the directory of the run. Errors stay.
pub fn without_values(mut results: Body, count: usize) -> Option<Body> {
    let mut out = Vec::new();
    for _ in 0..count {
        let mut result = results.clone();
        let (_, failed) = take_result(&mut results)?;
        if failed {
            let result = result.split_front(result.len - results.len)?;
            for chunk in &result.chunks {
                out.extend_from_slice(chunk);
            }
        } else {
            out.extend_from_slice(&[batch::VALUE, batch::IN_RUN]);
        }
    }
    Some(Body::from_bytes(out))
}

/// Appends a plain value to a list. Returns `None` if the bytes are damaged; the list is then unchanged.
pub fn append_plain(bytes: &[u8], list: &mut ListPayload) -> Option<()> {
    let mark = list.mark();
    let mut rest = bytes;
    let appended = append(&mut rest, list, DEPTH).filter(|()| rest.is_empty());
    if appended.is_none() {
        list.restore(mark);
    }
    appended
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (now, later) = bytes.split_at_checked(count)?;
    *bytes = later;
    Some(now)
}

fn number(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes, 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn append(bytes: &mut &[u8], list: &mut ListPayload, depth: u32) -> Option<()> {
    const NAMED: u8 = 0x80;
    const LOGICAL: u8 = SEXPTYPE::LGLSXP as u8;
    const INTEGER: u8 = SEXPTYPE::INTSXP as u8;
    const REAL: u8 = SEXPTYPE::REALSXP as u8;
    const RAW: u8 = SEXPTYPE::RAWSXP as u8;
    const STRINGS: u8 = SEXPTYPE::STRSXP as u8;
    const LIST: u8 = SEXPTYPE::VECSXP as u8;
    let code = *take(bytes, 1)?.first()?;
    if code == SEXPTYPE::NILSXP as u8 {
        list.word(word::NIL);
        return Some(());
    }
    let (kind, is_named) = (code & !NAMED, code & NAMED != 0);
    let length = number(bytes)?;
    let attributes = if is_named { word::HAS_ATTRIBUTES } else { 0 };
    list.word(u32::from(kind) | attributes);
    list.word(length);
    let size = match kind {
        LOGICAL | INTEGER => 4,
        REAL => 8,
        RAW => 1,
        STRINGS => {
            for _ in 0..length {
                append_string(bytes, list)?;
            }
            0
        }
        LIST => {
            let depth = depth.checked_sub(1)?;
            for _ in 0..length {
                append(bytes, list, depth)?;
            }
            0
        }
        _ => return None,
    };
    let data = take(bytes, (length as usize).checked_mul(size)?)?;
    list.items.extend_from_slice(data);
    if is_named {
        list.word(word::PAIRLIST | word::HAS_TAG);
        list.names_symbol();
        append(bytes, list, 0)?;
        list.word(word::NIL);
    }
    Some(())
}

fn append_string(bytes: &mut &[u8], list: &mut ListPayload) -> Option<()> {
    let length = number(bytes)?;
    if length == u32::MAX {
        // NA_character_
        list.word(word::STRING);
        list.word(length);
        return Some(());
    }
    let encoding = *take(bytes, 1)?.first()?;
    let text = take(bytes, length as usize)?;
    let ascii = if text.is_ascii() { word::ASCII } else { 0 };
    // R's `cetype_t`, as in `plain`.
    let levels = match encoding {
        1 => word::UTF8,
        2 => word::LATIN1,
        3 => word::BYTES | ascii,
        _ => ascii,
    };
    list.word(word::STRING | levels << word::LEVELS);
    list.word(length);
    list.items.extend_from_slice(text);
    Some(())
}
