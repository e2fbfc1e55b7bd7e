//! The memory in which an agent shares payloads with its workers: files without a name, which the
//! system keeps in memory alone and nobody can change once they are complete.

use crate::payloads::PayloadId;
use crate::{limits, sys};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

/// Files by which the limit of open ones is raised when that is reached.
const MORE_FILES: u64 = 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Memories(HashMap<PayloadId, Arc<File>>);

impl Memories {
    /// Appends to a payload's memory; after the `last` nobody can change it any more.
    ///
    /// # Errors
    /// When the system has no memory or descriptor left.
    pub fn store(&mut self, payload: PayloadId, bytes: &[u8], last: bool) -> io::Result<()> {
        let file = match self.0.entry(payload) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(Arc::new(new()?)),
        };
        (&**file).write_all(bytes)?;
        if last { sys::seal(file) } else { Ok(()) }
    }

    /// That of a payload.
    pub fn get(&self, payload: PayloadId) -> Option<Arc<File>> {
        self.0.get(&payload).cloned()
    }

    /// A payload is not needed here any more. Its memory is the system's again once no worker has it
    /// either.
    pub fn discard(&mut self, payload: PayloadId) {
        self.0.remove(&payload);
    }
}

fn new() -> io::Result<File> {
    match sys::memory_file() {
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
            let now = limits::raise_open_files(0)?;
            limits::raise_open_files(now.saturating_add(MORE_FILES))?;
            sys::memory_file()
        }
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::io::{Seek, SeekFrom};

    #[test]
    fn what_is_stored_is_all_there_and_stays_as_it_is() {
        let mut memories = Memories::default();
        memories.store(3, b"one ", false).unwrap();
        memories.store(4, b"other", false).unwrap();
        memories.store(3, b"two", true).unwrap();
        assert_eq!(
            memories.store(3, b"more", true).is_err(),
            cfg!(target_os = "linux")
        );
        let file = memories.get(3).unwrap();
        memories.discard(3);
        assert!(memories.get(3).is_none() && memories.get(4).is_some());
        let mut text = String::new();
        (&*file).seek(SeekFrom::Start(0)).unwrap();
        (&*file).read_to_string(&mut text).unwrap();
        assert!(text.starts_with("one two"));
    }
}
