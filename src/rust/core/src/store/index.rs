//! Where the result of each element of a run is.

use super::record::{FILE_HEAD, FILE_MAGIC, RECORD_HEAD, RECORD_MAGIC, RecordHead, RunId};
use super::{EXTENSION, RESULTS};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// Bytes read at a time.
const PIECE: usize = 256 * 1024;

/// What the run has of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No result.
    Missing,
    /// A result.
    Done,
    /// An error.
    Failed,
}

/// Where a record is.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: u32,
    offset: u64,
    head: RecordHead,
}

impl Place {
    fn end(&self) -> u64 {
        self.offset + self.head.size()
    }
}

/// Records of a file.
#[derive(Debug, Default)]
struct Found {
    /// The records, with their elements.
    records: Vec<(Place, Vec<u32>)>,
    /// The bytes of the file that are durable.
    durable: u64,
}

#[derive(Debug)]
struct ResultsFile {
    path: PathBuf,
    file: File,
    /// The end of the last complete record that was found.
    end: u64,
    /// Bytes of the file when `end` was found.
    seen: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Index {
    dir: PathBuf,
    run: RunId,
    files: Vec<ResultsFile>,
    /// Files that are no files of this run.
    foreign: Vec<PathBuf>,
    records: Vec<Place>,
    /// For each element, the number of its record, from 1; 0 without a result.
    elements: Vec<u32>,
}

fn damaged(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Reads a file through a buffer.
struct Window<'a> {
    file: &'a File,
    len: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// Returns these bytes, or `None` beyond the end of the file.
    fn get(&mut self, at: u64, count: usize) -> io::Result<Option<&[u8]>> {
        let Some(end) = at.checked_add(count as u64).filter(|&end| end <= self.len) else {
            return Ok(None);
        };
        let inside = at >= self.start && end <= self.start + self.bytes.len() as u64;
        if !inside {
            let left = usize::try_from(self.len - at).unwrap_or(usize::MAX);
            self.bytes.resize(PIECE.max(count).min(left), 0);
            self.start = at;
            if let Err(error) = self.file.read_exact_at(&mut self.bytes, at) {
                self.bytes.clear();
                // The file is shorter than it was.
                return match error.kind() {
                    io::ErrorKind::UnexpectedEof => Ok(None),
                    _ => Err(error),
                };
            }
        }
        let from = (at - self.start) as usize;
        Ok(self.bytes.get(from..from + count))
    }
}

impl Index {
    /// Reads the records of the run in this directory. `elements`: how many elements the run has.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn open(dir: &Path, run: RunId, elements: usize) -> io::Result<Index> {
        let mut index = Index::new(dir, run, elements);
        index.scan(true)?;
        Ok(index)
    }

    fn new(dir: &Path, run: RunId, elements: usize) -> Index {
        Index {
            dir: dir.to_owned(),
            run,
            files: Vec::new(),
            foreign: Vec::new(),
            records: Vec::new(),
            elements: vec![0; elements],
        }
    }

