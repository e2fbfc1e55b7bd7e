//! Memory that is set progress event, to go on with when the system has no more for this process.
//!
//! Rust ends a process that cannot allocate, and so would a result that does not fit end the user's
//! session. With [`Reserving`] as the allocator, the allocation that fails first is made from the
//! reserve. Whoever receives looks at [`was_used`] before every read, and gives up what takes the memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// More than what is allocated between two looks, the messages that wait to be sent included.
const BYTES: usize = 16 << 20;

/// An allocation of more than this does not fit into the reserve with what follows it: it fails.
const MAX_SPARE_ALLOCATION: usize = BYTES / 4;

static RESERVE: AtomicPtr<u8> = AtomicPtr::new(null_mut());
static USED: AtomicBool = AtomicBool::new(false);

/// The system's allocator, and the reserve.
pub struct Reserving;

impl Reserving {
    fn again(layout: Layout, failed: *mut u8, allocate: impl FnOnce() -> *mut u8) -> *mut u8 {
        if !failed.is_null() || layout.size() > MAX_SPARE_ALLOCATION || !release() {
            return failed;
        }
        USED.store(true, Ordering::Relaxed);
        allocate()
    }
}

// SAFETY: all memory is the system allocator's, to which each call is passed on, once or, if that has
// failed and so changed nothing, twice.
unsafe impl GlobalAlloc for Reserving {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let allocate = || unsafe { System.alloc(layout) };
        Reserving::again(layout, allocate(), allocate)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let allocate = || unsafe { System.alloc_zeroed(layout) };
        Reserving::again(layout, allocate(), allocate)
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's.
        let allocate = || unsafe { System.realloc(at, layout, size) };
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else {
            return null_mut();
        };
        Reserving::again(wanted, allocate(), allocate)
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Sets the reserve progress event, if it is not. Nothing is written to it, so that it takes address space alone.
pub fn hold() {
    if !RESERVE.load(Ordering::Relaxed).is_null() {
        return;
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
    // SAFETY: a new mapping, which nobody else knows of.
    let at = unsafe { libc::mmap(null_mut(), BYTES, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return;
    }
    let held =
        RESERVE.compare_exchange(null_mut(), at.cast(), Ordering::Relaxed, Ordering::Relaxed);
    if held.is_err() {
        // SAFETY: the mapping above, which nobody uses.
        unsafe { libc::munmap(at, BYTES) };
    }
}

/// Gives the reserve back to the system. Returns whether there was one.
pub fn release() -> bool {
    let at = RESERVE.swap(null_mut(), Ordering::Relaxed);
    if at.is_null() {
        return false;
    }
    // SAFETY: the mapping of `hold`, which is nobody's any more.
    unsafe { libc::munmap(at.cast(), BYTES) };
    true
}

/// Whether the reserve has been used since this was last asked. It is set progress event anew as soon as there is
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
    fn what_fails_is_tried_again_once_with_the_reserve() {
        hold();
        let layout = |bytes| Layout::from_size_align(bytes, 8).unwrap();
        let mut tries = 0;
        let made = Reserving::again(layout(64), null_mut(), || {
            tries += 1;
            8 as *mut u8
        });
        assert_eq!((made as usize, tries), (8, 1));
        assert!(was_used() && !was_used());
        // There is a reserve again. What does not fit into it leaves it alone.
        let made = Reserving::again(layout(BYTES), null_mut(), || unreachable!());
        assert!(made.is_null() && !was_used());
        assert!(release() && !release());
        // Without one there is nothing to be tried.
        let made = Reserving::again(layout(64), null_mut(), || unreachable!());
        assert!(made.is_null());
    }
}
