//! The guard: a small process that cleans up after an agent that is killed. The guard kills the processes
//! that the agent's workers have started, and removes the temporary directories of the agent and its workers.
//!
//! When an agent ends, for any reason, the system kills its workers, but nothing else in their process groups.
//! The agent lists its workers in a pipe to the guard, whose other end only the agent has open. When that end
//! is closed while workers are still listed, the guard kills their process groups. Then the guard executes
//! `rm` with the directories that are still listed.
//!
//! The guard is a fork of the agent that runs no R code and has no descriptor open except the pipe. It unmaps
//! the memory that it has inherited from the agent, because the system would otherwise copy that memory for
//! the guard, page by page, as the agent changes it.

use crate::platform::{fd, process, signals};
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Length of a message: the slot of a process, its pid (0 once it has ended), and the path of its temporary
/// directory with a zero at the end (empty if the directory does not exist or was removed). Messages are short
/// enough to be written and read as a whole.
const MESSAGE: usize = 256;

/// Length of the path in a message, including the zero at its end.
const PATH: usize = MESSAGE - 8;

/// How long the guard waits for killed processes to end before it removes their directories, in milliseconds.
const MAX_DYING_MILLISECONDS: libc::c_int = 400;

/// How long the agent waits for the guard to read from a full pipe, in milliseconds.
const MAX_READ_MILLISECONDS: libc::c_int = 1000;

/// Milliseconds between two checks whether the killed processes have ended.
const CHECK_MILLISECONDS: libc::c_int = 5;

/// The guard as the agent sees it.
pub struct Guard {
    /// The agent's end of the pipe, which the system closes when the agent is killed. `None`: there is no
    /// guard.
    pipe: Option<File>,
    pid: u32,
    /// The process that started the guard. A forked worker has a copy of this value and must not dismiss
    /// the guard.
    owner: u32,
    /// Number of workers that are listed at the guard.
    listed: usize,
}

impl Guard {
    /// Starts a guard for up to `workers` workers. A failure is ignored: without a guard, a killed agent
    /// leaves more behind, which is no reason not to start workers. If no more processes can be created,
    /// starting the workers reports it.
    pub fn start(workers: usize) -> Guard {
        let (pipe, pid) = match start(workers) {
            Ok((pipe, pid)) => (Some(pipe), pid),
            Err(_) => (None, 0),
        };
        Guard {
            pipe,
            pid,
            owner: std::process::id(),
            listed: 0,
        }
    }

    /// The pid of the guard, if there is a guard.
    pub fn pid(&self) -> Option<u32> {
        self.pipe.as_ref().map(|_| self.pid)
    }

    /// Lists the temporary directory of the agent.
    pub fn watch_tempdir(&mut self, tempdir: &str) {
        self.report(AGENT, 0, tempdir);
    }

    /// Lists the directory of the socket on which the agent waits for another head.
    pub fn watch_socket(&mut self, directory: &str) {
        self.report(SOCKET, 0, directory);
    }

    /// Lists a worker, which has been created.
    pub fn made(&mut self, worker: u32, pid: u32) {
        self.listed += 1;
        self.report(worker, pid, "");
    }

    /// Lists the temporary directory of a worker.
    pub fn has_tempdir(&mut self, worker: u32, pid: u32, tempdir: &str) {
        self.report(worker, pid, tempdir);
    }

    /// Records that a worker has ended and may have left its temporary directory. Call before the worker is
    /// reaped, while its pid cannot be reused.
    pub fn ended(&mut self, worker: u32, tempdir: &str) {
        self.listed = self.listed.saturating_sub(1);
        self.report(worker, 0, tempdir);
    }

    /// Records that the temporary directory of an ended worker was removed.
    pub fn cleared(&mut self, worker: u32) {
        self.report(worker, 0, "");
    }

