//! Answers to tasks of heads that have disconnected, which the next head may take. They are kept in memory up to a
//! limit, and beyond it in files in the directory of the agent's socket.

use crate::protocol::frame::{FIRST, LAST, MAX_BODY};
use crate::protocol::ids::TaskId;
use bytes::Bytes;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where the bytes of an answer are.
#[derive(Debug)]
enum Stored {
    Memory(Vec<Bytes>),
    File(PathBuf),
}

/// An answer.
#[derive(Debug)]
struct Answer {
    number: u64,
    task: TaskId,
    /// When the task ended, in milliseconds of the host's clock.
    ended: u64,
    stored: Stored,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct KeptAnswers {
    answers: Vec<Answer>,
    last: u64,
    /// Bytes in memory.
    bytes: usize,
    max_bytes: usize,
}

impl KeptAnswers {
    /// Keeps up to `max_bytes` bytes in memory.
    pub fn new(max_bytes: usize) -> KeptAnswers {
        KeptAnswers {
            max_bytes,
            ..KeptAnswers::default()
        }
    }

    /// Keeps an answer. `directory`: for what does not fit into memory.
    ///
    /// # Errors
    /// When it does not fit into memory and cannot be written.
    pub fn keep(&mut self, task: TaskId, body: Vec<Bytes>, directory: &Path) -> io::Result<()> {
        self.last += 1;
        let len: usize = body.iter().map(Bytes::len).sum();
        let stored = if self.bytes.saturating_add(len) <= self.max_bytes {
            self.bytes += len;
            Stored::Memory(body)
        } else {
            let path = directory.join(format!("answer-{}", self.last));
            write(&path, &body)?;
            Stored::File(path)
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.answers.push(Answer {
            number: self.last,
            task,
            ended: now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0)),
            stored,
        });
        Ok(())
    }

    /// The number and the task of each answer, and when the task ended.
    pub fn list(&self) -> Vec<(u64, TaskId, u64)> {
        let of = |answer: &Answer| (answer.number, answer.task, answer.ended);
        self.answers.iter().map(of).collect()
    }

    /// The bytes of an answer, in pieces that each fit into a frame. `None` if there is no such answer, or it cannot be
    /// read.
    pub fn read(&self, number: u64) -> Option<Vec<Bytes>> {
        let answer = self.answers.iter().find(|answer| answer.number == number)?;
        match &answer.stored {
            Stored::Memory(body) => Some(body.clone()),
            Stored::File(path) => read(path).ok(),
        }
    }

    /// Drops an answer.
    pub fn drop_answer(&mut self, number: u64) {
        let Some(at) = self.answers.iter().position(|a| a.number == number) else {
            return;
        };
        match self.answers.remove(at).stored {
            Stored::Memory(body) => self.bytes -= body.iter().map(Bytes::len).sum::<usize>(),
            Stored::File(path) => drop(fs::remove_file(path)),
        }
    }
}

/// The answer of a worker that is arriving from it while there is no head.
#[derive(Debug, Default)]
pub struct ArrivingAnswer(Option<Vec<Bytes>>);

impl ArrivingAnswer {
    /// Takes the next part, from a frame with these flags. Returns the answer once it is complete; an answer whose first
    /// part was sent to the head is never complete.
    pub fn take(&mut self, flags: u8, parts: Vec<Bytes>) -> Option<Vec<Bytes>> {
        if flags & FIRST != 0 {
            self.0 = Some(Vec::new());
        }
        self.0.as_mut()?.extend(parts);
        self.0.take_if(|_| flags & LAST != 0)
    }

    /// The worker has ended.
    pub fn drop_parts(&mut self) {
        self.0 = None;
    }
}

fn write(path: &Path, body: &[Bytes]) -> io::Result<()> {
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = body.iter().try_for_each(|part| file.write_all(part));
    written.inspect_err(|_| drop(fs::remove_file(path)))
}

fn read(path: &Path) -> io::Result<Vec<Bytes>> {
    let mut file = File::open(path)?;
    let mut parts = Vec::new();
    loop {
        let mut part = Vec::new();
        (&mut file).take(MAX_BODY as u64).read_to_end(&mut part)?;
        if part.is_empty() {
            return Ok(parts);
        }
        parts.push(part.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_beyond_the_limit_are_files_until_they_are_dropped() {
        let directory = std::env::temp_dir().join(format!("kept-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let mut kept = KeptAnswers::new(10);
        let large: Vec<Bytes> = vec![vec![7; MAX_BODY].into(), "end".into()];
        kept.keep(3, vec!["first".into(), "one".into()], &directory)
            .unwrap();
        kept.keep(4, large.clone(), &directory).unwrap();
        kept.keep(5, vec!["x".into()], &directory).unwrap();
        let tasks: Vec<_> = kept.list().iter().map(|&(n, task, _)| (n, task)).collect();
        assert_eq!(tasks, [(1, 3), (2, 4), (3, 5)]);
        assert_eq!(kept.read(1).unwrap().concat(), b"firstone");
        assert_eq!(kept.read(2).unwrap(), large);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        for number in [1, 2, 3, 9] {
            kept.drop_answer(number);
        }
        assert!(kept.read(1).is_none() && kept.list().is_empty() && kept.bytes == 0);
        // An answer that cannot be written is not kept.
        fs::remove_dir(&directory).unwrap();
        assert!(kept.keep(6, large, &directory).is_err() && kept.list().is_empty());
    }
}
