//! Texts of bounded length.

/// Maximum length of the message of an error in a message to the head, in bytes.
pub const MAX_ERROR: usize = 1000;

/// The beginning of a text: at most this many bytes.
pub fn beginning(text: &str, max_bytes: usize) -> &str {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

/// The end of a text: at most this many bytes.
pub fn end(text: &str, max_bytes: usize) -> &str {
    let mut start = text.len().saturating_sub(max_bytes);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut() {
        assert_eq!((beginning("aé", 2), beginning("aé", 3)), ("a", "aé"));
        assert_eq!((end("éa", 2), end("éa", 3)), ("a", "éa"));
        assert_eq!((beginning("é", 0), end("é", 0), end("", 5)), ("", "", ""));
    }
}
