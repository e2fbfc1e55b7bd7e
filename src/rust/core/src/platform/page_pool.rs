//! Bytes that have pages of their own, and go back to the system with them.

use bytes::Bytes;
use memmap2::MmapMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most bytes that get pages of their own.
pub const ROOM: usize = 64 * 1024;

/// Bodies from here on have pages of their own.
const PAGED: usize = 32 * 1024;

/// Results wait in bodies by the thousand, made by one thread and dropped by another. Those that are
/// not small are mapped, so that their memory goes back to the system with them: in malloc's arenas,
/// one for each thread, twice the limit was seen in use, and much of it kept for ever.
pub fn copy(bytes: &[u8]) -> Bytes {
    if bytes.len() >= PAGED {
        if let Some(pages) = Pages::holding(bytes) {
            return Bytes::from_owner(pages);
        }
    }
    Bytes::copy_from_slice(bytes)
}

/// Bodies that have pages of their own at a time. A process may have only so many mappings
/// (vm.max_map_count, 65,530 by default).
const MAX_PAGED: usize = 16 * 1024;
static PAGED_NOW: AtomicUsize = AtomicUsize::new(0);

/// Room for one body.
struct Pages {
    /// There until it is dropped.
    room: Option<MmapMut>,
    len: usize,
}

/// Room that is not in use: what is taken by the next bodies is in the processor's caches, and the
/// system need not clear it.
static FREE: Mutex<Vec<MmapMut>> = Mutex::new(Vec::new());
/// Bodies that there is such room for.
const MAX_FREE: usize = 128;

impl Pages {
    /// None if there is no memory, or there are too many.
    fn holding(bytes: &[u8]) -> Option<Pages> {
        if PAGED_NOW.load(Ordering::Relaxed) >= MAX_PAGED {
            return None;
        }
        // Whoever does not get the lock at once goes without: it may be a fork, and its owner not exist.
        let free = FREE.try_lock().ok().and_then(|mut free| free.pop());
        let mut room = free.or_else(|| MmapMut::map_anon(ROOM).ok())?;
        room.get_mut(..bytes.len())?.copy_from_slice(bytes);
        PAGED_NOW.fetch_add(1, Ordering::Relaxed);
        Some(Pages {
            room: Some(room),
            len: bytes.len(),
        })
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        self.room.as_deref().map_or(&[], |room| &room[..self.len])
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        PAGED_NOW.fetch_sub(1, Ordering::Relaxed);
        if let (Some(room), Ok(mut free)) = (self.room.take(), FREE.try_lock()) {
            if free.len() < MAX_FREE {
                free.push(room);
            }
        }
    }
}
