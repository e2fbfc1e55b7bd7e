//! The payload of a record with several results: a list, in R's serialization.

/// Collects the results. The caller appends each as an item of R's serialization, which refers to no item before it
/// but by [`ListPayload::names_symbol`].
#[derive(Debug, Default)]
pub struct ListPayload {
    /// The elements, from 1.
    pub elements: Vec<u32>,
    /// The items.
    pub items: Vec<u8>,
    /// Whether an item has used the symbol `names`.
    has_names: bool,
}

/// Words of R's serialization format (serialize.c).
mod word {
    pub const LIST: u32 = 19;
    pub const SYMBOL: u32 = 1;
    pub const REFERENCE: u32 = 255;
    pub const ASCII_STRING: u32 = 9 | 64 << 12;
}

impl ListPayload {
    /// Appends the symbol `names`, or a reference to it.
    pub fn names_symbol(&mut self) {
        if std::mem::replace(&mut self.has_names, true) {
            // The symbol is the first object of the stream that can be referred to.
            self.word(1 << 8 | word::REFERENCE);
        } else {
            self.word(word::SYMBOL);
            self.word(word::ASCII_STRING);
            self.word(5);
            self.items.extend_from_slice(b"names");
        }
    }

    /// Appends a word.
    pub fn word(&mut self, word: u32) {
        self.items.extend_from_slice(&word.to_ne_bytes());
    }

    /// Marks a position, for [`ListPayload::restore`].
    pub fn mark(&self) -> (usize, bool) {
        (self.items.len(), self.has_names)
    }

    /// Drops what was appended after the mark.
    pub fn restore(&mut self, (len, has_names): (usize, bool)) {
        self.items.truncate(len);
        self.has_names = has_names;
    }

    /// Bytes of the payload that precede the items. `r_version`: as `R_VERSION` of R's C API.
    pub fn head(&self, r_version: u32) -> Vec<u8> {
        let mut out = b"B\n".to_vec();
        let encoding = b"UTF-8";
        // Version 3 of the format, which R reads since version 3.5.0.
        for word in [3, r_version, 3 << 16 | 5 << 8, encoding.len() as u32] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        out.extend_from_slice(encoding);
        for word in [word::LIST, self.elements.len() as u32] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        out
    }
}
