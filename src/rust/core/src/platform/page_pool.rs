//! Buffers with memory pages of their own, which return to the system when the buffer is dropped.

use bytes::Bytes;
use memmap2::MmapMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Maximum size of a buffer that gets pages of its own.
pub const ROOM: usize = 64 * 1024;

/// Minimum size of a buffer that gets pages of its own.
const MIN_PAGED: usize = 32 * 1024;

/// Copies bytes into a buffer, which has pages of its own unless it is small.
///
/// Results wait in buffers by the thousand, made by one thread and dropped by another. Buffers that are not
/// small are mapped, so that their memory returns to the system with them. In malloc's arenas, one for each
/// thread, results were seen to occupy twice the limit, and much of that memory was never returned.
pub fn copy(bytes: &[u8]) -> Bytes {
    if bytes.len() >= MIN_PAGED {
        if let Some(pages) = Pages::copy_of(bytes) {
            return Bytes::from_owner(pages);
        }
    }
    Bytes::copy_from_slice(bytes)
}

/// Maximum number of buffers with pages of their own at a time. The system limits the mappings of a process
/// (vm.max_map_count, 65,530 by default).
const MAX_PAGED: usize = 16 * 1024;
static PAGED_NOW: AtomicUsize = AtomicUsize::new(0);

/// The pages of one buffer.
struct Pages {
    /// The mapping; `None` only while it is being dropped.
    room: Option<MmapMut>,
    len: usize,
}

/// Mappings that are not in use. The next buffers reuse them, because their pages are in the processor's
/// caches and the system need not clear them.
static FREE: Mutex<Vec<MmapMut>> = Mutex::new(Vec::new());
/// Maximum number of unused mappings.
const MAX_FREE: usize = 128;

impl Pages {
    /// Copies bytes into pages. `None` if there is no memory or there are too many mappings.
    fn copy_of(bytes: &[u8]) -> Option<Pages> {
        if PAGED_NOW.load(Ordering::Relaxed) >= MAX_PAGED {
            return None;
        }
        // Never wait for the lock: in a forked process, the thread that holds it may not exist.
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
