//! The memory of blobs: files without a name that exist in memory only, that workers map, and that
//! nobody can change once they are complete.
//!
//! Where the system refuses such a file, or one of that size (a limit of file sizes or open files),
//! the agent keeps the bytes itself and sends each worker a copy.

use crate::platform::{limits, memfd};
use crate::protocol::ids::BlobId;
use bytes::Bytes;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Number by which the limit of open files is raised when it is reached.
const BLOB_FILES: u64 = 1024;

/// Bytes of a blob that are read back at a time. They fit into a frame.
const BLOB_CHUNK: usize = crate::protocol::frame::MAX_BODY;

/// Where the bytes of a blob are.
#[derive(Debug)]
pub enum BlobMemory {
    /// In memory that workers can map.
    Shared(Arc<File>),
    /// In the agent's own memory, in chunks that each fit into a frame.
    Private(Vec<Bytes>),
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Memories(HashMap<BlobId, BlobMemory>);

impl Memories {
    /// Appends bytes, which fit into a frame, to a blob's memory. After the `last` ones nobody can
    /// change it any more.
    ///
    /// # Errors
    /// When the system has no memory left.
    pub fn store(&mut self, blob: BlobId, bytes: Bytes, last: bool) -> io::Result<()> {
        let memory = self.0.entry(blob).or_insert_with(|| match new() {
            Ok(file) => BlobMemory::Shared(Arc::new(file)),
            Err(_) => BlobMemory::Private(Vec::new()),
        });
        if let BlobMemory::Shared(file) = memory {
            let before = file.metadata()?.len();
            let written = (&**file).write_all(&bytes);
            if written
                .and_then(|()| if last { memfd::seal(file) } else { Ok(()) })
                .is_ok()
            {
                return Ok(());
            }
            *memory = BlobMemory::Private(read_back(file, before)?);
        }
        if let BlobMemory::Private(chunks) = memory {
            chunks.push(bytes);
        }
        Ok(())
    }

    /// The memory of a blob.
    pub fn get(&self, blob: BlobId) -> Option<&BlobMemory> {
        self.0.get(&blob)
    }

    /// The bytes of a blob, in chunks that each fit into a frame. `None` if there is no such blob, or no memory for its
    /// bytes.
    pub fn chunks(&self, blob: BlobId) -> Option<Vec<Bytes>> {
        match self.get(blob)? {
            BlobMemory::Shared(file) => read_all(file).ok(),
            BlobMemory::Private(chunks) => Some(chunks.clone()),
        }
    }

    /// Frees a blob. The system reclaims its memory once no worker maps it any more.
    pub fn discard(&mut self, blob: BlobId) {
        self.0.remove(&blob);
    }
}

fn new() -> io::Result<File> {
    match memfd::memory_file() {
        Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
            let now = limits::raise_open_files(0)?;
            limits::raise_open_files(now.saturating_add(BLOB_FILES))?;
            memfd::memory_file()
        }
        made => made,
    }
}

/// The bytes of a file, in chunks that each fit into a frame.
pub(super) fn read_all(file: &File) -> io::Result<Vec<Bytes>> {
    read_back(file, file.metadata()?.len())
}

/// The first `len` bytes of a file, in chunks.
fn read_back(file: &File, len: u64) -> io::Result<Vec<Bytes>> {
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < len {
        let size = (len - at).min(BLOB_CHUNK as u64);
        let mut chunk = Vec::new();
        chunk.try_reserve_exact(size as usize)?;
        chunk.resize(size as usize, 0);
        file.read_exact_at(&mut chunk, at)?;
        at += size;
        chunks.push(chunk.into());
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom};

    #[test]
    fn a_stored_blob_is_complete_and_sealed() {
        let mut memories = Memories::default();
        memories.store(3, "one ".into(), false).unwrap();
        memories.store(4, "other".into(), false).unwrap();
        memories.store(3, "two".into(), true).unwrap();
        let Some(BlobMemory::Shared(file)) = memories.get(3) else {
            panic!("{memories:?}");
        };
        let file = file.clone();
        assert!((&*file).write_all(b"more").is_err());
        memories.discard(3);
        assert!(memories.get(3).is_none() && memories.get(4).is_some());
        let mut text = String::new();
        (&*file).seek(SeekFrom::Start(0)).unwrap();
        (&*file).read_to_string(&mut text).unwrap();
        assert!(text.starts_with("one two"));
    }

    #[test]
    fn a_blob_that_cannot_be_shared_completely_is_copied() {
        let mut memories = Memories::default();
        let bytes = Bytes::from(vec![7; BLOB_CHUNK]);
        memories.store(1, bytes.clone(), false).unwrap();
        memories.store(1, "tail".into(), false).unwrap();
        let Some(BlobMemory::Shared(file)) = memories.get(1) else {
            panic!("{memories:?}");
        };
        // The seal prevents the file from growing, like a file size limit.
        memfd::seal(file).unwrap();
        memories.store(1, "more".into(), false).unwrap();
        memories.store(1, "end".into(), true).unwrap();
        let Some(BlobMemory::Private(chunks)) = memories.get(1) else {
            panic!("{memories:?}");
        };
        assert_eq!(chunks, &[bytes, "tail".into(), "more".into(), "end".into()]);
    }
}