    /// Reads what has been added since. `checks`: whether to check payloads that may not be durable.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn refresh(&mut self, checks: bool) -> io::Result<()> {
        self.scan(checks)
    }

    /// Makes room for more elements.
    pub fn grow(&mut self, elements: usize) {
        self.elements.resize(elements.max(self.elements.len()), 0);
    }

    fn scan(&mut self, checks: bool) -> io::Result<()> {
        let mut paths = match fs::read_dir(self.dir.join(RESULTS)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<Vec<PathBuf>>>()?,
        };
        paths.retain(|path| path.extension().is_some_and(|ext| ext == EXTENSION));
        paths.sort();
        for path in paths {
            if self.foreign.contains(&path) {
                continue;
            }
            let known = self.files.iter().position(|file| file.path == path);
            let at = match known {
                Some(at) => at,
                None => match self.add(path)? {
                    Some(at) => at,
                    None => continue,
                },
            };
            self.scan_file(at, checks)?;
        }
        Ok(())
    }

    /// Adds a file, if its head is complete and is one of this run.
    fn add(&mut self, path: PathBuf) -> io::Result<Option<usize>> {
        let file = File::open(&path)?;
        let mut head = [0; FILE_HEAD];
        match file.read_exact_at(&mut head, 0) {
            // The file may still get its head.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        if head[..16] != FILE_MAGIC || head[16..] != self.run {
            self.foreign.push(path);
            return Ok(None);
        }
        self.files.push(ResultsFile {
            path,
            file,
            end: FILE_HEAD as u64,
            seen: 0,
        });
        Ok(Some(self.files.len() - 1))
    }

    /// Reads the records of a file from where the last scan ended. `checks`: whether to check the payloads behind the
    /// durable bytes.
    fn scan_file(&mut self, at: usize, checks: bool) -> io::Result<()> {
        let entry = &self.files[at];
        let len = entry.file.metadata()?.len();
        if len == entry.seen {
            return Ok(());
        }
        let found = self.records_in(at, len)?;
        let end = found.records.last().map(|(place, _)| place.end());
        for (place, elements) in found.records {
            let is_durable = place.end() <= found.durable;
            if !checks || is_durable || is_whole(&self.files[at].file, &place)? {
                self.insert(place, &elements);
            }
        }
        let entry = &mut self.files[at];
        entry.end = end.unwrap_or(entry.end);
        entry.seen = len;
        Ok(())
    }

    /// Returns the records of a file of this length behind those that were read before.
    fn records_in(&self, at: usize, len: u64) -> io::Result<Found> {
        let entry = &self.files[at];
        let mut window = Window {
            file: &entry.file,
            len,
            start: 0,
            bytes: Vec::new(),
        };
        let mut found = Found::default();
        let mut offset = entry.end;
        loop {
            match read_head(&mut window, offset)? {
                Some((head, elements)) => {
                    found.durable = head.durable.max(found.durable);
                    let file = at as u32;
                    let place = Place { file, offset, head };
                    found.records.push((place, elements));
                    offset += head.size();
                }
                // Whole records may follow bytes that were lost.
                None => match next_magic(&mut window, offset + 1)? {
                    Some(next) => offset = next,
                    None => return Ok(found),
                },
            }
        }
    }

    /// Records the result of these elements. A result replaces an error, and a later record an earlier one.
    fn insert(&mut self, place: Place, elements: &[u32]) {
        self.records.push(place);
        let number = self.records.len() as u32;
        for &element in elements {
            let before = self.state(element as usize);
            let slot = (element as usize)
                .checked_sub(1)
                .and_then(|at| self.elements.get_mut(at));
            if let Some(slot) = slot {
                if !place.head.failed || before != State::Done {
                    *slot = number;
                }
            }
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// Whether the run has no elements.
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    /// What the run has of an element, from 1.
    pub fn state(&self, element: usize) -> State {
        match self.place(element) {
            None => State::Missing,
            Some(place) if place.head.failed => State::Failed,
            Some(_) => State::Done,
        }
    }

    /// The number of the record that has the result of an element, from 1.
    pub fn record_of(&self, element: usize) -> Option<usize> {
        let slot = *self.elements.get(element.checked_sub(1)?)?;
        (slot as usize).checked_sub(1)
    }

    fn place(&self, element: usize) -> Option<&Place> {
        self.records.get(self.record_of(element)?)
    }

    /// Number of records.
    pub fn records(&self) -> usize {
        self.records.len()
    }

    /// Forgets the results of a record.
    pub fn drop_record(&mut self, number: usize) {
        for slot in &mut self.elements {
            if *slot as usize == number + 1 {
                *slot = 0;
            }
        }
    }

    /// The path of a record's file, for messages.
    pub fn path_of(&self, number: usize) -> Option<&Path> {
        let file = self.records.get(number)?.file as usize;
        self.files.get(file).map(|file| file.path.as_path())
    }

    /// Reads a record: its head, its elements and its payload.
    ///
    /// # Errors
    /// If the file cannot be read, or the payload is damaged.
    pub fn read(&self, number: usize) -> io::Result<(RecordHead, Vec<u32>, Vec<u8>)> {
        let place = self
            .records
            .get(number)
            .ok_or_else(|| damaged("no such record"))?;
        let file = &self.files[place.file as usize].file;
        let mut bytes = Vec::new();
        let length = place.head.numbers_length() + place.head.length;
        let length = usize::try_from(length).map_err(|_| damaged("the record is too long"))?;
        bytes.try_reserve_exact(length)?;
        bytes.resize(length, 0);
        file.read_exact_at(&mut bytes, place.offset + RECORD_HEAD as u64)?;
        let payload = bytes.split_off(4 * place.head.count as usize);
        if xxhash_rust::xxh3::xxh3_128(&payload) != place.head.digest {
            return Err(damaged("the checksum is wrong"));
        }
        Ok((place.head, elements_of(&bytes), payload))
    }
}

/// Returns the elements of the whole records in a file of the run, whose payloads are checked.
///
/// # Errors
/// If the file cannot be read.
pub fn elements_of_file(path: &Path, run: RunId) -> io::Result<Vec<u32>> {
    let mut index = Index::new(Path::new(""), run, 0);
    let Some(at) = index.add(path.to_owned())? else {
        return Ok(Vec::new());
    };
    let len = index.files[at].file.metadata()?.len();
    let mut elements = Vec::new();
    for (place, of_record) in index.records_in(at, len)?.records {
        if is_whole(&index.files[at].file, &place)? {
            elements.extend(of_record);
        }
    }
    Ok(elements)
}

fn elements_of(numbers: &[u8]) -> Vec<u32> {
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_ne_bytes);
    numbers.chunks_exact(4).map(number).collect()
}

