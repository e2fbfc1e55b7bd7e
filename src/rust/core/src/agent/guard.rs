//! The guard: a small process that outlives an agent that is killed by as much as it takes to kill
//! what the workers of that agent have started, and to remove the temporary directories of all.
//!
//! When an agent ends, whatever the reason, the system kills its workers, but nothing else in
//! their process groups. The guard knows the workers from a pipe that only the agent holds the
//! other end of; when that end is closed and workers are still listed, it kills their groups. Then it
//! becomes `rm`, with the directories that are still listed.
//!
//! It is a fork of the agent that runs no R code, holds no descriptor but the pipe, and gives up
//! the memory that it has from the agent, which would otherwise be copied for it page by page as
//! the agent goes on.

use crate::platform::{fd, process, signals};
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A message: the place of a process, its pid, 0 when it has ended, and its temporary directory, which ends
/// with a zero; none if it has none, or none any more. Short enough to be written and read as a whole.
const MESSAGE: usize = 256;

/// Bytes of a directory's path in a message, with the zero at its end.
const PATH: usize = MESSAGE - 8;

/// How long what was killed may take to end before its directories are removed, in milliseconds.
const DYING: libc::c_int = 400;

/// How long the guard may take to read what fills its pipe, in milliseconds.
const READING: libc::c_int = 1000;

/// Milliseconds between two looks whether it has ended.
const CHECK_MILLISECONDS: libc::c_int = 5;

/// The guard as the agent sees it.
pub struct Guard {
    /// Closed by the system when the agent is killed. `None`: there is no guard.
    pipe: Option<File>,
    pid: u32,
    /// The process that started it. A forked worker has a copy of this value, and the guard is
    /// none of its business.
    owner: u32,
    /// Workers that the guard knows of.
    listed: usize,
}

impl Guard {
    /// Starts a guard for up to `workers` workers. Without one, a killed agent leaves more behind:
    /// that it cannot be started is no reason not to start workers, and if processes have run out
    /// they will say so.
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

    /// Its pid, if there is one.
    pub fn pid(&self) -> Option<u32> {
        self.pipe.as_ref().map(|_| self.pid)
    }

    /// The agent has this temporary directory.
    pub fn watch_tempdir(&mut self, tempdir: &str) {
        self.report(AGENT, 0, tempdir);
    }

    /// A worker exists.
    pub fn made(&mut self, worker: u32, pid: u32) {
        self.listed += 1;
        self.report(worker, pid, "");
    }

    /// A worker has this temporary directory.
    pub fn has_tempdir(&mut self, worker: u32, pid: u32, tempdir: &str) {
        self.report(worker, pid, tempdir);
    }

    /// A worker has ended, and may have left its temporary directory. To be said before it is reaped,
    /// while its pid can be nobody else's.
    pub fn ended(&mut self, worker: u32, tempdir: &str) {
        self.listed = self.listed.saturating_sub(1);
        self.report(worker, 0, tempdir);
    }

    /// The temporary directory of a worker that has ended is removed.
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
        // A path that is cut off would be another's.
        if tempdir.len() < PATH && !tempdir.contains('\0') {
            message[8..8 + tempdir.len()].copy_from_slice(tempdir.as_bytes());
        }
        loop {
            match pipe.write(&message) {
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && has_room(pipe) => {}
                // It has ended, or does not read: somebody has stopped it. It may then not know
                // of a worker's end, and kill what later gets the same pid.
                Err(_) => return self.dismiss(),
            }
        }
    }

    /// A child has ended. Returns whether it was the guard, which is then reaped.
    pub fn reap(&mut self, pid: u32) -> bool {
        if self.pid() != Some(pid) {
            return false;
        }
        self.pipe = None;
        process::reap(pid);
        true
    }

    /// Ends the guard without its having killed anything.
    fn dismiss(&mut self) {
        if self.pipe.is_some() {
            let _ = signals::kill(self.pid as i32, libc::SIGKILL);
            self.reap(self.pid);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // With workers left, the agent ends because something failed: closing the pipe has the
        // guard do what it is for.
        if self.owner == std::process::id() && self.listed == 0 {
            self.dismiss();
        }
    }
}

/// Waits for the pipe to have room. Returns whether it has.
fn has_room(pipe: &File) -> bool {
    let mut polled = libc::pollfd {
        fd: pipe.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut polled, 1, READING) > 0 }
}