    fn report(&mut self, slot: u32, pid: u32, tempdir: &str) {
        let Some(pipe) = &mut self.pipe else {
            return;
        };
        let mut message = [0; MESSAGE];
        message[..4].copy_from_slice(&slot.to_ne_bytes());
        message[4..8].copy_from_slice(&pid.to_ne_bytes());
        // A truncated path could be that of another directory.
        if tempdir.len() < PATH && !tempdir.contains('\0') {
            message[8..8 + tempdir.len()].copy_from_slice(tempdir.as_bytes());
        }
        loop {
            match pipe.write(&message) {
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && has_room(pipe) => {}
                // The guard has ended, or does not read because somebody has stopped it. Dismiss it:
                // it would miss the end of a worker, and might kill a later process with the same pid.
                Err(_) => return self.dismiss(),
            }
        }
    }

    /// Reaps a child that has ended if it is the guard. Returns whether it was the guard.
    pub fn reap(&mut self, pid: u32) -> bool {
        if self.pid() != Some(pid) {
            return false;
        }
        self.pipe = None;
        process::reap(pid);
        true
    }

    /// Ends the guard before it kills anything.
    fn dismiss(&mut self) {
        if self.pipe.is_some() {
            let _ = signals::kill(self.pid as i32, libc::SIGKILL);
            self.reap(self.pid);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // If workers are left, the agent ends because of a failure: closing the pipe makes the guard
        // clean up.
        if self.owner == std::process::id() && self.listed == 0 {
            self.dismiss();
        }
    }
}

/// Waits until the pipe has room. Returns whether it has.
fn has_room(pipe: &File) -> bool {
    let mut polled = libc::pollfd {
        fd: pipe.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: the pollfd is valid.
    unsafe { libc::poll(&raw mut polled, 1, MAX_READ_MILLISECONDS) > 0 }
}

fn start(workers: usize) -> io::Result<(File, u32)> {
    let (reader, writer) = fd::pipe()?;
    fd::set_nonblocking(writer.as_raw_fd(), true)?;
    let others = open_files()
        .into_iter()
        .filter(|&fd| fd != reader.as_raw_fd());
    let others: Vec<RawFd> = others.collect();
    let null = File::open("/dev/null")?;
    // An address on this thread's stack.
    let on_stack = 0u8;
    let unneeded = Unneeded::now(&[&raw const on_stack as usize, thread_variables()]);
    // The guard handles no signal, because the handlers of R and of the agent must not run in it.
    let pid = signals::with_all_blocked(|| {
        // SAFETY: the agent has one thread, so the child is a complete copy of it.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            watch(&reader, &null, &others, workers, unneeded);
        }
        pid
    });
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((File::from(writer), pid as u32))
}

/// Numbers of the open descriptors. They are listed because trying all possible numbers may take a
/// long time where the limit is high.
fn open_files() -> Vec<RawFd> {
    match std::fs::read_dir("/dev/fd") {
        Ok(entries) => entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect(),
        Err(_) => (0..1024).collect(),
    }
}

/// Runs the guard in the forked child. Once the guard has unmapped its memory, it calls nothing that
/// allocates, and only functions of libc that were bound when this library was loaded.
fn watch(reader: &OwnedFd, null: &File, others: &[RawFd], workers: usize, unneeded: Unneeded) -> ! {
    let pipe = reader.as_raw_fd();
    for target in 0..3 {
        let _ = fd::redirect(null.as_raw_fd(), target);
    }
    for &fd in others.iter().chain(&[null.as_raw_fd()]) {
        if fd > 2 && fd != pipe {
            // SAFETY: nothing in this process uses or drops the descriptor any more: the process ends
            // by _exit.
            unsafe { libc::close(fd) };
        }
    }
    // SAFETY: no memory effects; the paths and names are C strings.
    unsafe {
        libc::setsid();
        // Leave the working directory, whose file system could not be unmounted otherwise.
        libc::chdir(c"/".as_ptr());
        libc::prctl(libc::PR_SET_NAME, c"rc-guard".as_ptr());
    }
    unneeded.unmap();
    // The slots of the agent follow those of the workers.
    let Some(slots) = table::<GuardedProcess>(workers.saturating_add(2)) else {
        exit();
    };
    let mut buffer = [0u8; 16 * MESSAGE];
    loop {
        // SAFETY: the pointer and the length are those of the buffer.
        let n = unsafe { libc::read(pipe, buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(n) = usize::try_from(n) else {
            if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            break;
        };
        if n == 0 {
            break;
        }
        for message in buffer.chunks_exact(MESSAGE).take(n / MESSAGE) {
            let number = |at: usize| {
                let mut bytes = [0; 4];
                for (to, from) in bytes.iter_mut().zip(message.iter().skip(at)) {
                    *to = *from;
                }
                u32::from_ne_bytes(bytes)
            };
            let slot = match number(0) {
                AGENT => workers,
                SOCKET => workers.saturating_add(1),
                slot => slot as usize,
            };
            if let Some(slot) = slots.get_mut(slot) {
                slot.pid = number(4);
                for (to, from) in slot.path.iter_mut().zip(message.iter().skip(8)) {
                    *to = *from;
                }
            }
        }
    }
    for slot in slots.iter() {
        if slot.pid != 0 {
            let _ = signals::kill(-(slot.pid as i32), libc::SIGKILL);
        }
    }
    remove(slots);
    exit();
}

/// Executes `rm` for the listed directories. Returns if there are none or `rm` cannot be executed.
fn remove(slots: &[GuardedProcess]) {
    // Killed processes may still write to the directories.
    let dying =
        |slot: &GuardedProcess| slot.pid != 0 && signals::kill(-(slot.pid as i32), 0).is_ok();
    for _ in 0..MAX_DYING_MILLISECONDS / CHECK_MILLISECONDS {
        if !slots.iter().any(dying) {
            break;
        }
        // SAFETY: the list of descriptors is empty.
        unsafe { libc::poll(std::ptr::null_mut(), 0, CHECK_MILLISECONDS) };
    }
    let command = [c"rm", c"-rf", c"--"];
    let room = slots.len().saturating_add(command.len() + 1);
    let Some(arguments) = table::<*const libc::c_char>(room) else {
        return;
    };
    let paths = slots.iter().filter(|slot| slot.path[0] != 0);
    let paths = paths.map(|slot| slot.path.as_ptr().cast());
    let mut count = 0;
    let words = command.iter().map(|word| word.as_ptr()).chain(paths);
    for (to, word) in arguments.iter_mut().zip(words) {
        *to = word;
        count += 1;
    }
    if count == command.len() {
        return;
    }
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    for program in [c"/bin/rm", c"/usr/bin/rm"] {
        // SAFETY: the words are C strings. Both lists end with a null pointer: the table is zeroed and has
        // one more entry than there are words.
        unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    }
}

fn exit() -> ! {
    // SAFETY: ends this forked process without running R's exit handlers and without flushing the
    // inherited buffers.
    unsafe { libc::_exit(0) }
}

/// The slot of the agent in messages.
const AGENT: u32 = u32::MAX;
/// The slot of the directory of its socket.
const SOCKET: u32 = u32::MAX - 1;

/// A process that is listed at the guard.
#[repr(C)]
struct GuardedProcess {
    pid: u32,
    path: [u8; PATH],
}

/// Allocates `count` zeroed values in pages of their own.
fn table<T>(count: usize) -> Option<&'static mut [T]> {
    let bytes = count.checked_mul(size_of::<T>())?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
    // SAFETY: the new mapping is aligned to a page, zeroed, never unmapped, and used by nothing else. Zeroes
    // are valid for the stored numbers and pointers.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return None;
        }
        Some(std::slice::from_raw_parts_mut(at.cast(), count))
    }
}