/// Returns the head of the record at this offset and its elements, if the file has the whole record.
fn read_head(window: &mut Window<'_>, offset: u64) -> io::Result<Option<(RecordHead, Vec<u32>)>> {
    let Some(bytes) = window.get(offset, RECORD_HEAD)? else {
        return Ok(None);
    };
    let Some(bytes) = bytes.first_chunk::<RECORD_HEAD>().copied() else {
        return Ok(None);
    };
    let Some(head) = RecordHead::decode(&bytes) else {
        return Ok(None);
    };
    if offset.saturating_add(head.size()) > window.len {
        return Ok(None);
    }
    let count = usize::try_from(head.numbers_length()).unwrap_or(usize::MAX);
    let Some(numbers) = window.get(offset + RECORD_HEAD as u64, count)? else {
        return Ok(None);
    };
    Ok(RecordHead::is_sealed(&bytes, numbers).then(|| (head, elements_of(numbers))))
}

/// Returns where the next whole record starts, from this offset on.
fn next_magic(window: &mut Window<'_>, mut offset: u64) -> io::Result<Option<u64>> {
    while offset + RECORD_HEAD as u64 <= window.len {
        let left = usize::try_from(window.len - offset).unwrap_or(usize::MAX);
        let count = left.min(PIECE);
        let Some(bytes) = window.get(offset, count)? else {
            return Ok(None);
        };
        let first = RECORD_MAGIC[0];
        let mut candidates = bytes
            .iter()
            .enumerate()
            .filter(|&(at, &byte)| byte == first && bytes[at..].starts_with(&RECORD_MAGIC))
            .map(|(at, _)| offset + at as u64);
        if let Some(at) = candidates.next() {
            if read_head(window, at)?.is_some() {
                return Ok(Some(at));
            }
            offset = at + 1;
        } else {
            // The mark may start in the last bytes.
            offset += (count - (RECORD_MAGIC.len() - 1).min(count - 1)) as u64;
        }
    }
    Ok(None)
}

/// Whether the payload of a record is what was written.
fn is_whole(file: &File, place: &Place) -> io::Result<bool> {
    let mut hash = Xxh3::new();
    let mut at = place.offset + RECORD_HEAD as u64 + place.head.numbers_length();
    let end = at + place.head.length;
    let mut bytes = vec![0; PIECE];
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        match file.read_exact_at(&mut bytes[..count], at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            read => read?,
        }
        hash.update(&bytes[..count]);
        at += count as u64;
    }
    Ok(hash.digest128() == place.head.digest)
}
