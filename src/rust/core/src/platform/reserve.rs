//! A memory reserve, from which a process can continue when the system gives it no more memory.
//!
//! Rust aborts a process that cannot allocate, so a result that does not fit into memory would end the
//! user's session. With [`Reserving`] as the allocator, the first allocation that fails is made from the
//! reserve. A receiver checks [`was_used`] before every read, and drops the message that takes the memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// Size of the reserve. The reserve is larger than what is allocated between two checks of [`was_used`],
/// including the messages that wait to be sent.
const BYTES: usize = 16 << 20;

/// Maximum size of an allocation from the reserve. A larger allocation fails, because the reserve must also
/// cover the allocations that follow.
const MAX_SPARE_ALLOCATION: usize = BYTES / 4;

static RESERVE: AtomicPtr<u8> = AtomicPtr::new(null_mut());
static USED: AtomicBool = AtomicBool::new(false);

/// The system's allocator, with the reserve as a fallback.
pub struct Reserving;

impl Reserving {
    fn retry(layout: Layout, failed: *mut u8, allocate: impl FnOnce() -> *mut u8) -> *mut u8 {
        if !failed.is_null() || layout.size() > MAX_SPARE_ALLOCATION || !release() {
            return failed;
        }
        USED.store(true, Ordering::Relaxed);
        allocate()
    }
}

// SAFETY: all memory comes from the system allocator. Each call is passed on to it once, or twice if the
// first call failed and therefore changed nothing.
unsafe impl GlobalAlloc for Reserving {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let allocate = || unsafe { System.alloc(layout) };
        Reserving::retry(layout, allocate(), allocate)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let allocate = || unsafe { System.alloc_zeroed(layout) };
        Reserving::retry(layout, allocate(), allocate)
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's.
        let allocate = || unsafe { System.realloc(at, layout, size) };
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return null_mut();
        };
        Reserving::retry(wanted, allocate(), allocate)
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Maps the reserve unless it is already mapped. Nothing is written to the reserve, so it takes only address
/// space.
pub fn hold() {
    if !RESERVE.load(Ordering::Relaxed).is_null() {
        return;
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
    // SAFETY: creates a new mapping, to which no other pointer exists.
    let at = unsafe { libc::mmap(null_mut(), BYTES, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return;
    }
    let stored =
        RESERVE.compare_exchange(null_mut(), at.cast(), Ordering::Relaxed, Ordering::Relaxed);
    if stored.is_err() {
        // SAFETY: unmaps the mapping above, which nothing uses.
        unsafe { libc::munmap(at, BYTES) };
    }
}

/// Returns the reserve to the system. Returns whether there was a reserve.
pub fn release() -> bool {
    let at = RESERVE.swap(null_mut(), Ordering::Relaxed);
    if at.is_null() {
        return false;
    }
    // SAFETY: unmaps the mapping made by `hold`; the swap removed the only pointer to it.
    unsafe { libc::munmap(at.cast(), BYTES) };
    true
}

/// Whether the reserve has been used since the last call. The reserve is mapped again as soon as there is
/// memory for it.
pub fn was_used() -> bool {
    if !RESERVE.load(Ordering::Relaxed).is_null() {
        return false;
    }
    let used = USED.swap(false, Ordering::Relaxed);
    if !used {
        hold();
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_allocation_is_retried_once_from_the_reserve() {
        hold();
        let layout = |bytes| Layout::from_size_align(bytes, 8).unwrap();
        let mut tries = 0;
        let made = Reserving::retry(layout(64), null_mut(), || {
            tries += 1;
            8 as *mut u8
        });
        assert_eq!((made as usize, tries), (8, 1));
        assert!(was_used() && !was_used());
        // There is a reserve again. An allocation that does not fit into it leaves it mapped.
        let made = Reserving::retry(layout(BYTES), null_mut(), || unreachable!());
        assert!(made.is_null() && !was_used());
        assert!(release() && !release());
        // Without a reserve, the allocation is not retried.
        let made = Reserving::retry(layout(64), null_mut(), || unreachable!());
        assert!(made.is_null());
    }
}
