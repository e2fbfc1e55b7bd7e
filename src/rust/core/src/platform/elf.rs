//! Finds out from the names in a shared object whether its code may read a source of randomness or of process
//! identity, for example to seed a generator.

/// Functions that read random bytes, the clock or the process id, run at a fork, or name files in R's
/// temporary directory.
const SOURCES: [&str; 14] = [
    "getrandom",
    "getentropy",
    "arc4random",
    "arc4random_buf",
    "arc4random_uniform",
    "time",
    "gettimeofday",
    "clock_gettime",
    "getpid",
    "pthread_atfork",
    "__register_atfork",
    "R_TempDir",
    "R_tmpnam",
    "R_tmpnam2",
];

/// Parts of the mangled names of C++ functions that do the same as [`SOURCES`].
const PARTS: [&str; 2] = ["random_device", "clock3now"];

/// Random devices, which code opens by name.
const DEVICES: [&[u8]; 2] = [b"/dev/urandom", b"/dev/random"];

const UNDEFINED: u64 = 0;
const DYNAMIC_SYMBOLS: u64 = 11;

/// An ELF file. Its header says how wide its numbers are and in which byte order they are written.
struct Elf<'a> {
    bytes: &'a [u8],
    wide: bool,
    little: bool,
}

impl<'a> Elf<'a> {
    fn open(bytes: &'a [u8]) -> Option<Elf<'a>> {
        let wide = *bytes.get(4)? == 2;
        let little = *bytes.get(5)? == 1;
        bytes.starts_with(b"\x7fELF").then_some(Elf {
            bytes,
            wide,
            little,
        })
    }

    fn number(&self, at: usize, len: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..at.checked_add(len)?)?;
        let add = |number: u64, byte: &u8| (number << 8) | u64::from(*byte);
        Some(if self.little {
            bytes.iter().rev().fold(0, add)
        } else {
            bytes.iter().fold(0, add)
        })
    }

    fn offset(&self, at: usize, len: usize) -> Option<usize> {
        usize::try_from(self.number(at, len)?).ok()
    }

    /// Offset of the header of a section.
    fn section(&self, index: usize) -> Option<usize> {
        let (table, size) = if self.wide {
            (self.offset(0x28, 8)?, self.offset(0x3a, 2)?)
        } else {
            (self.offset(0x20, 4)?, self.offset(0x2e, 2)?)
        };
        table.checked_add(index.checked_mul(size)?)
    }

    fn sections(&self) -> Option<usize> {
        self.offset(if self.wide { 0x3c } else { 0x30 }, 2)
    }

    /// The bytes of the section with this header.
    fn content(&self, header: usize) -> Option<&'a [u8]> {
        let (start, len) = if self.wide {
            (
                self.offset(header + 0x18, 8)?,
                self.offset(header + 0x20, 8)?,
            )
        } else {
            (
                self.offset(header + 0x10, 4)?,
                self.offset(header + 0x14, 4)?,
            )
        };
        self.bytes.get(start..start.checked_add(len)?)
    }

    /// The names of the symbols that the file imports.
    fn imports(&self) -> Option<Vec<&'a [u8]>> {
        let (link, size, shndx) = if self.wide {
            (0x28, 24, 6)
        } else {
            (0x18, 16, 14)
        };
        let mut names = Vec::new();
        for index in 0..self.sections()? {
            let header = self.section(index)?;
            if self.number(header.checked_add(4)?, 4)? != DYNAMIC_SYMBOLS {
                continue;
            }
            let strings = self.content(self.section(self.offset(header + link, 4)?)?)?;
            let table = Elf {
                bytes: self.content(header)?,
                ..*self
            };
            for symbol in 0..table.bytes.len() / size {
                let at = symbol * size;
                if table.number(at + shndx, 2)? == UNDEFINED {
                    let name = strings.get(table.offset(at, 4)?..)?;
                    names.push(name.split(|byte| *byte == 0).next()?);
                }
            }
        }
        Some(names)
    }
}

/// Whether the code in a shared object could read a source that makes processes differ. `None` if the bytes
/// are not an ELF file or are truncated.
pub fn reads_sources(bytes: &[u8]) -> Option<bool> {
    let imports = Elf::open(bytes)?.imports()?;
    let known = |name: &[u8]| {
        let name = String::from_utf8_lossy(name);
        SOURCES.contains(&&*name) || PARTS.iter().any(|part| name.contains(part))
    };
    let device = |at: &[u8]| DEVICES.iter().any(|device| at.starts_with(device));
    let named = || {
        let slashes = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        slashes.into_iter().any(|(at, _)| device(&bytes[at..]))
    };
    Some(imports.into_iter().any(known) || named())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_of_this_program_are_found() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let imports = Elf::open(&bytes).unwrap().imports().unwrap();
        // Rust's standard library reads the time with it.
        assert!(imports.contains(&&b"clock_gettime"[..]));
        assert!(!imports.contains(&&b"arc4random"[..]));
        assert_eq!(reads_sources(&bytes), Some(true));
    }

    #[test]
    fn other_and_damaged_files_yield_none() {
        assert_eq!(reads_sources(b""), None);
        assert_eq!(reads_sources(b"#!/bin/sh\necho /dev/urandom"), None);
        let mut bytes = b"\x7fELF\x02\x01".to_vec();
        bytes.resize(64, 0xff);
        assert_eq!(reads_sources(&bytes), None);
        for len in 0..bytes.len() {
            let _ = reads_sources(&bytes[..len]);
        }
    }
}
