//! Writes JSON.

use std::fmt::Write;

/// A JSON text that is being written. The caller opens and closes objects and arrays in order.
#[derive(Debug, Default)]
pub struct Json {
    text: String,
    /// A value precedes in the current object or array.
    follows: bool,
}

impl Json {
    fn comma(&mut self) {
        if std::mem::replace(&mut self.follows, true) {
            self.text.push(',');
        }
    }

    /// Writes the name of the next value of an object.
    pub fn name(&mut self, name: &str) -> &mut Json {
        self.comma();
        self.quote(name);
        self.text.push(':');
        self.follows = false;
        self
    }

    /// Opens an object (`{`) or an array (`[`).
    pub fn open(&mut self, bracket: char) -> &mut Json {
        self.comma();
        self.text.push(bracket);
        self.follows = false;
        self
    }

    /// Closes an object (`}`) or an array (`]`).
    pub fn close(&mut self, bracket: char) -> &mut Json {
        self.text.push(bracket);
        self.follows = true;
        self
    }

    /// Writes a text.
    pub fn text(&mut self, text: &str) -> &mut Json {
        self.comma();
        self.quote(text);
        self
    }

    /// Writes a text, or `null`.
    pub fn some_text(&mut self, text: Option<&str>) -> &mut Json {
        match text {
            Some(text) => self.text(text),
            None => self.null(),
        }
    }

    /// Writes a whole number.
    pub fn number(&mut self, number: u64) -> &mut Json {
        self.comma();
        let _ = write!(self.text, "{number}");
        self
    }

    /// Writes a whole number, or `null`.
    pub fn some_number(&mut self, number: Option<u64>) -> &mut Json {
        match number {
            Some(number) => self.number(number),
            None => self.null(),
        }
    }

    /// Writes a number with three digits after the point.
    pub fn decimal(&mut self, number: f64) -> &mut Json {
        self.comma();
        let _ = match number.is_finite() {
            true => write!(self.text, "{number:.3}"),
            false => write!(self.text, "null"),
        };
        self
    }

    /// Writes `true` or `false`.
    pub fn flag(&mut self, flag: bool) -> &mut Json {
        self.comma();
        self.text.push_str(if flag { "true" } else { "false" });
        self
    }

    /// Writes `null`.
    pub fn null(&mut self) -> &mut Json {
        self.comma();
        self.text.push_str("null");
        self
    }

    /// The text that has been written.
    pub fn finish(self) -> String {
        self.text
    }

    fn quote(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                // Also what ends a line in JavaScript, and what could end a script in HTML.
                '\0'..='\u{1f}' | '<' | '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' => {
                    let _ = write!(self.text, "\\u{:04x}", u32::from(character));
                }
                _ => self.text.push(character),
            }
        }
        self.text.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_separated_and_nested() {
        let mut json = Json::default();
        json.open('{');
        json.name("a").number(1);
        json.name("b").open('[');
        json.text("x").null().flag(true).decimal(0.5);
        json.open('[').close(']');
        json.close(']');
        json.name("c").decimal(f64::NAN);
        json.name("d").some_text(None);
        json.name("e").some_number(Some(2));
        json.close('}');
        let written = json.finish();
        assert_eq!(
            written,
            r#"{"a":1,"b":["x",null,true,0.500,[]],"c":null,"d":null,"e":2}"#
        );
    }

    #[test]
    fn texts_of_workers_cannot_end_the_text() {
        let mut json = Json::default();
        json.text("a\"b\\c\n\u{0}\u{1b}</script>\u{2028}é");
        let quoted = json.finish();
        assert_eq!(
            quoted,
            "\"a\\\"b\\\\c\\n\\u0000\\u001b\\u003c/script>\\u2028é\""
        );
    }
}
