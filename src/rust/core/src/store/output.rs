//! The file to which a process appends its records.

use super::record::{self, Kind, RECORD_HEAD, RecordHead, RunId};
use super::{EXTENSION, ListPayload, MAX_FILE};
use crate::platform::signals::without_file_size_signal;
use crate::protocol::body::Body;
use bytes::Bytes;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use xxhash_rust::xxh3::Xxh3;

/// Results up to this size are copied into one buffer with other records.
const BUFFER: usize = 256 * 1024;

/// A record to be written.
#[derive(Debug)]
pub enum Item {
    /// Short results.
    List(ListPayload),
    /// One result: R's serialization of a value or of an error.
    Value {
        /// The element, from 1.
        element: u32,
        /// Whether the result is an error.
        failed: bool,
        /// The bytes.
        body: Body,
    },
}

impl Item {
    /// The elements of the record.
    pub fn elements(&self) -> &[u32] {
        match self {
            Item::List(list) => &list.elements,
            Item::Value { element, .. } => std::slice::from_ref(element),
        }
    }
}

/// Where files of records are made.
#[derive(Clone, Debug)]
pub struct Series {
    /// The folder, which exists.
    pub folder: PathBuf,
    /// The run.
    pub run: RunId,
    /// The version of R, as `R_VERSION` of its C API.
    pub r_version: u32,
    /// The first part of the names of the files. `None`: the numbers of the files alone.
    pub name: Option<String>,
    /// Whether records have to survive a crash of the machine, and not only of the process.
    pub durable: bool,
}

/// The file to which records are appended.
#[derive(Debug)]
pub struct Output {
    series: Series,
    file: Option<(PathBuf, File)>,
    offset: u64,
    /// The end of what was written without an error.
    complete: u64,
    /// The end of what would survive a crash of the machine.
    durable: u64,
}

impl Output {
    /// Makes the first file.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn start(series: Series) -> io::Result<Output> {
        let mut output = Output {
            series,
            file: None,
            offset: 0,
            complete: 0,
            durable: 0,
        };
        output.next_file()?;
        Ok(output)
    }

    /// The path of the file.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// Makes the next file. Its number follows those of all others.
    fn next_file(&mut self) -> io::Result<()> {
        let prefix = self.series.name.as_deref().unwrap_or_default();
        let number = |path: &Path| {
            let name = path.file_stem()?.to_str()?;
            name.strip_prefix(prefix)?.parse().ok()
        };
        let mut next = 1 + fs::read_dir(&self.series.folder)?
            .filter_map(|entry| number(&entry.ok()?.path()))
            .max()
            .unwrap_or(0_u32);
        let (path, file) = loop {
            let path = self
                .series
                .folder
                .join(format!("{prefix}{next:06}.{EXTENSION}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => next += 1,
                opened => break (path, opened?),
            }
        };
        self.file = Some((path, file));
        (self.complete, self.durable) = (0, 0);
        let head = record::file_head(self.series.run);
        self.offset = head.len() as u64;
        self.put(&head)?;
        match self.series.durable {
            // The name of the file must be durable, too.
            true => File::open(&self.series.folder)?.sync_all(),
            false => Ok(()),
        }
    }

    /// Removes the file if it has no record.
    pub fn remove_if_empty(&self) {
        if let Some((path, _)) = &self.file {
            if self.offset == record::FILE_HEAD as u64 {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Leaves the file, whose end may be incomplete: the next records go to another one.
    pub fn drop_file(&mut self) {
        let Some((path, file)) = self.file.take() else {
            return;
        };
        // Frees what a full disk needs. Readers do not depend on it.
        let _ = match self.complete > record::FILE_HEAD as u64 {
            true => file.set_len(self.complete),
            false => fs::remove_file(path),
        };
    }

    /// Writes records and makes them durable.
    ///
    /// # Errors
    /// If a record cannot be written. The next records then go to another file, after [`Output::drop_file`].
    pub fn write(&mut self, items: &[Item]) -> io::Result<()> {
        let mut buffer = Vec::new();
        for item in items {
            if self.file.is_none() || self.offset >= MAX_FILE {
                self.flush(&mut buffer)?;
                self.sync()?;
                self.next_file()?;
            }
            self.append(item, &mut buffer)?;
        }
        self.flush(&mut buffer)?;
        self.sync()
    }

    fn append(&mut self, item: &Item, buffer: &mut Vec<u8>) -> io::Result<()> {
        let numbers = record::numbers(item.elements());
        let (kind, failed, head);
        let chunks: Vec<&[u8]> = match item {
            Item::List(list) => {
                (kind, failed) = (Kind::List, false);
                head = list.head(self.series.r_version);
                vec![&head, &list.items]
            }
            Item::Value {
                failed: is, body, ..
            } => {
                (kind, failed) = (Kind::Value, *is);
                body.chunks.iter().map(Bytes::as_ref).collect()
            }
        };
        let mut hash = Xxh3::new();
        for chunk in &chunks {
            hash.update(chunk);
        }
        let length: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let head = RecordHead {
            kind,
            count: item.elements().len() as u32,
            failed,
            length: length as u64,
            durable: self.durable,
            at: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0.0, |at| at.as_secs_f64()),
            digest: hash.digest128(),
        };
        self.offset += head.size();
        buffer.extend_from_slice(&head.encode(&numbers));
        buffer.extend_from_slice(&numbers);
        for chunk in chunks {
            if buffer.len() + chunk.len() > BUFFER + RECORD_HEAD {
                self.flush(buffer)?;
            }
            if chunk.len() > BUFFER {
                self.put(chunk)?;
            } else {
                buffer.extend_from_slice(chunk);
            }
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((_, file)) = &mut self.file else {
            return Err(io::Error::other("no file is open"));
        };
        without_file_size_signal(|| file.write_all(bytes))
    }

    fn flush(&mut self, buffer: &mut Vec<u8>) -> io::Result<()> {
        if !buffer.is_empty() {
            self.put(buffer)?;
            buffer.clear();
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some((_, file)) = self.file.as_ref().filter(|_| self.series.durable) {
            file.sync_data()?;
            self.durable = self.offset;
        }
        self.complete = self.offset;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::elements_of_file;

    #[test]
    fn a_failed_write_leaves_what_was_written_before_durable_or_not() {
        for durable in [true, false] {
            let folder = std::env::temp_dir();
            let folder = folder.join(format!("output-{}-{durable}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            let run = *b"0123456789abcdef";
            let item = |element| Item::Value {
                element,
                failed: false,
                body: Body::from_bytes(vec![7; 1000]),
            };
            let mut output = Output::start(Series {
                folder: folder.clone(),
                run,
                r_version: 4 << 16,
                name: None,
                durable,
            })
            .unwrap();
            output.write(&[item(1), item(2)]).unwrap();
            let path = output.path().unwrap().to_owned();
            // Another write fails after a part of it.
            let tail = |file: &mut File| file.write_all(b"RCR1 and a part of a record");
            output.file.as_mut().map(|(_, file)| tail(file));
            output.file = Some((
                path.clone(),
                OpenOptions::new().read(true).open(&path).unwrap(),
            ));
            assert!(output.write(&[item(3)]).is_err());
            output.file = Some((
                path.clone(),
                OpenOptions::new().write(true).open(&path).unwrap(),
            ));
            output.drop_file();
            assert_eq!(elements_of_file(&path, run).unwrap(), [1, 2]);
            output.write(&[item(3)]).unwrap();
            assert_ne!(output.path().unwrap(), path);
            fs::remove_dir_all(&folder).unwrap();
        }
    }
}