/// An address among this thread's variables.
fn thread_variables() -> usize {
    // SAFETY: returns a pointer, which is not dereferenced.
    unsafe { libc::__errno_location() as usize }
}

/// Inherited memory that the guard does not need: mostly R's heap.
#[derive(Clone, Copy)]
struct Unneeded([(usize, usize); 64]);

impl Unneeded {
    fn now(keep: &[usize]) -> Unneeded {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let mut ranges = [(0, 0); 64];
        for (slot, range) in ranges.iter_mut().zip(unneeded_in(&maps, keep)) {
            *slot = (range.start, range.len());
        }
        Unneeded(ranges)
    }

    /// Unmaps the memory. Call only in the guard.
    fn unmap(self) {
        for (start, len) in self.0 {
            if len > 0 {
                // SAFETY: these are complete mappings of heap memory. Their content belongs to code that
                // never runs again in this process.
                unsafe { libc::munmap(start as *mut libc::c_void, len) };
            }
        }
    }
}

/// Minimum size of a mapping that is unmapped: less is not worth a system call.
const MIN_RELEASED: usize = 256 * 1024;

/// Heap mappings in the text of /proc/self/maps, the largest first. Mappings that contain an address in
/// `keep` are excluded, and so are mappings that begin where the mapping of a file ends: those contain the
/// variables of a program or library.
fn unneeded_in(maps: &str, keep: &[usize]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut file_end = 0;
    for line in maps.lines() {
        // "55d0c0a00000-55d0c5b00000 rw-p 00000000 00:00 0    [heap]"
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else {
            continue;
        };
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let address = |text: &str| usize::from_str_radix(text, 16);
        let (Ok(start), Ok(end)) = (address(start), address(end)) else {
            continue;
        };
        let heap = match fields.nth(3) {
            None => start != file_end,
            Some("[heap]") => true,
            Some(name) => {
                if !name.starts_with('[') {
                    file_end = end;
                }
                false
            }
        };
        let range = start..end;
        let kept = keep.iter().any(|address| range.contains(address));
        if heap && permissions.starts_with("rw") && permissions.ends_with('p') && !kept {
            ranges.push(range);
        }
    }
    ranges.retain(|range| range.len() >= MIN_RELEASED);
    ranges.sort_by_key(|range| std::cmp::Reverse(range.len()));
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    /// A process that represents a worker, with a child.
    fn worker() -> Child {
        let mut command = Command::new("sh");
        command
            .args(["-c", "sleep 300 & sleep 300"])
            .stdin(Stdio::null());
        command.process_group(0).spawn().unwrap()
    }

    fn exists(pid: i32) -> bool {
        signals::kill(pid, 0).is_ok()
    }

    fn until(condition: impl Fn() -> bool) -> bool {
        let began = Instant::now();
        while !condition() {
            if began.elapsed() > Duration::from_secs(20) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    #[test]
    fn the_groups_of_listed_workers_are_killed_when_the_pipe_is_closed() {
        let mut guard = Guard::start(3);
        let (mut first, mut second) = (worker(), worker());
        guard.made(0, first.id());
        guard.made(2, second.id());
        // The group of a worker that has ended is not killed.
        guard.ended(2, "");
        let pid = guard.pid().unwrap();
        drop(guard);
        assert!(until(|| process::peek_exit(first.id())));
        first.wait().unwrap();
        assert!(until(|| !exists(-(first.id() as i32))));
        assert!(until(|| process::peek_exit(pid)));
        process::reap(pid);
        assert!(second.try_wait().unwrap().is_none());
        signals::kill(-(second.id() as i32), libc::SIGKILL).unwrap();
        second.wait().unwrap();
    }

    #[test]
    fn listed_directories_are_removed_when_the_pipe_is_closed() {
        let base = std::env::temp_dir().join(format!("rustcluster-guard-{}", std::process::id()));
        let path = |name: &str| base.join(name).join("below").display().to_string();
        for name in ["agent", "worker", "ended", "cleared"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        let mut guard = Guard::start(3);
        guard.watch_tempdir(&path("agent"));
        let mut child = worker();
        guard.made(0, child.id());
        guard.has_tempdir(0, child.id(), &path("worker"));
        guard.made(1, 1);
        guard.ended(1, &path("ended"));
        guard.made(2, 1);
        guard.ended(2, &path("cleared"));
        guard.cleared(2);
        let pid = guard.pid().unwrap();
        drop(guard);
        child.wait().unwrap();
        assert!(until(|| process::peek_exit(pid)));
        process::reap(pid);
        let there = |name| std::path::Path::new(&path(name)).exists();
        assert!(!there("agent") && !there("worker") && !there("ended") && there("cleared"));
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn without_workers_the_guard_ends_with_its_owner() {
        let mut guard = Guard::start(1);
        let mut child = worker();
        guard.made(0, child.id());
        guard.ended(0, "");
        let pid = guard.pid().unwrap() as i32;
        assert!(exists(pid));
        drop(guard);
        assert!(!exists(pid));
        assert!(child.try_wait().unwrap().is_none());
        signals::kill(-(child.id() as i32), libc::SIGKILL).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_guard_ignores_signals_and_its_end_is_harmless() {
        let mut guard = Guard::start(1);
        let pid = guard.pid().unwrap();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
            signals::kill(pid as i32, signal).unwrap();
        }
        assert!(!process::peek_exit(pid));
        signals::kill(pid as i32, libc::SIGKILL).unwrap();
        process::await_exit(pid);
        assert!(!guard.reap(pid + 1));
        assert!(guard.reap(pid));
        assert_eq!(guard.pid(), None);
        guard.made(0, 1);
    }

    #[test]
    fn a_guard_that_does_not_read_is_dismissed() {
        let mut guard = Guard::start(1);
        let pid = guard.pid().unwrap() as i32;
        signals::kill(pid, libc::SIGSTOP).unwrap();
        for _ in 0..1_000_000 {
            guard.made(0, 0);
            if guard.pid().is_none() {
                break;
            }
        }
        assert_eq!(guard.pid(), None);
        assert!(!exists(pid));
    }

    #[test]
    fn the_guard_has_no_descriptor_open_except_its_pipe() {
        let guard = Guard::start(1);
        let folder = format!("/proc/{}/fd", guard.pid().unwrap());
        let targets = || -> Vec<String> {
            let entries = std::fs::read_dir(&folder).unwrap();
            // A descriptor that is closed while the directory is read does not count.
            let link = |entry: io::Result<std::fs::DirEntry>| {
                std::fs::read_link(entry.unwrap().path()).ok()
            };
            entries
                .filter_map(|entry| Some(link(entry)?.display().to_string()))
                .collect()
        };
        assert!(until(|| targets().len() == 4), "{:?}", targets());
        let null = targets().iter().filter(|name| *name == "/dev/null").count();
        assert_eq!(null, 3);
        drop(guard);
    }

    #[test]
    fn only_heap_mappings_are_unmapped() {
        let maps = "\
            400000-401000 r-xp 00000000 fe:00 1 /usr/lib/R/bin/exec/R\n\
            401000-601000 rw-p 00000000 fe:00 1 /usr/lib/R/bin/exec/R\n\
            601000-a01000 rw-p 00000000 00:00 0 \n\
            2000000-4000000 rw-p 00000000 00:00 0                          [heap]\n\
            7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \n\
            7f0000500000-7f0000900000 r--p 00000000 00:00 0 \n\
            7f0001000000-7f0001400000 rw-s 00000000 00:01 7 /dev/zero (deleted)\n\
            7f0002000000-7f0002400000 rw-p 00000000 00:00 0 \n\
            7f0003000000-7f0003001000 rw-p 00000000 00:00 0 \n\
            7ffc00000000-7ffc00800000 rw-p 00000000 00:00 0 [stack]\n\
            nonsense\n";
        assert_eq!(
            unneeded_in(maps, &[0x7f00_0200_1000]),
            [0x200_0000..0x400_0000, 0x7f00_0000_0000..0x7f00_0040_0000]
        );
        assert!(unneeded_in("", &[]).is_empty());
    }
}