fn start(workers: usize) -> io::Result<(File, u32)> {
    let (reader, writer) = fd::pipe()?;
    fd::set_nonblocking(writer.as_raw_fd(), true)?;
    let others = open_files()
        .into_iter()
        .filter(|&fd| fd != reader.as_raw_fd());
    let others: Vec<RawFd> = others.collect();
    let null = File::open("/dev/null")?;
    // Of this thread's stack.
    let here = 0u8;
    let unneeded = Unneeded::now(&[&raw const here as usize, thread_variables()]);
    // No signal is handled in the guard: R's and the agent's handlers are not made for it.
    let pid = signals::with_all_blocked(|| {
        // SAFETY: the agent has one thread, so the child is a whole copy of it.
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

/// Numbers of the open descriptors. They are looked up because counting through all that there
/// could be may take a long time where the limit is high.
fn open_files() -> Vec<RawFd> {
    match std::fs::read_dir("/dev/fd") {
        Ok(entries) => entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect(),
        Err(_) => (0..1024).collect(),
    }
}

/// The guard's whole life, in the forked child. From where it gives up its memory on it calls
/// nothing that allocates, and only functions of libc that were bound when this library was
/// loaded.
fn watch(reader: &OwnedFd, null: &File, others: &[RawFd], workers: usize, unneeded: Unneeded) -> ! {
    let pipe = reader.as_raw_fd();
    for target in 0..3 {
        let _ = fd::redirect(null.as_raw_fd(), target);
    }
    for &fd in others.iter().chain(&[null.as_raw_fd()]) {
        if fd > 2 && fd != pipe {
            // SAFETY: nothing in this process uses it any more, nor drops it: it ends by _exit.
            unsafe { libc::close(fd) };
        }
    }
    // SAFETY: no memory effects; the paths and names are C strings.
    unsafe {
        libc::setsid();
        // Else a file system could not be unmounted.
        libc::chdir(c"/".as_ptr());
        libc::prctl(libc::PR_SET_NAME, c"rc-guard".as_ptr());
    }
    unneeded.give_up();
    // The agent's place is behind the workers'.
    let Some(slots) = table::<GuardedProcess>(workers.saturating_add(1)) else {
        exit();
    };
    let mut buffer = [0u8; 16 * MESSAGE];
    loop {
        // SAFETY: pointer and length are those of the buffer.
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

/// Becomes the program that removes the directories, if there are any and that program can be run.
fn remove(slots: &[GuardedProcess]) {
    // What was killed may still write to them.
    let dying =
        |slot: &GuardedProcess| slot.pid != 0 && signals::kill(-(slot.pid as i32), 0).is_ok();
    for _ in 0..DYING / CHECK_MILLISECONDS {
        if !slots.iter().any(dying) {
            break;
        }
        // SAFETY: waits for no descriptor.
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
        // SAFETY: C strings; both lists end with a null pointer, as there is one more in the table, which
        // is zeroed, than there are words.
        unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    }
}

fn exit() -> ! {
    // SAFETY: ends this process, which is a fork: without R's exit handlers, and without writing
    // out what the agent had in its buffers.
    unsafe { libc::_exit(0) }
}

/// The place of the agent in messages.
const AGENT: u32 = u32::MAX;

/// What the guard knows of a process.
#[repr(C)]
struct GuardedProcess {
    pid: u32,
    path: [u8; PATH],
}

/// So many values, whose bytes are zeroes, in pages of their own.
fn table<T>(count: usize) -> Option<&'static mut [T]> {
    let bytes = count.checked_mul(size_of::<T>())?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
    // SAFETY: a new mapping, aligned to a page, zeroed, never unmapped, and used by nobody else. Zeroes are
    // a valid value of what is stored: numbers and pointers.
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
    // SAFETY: returns a pointer, which is not followed.
    unsafe { libc::__errno_location() as usize }
}

/// Memory of the agent that the guard can do without: R's heap, mostly.
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

    /// Only in the guard.
    fn give_up(self) {
        for (start, len) in self.0 {
            if len > 0 {
                // SAFETY: these are whole mappings that were made to allocate from. Whatever they
                // hold belongs to code that never runs again in this process.
                unsafe { libc::munmap(start as *mut libc::c_void, len) };
            }
        }
    }
}

/// What is not worth a system call.
const MIN_RELEASED: usize = 256 * 1024;

/// Mappings in the text of /proc/self/maps that were made to allocate from, the largest first.
/// Not among them are those with an address to `keep`, and those that begin where one of a file
/// ends: they hold the variables of a program or library.
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

    /// A stand-in for a worker, with a child.
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
    fn at_the_pipes_end_the_groups_of_listed_workers_are_killed() {
        let mut guard = Guard::start(3);
        let (mut first, mut second) = (worker(), worker());
        guard.made(0, first.id());
        guard.made(2, second.id());
        // What has ended is left alone.
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
    fn directories_that_are_still_listed_are_removed() {
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
    fn without_workers_it_ends_with_its_owner() {
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
    fn it_heeds_no_signal_and_its_own_end_is_no_harm() {
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
    fn one_that_does_not_read_is_dismissed() {
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
    fn it_holds_nothing_but_its_pipe() {
        let guard = Guard::start(1);
        let folder = format!("/proc/{}/fd", guard.pid().unwrap());
        let targets = || -> Vec<String> {
            let entries = std::fs::read_dir(&folder).unwrap();
            // What is closed between two looks is not held.
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
    fn only_what_was_made_to_allocate_from_is_given_up() {
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
