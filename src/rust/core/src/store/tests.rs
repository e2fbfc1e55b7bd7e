use super::record::{FILE_HEAD, RECORD_HEAD, RunId, file_head};
use super::{Index, RESULTS, State, Writer, WriterSettings};
use crate::protocol::body::Body;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const RUN: RunId = *b"0123456789abcdef";

fn settings() -> WriterSettings {
    WriterSettings {
        run: RUN,
        r_version: 4 << 16,
        interval: Duration::ZERO,
        waits: false,
    }
}

/// A directory that is removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rustcluster-store-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    fn index(&self, elements: usize) -> Index {
        Index::open(&self.0, RUN, elements).unwrap()
    }

    fn file(&self, number: u32) -> PathBuf {
        self.0.join(RESULTS).join(format!("{number:06}.rcr"))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn finish(writer: &Writer) {
    while !writer.wait_for_all(Duration::from_secs(10)).unwrap() {}
}

/// The payload of an element: its number, many times.
fn payload(element: u32) -> Vec<u8> {
    element.to_le_bytes().repeat(1 + element as usize % 50)
}

/// Writes a file in groups: the results of each group become durable together.
fn write(dir: &Path, groups: &[Vec<u32>]) {
    let writer = Writer::start(dir, settings()).unwrap();
    for group in groups {
        for &element in group {
            if element % 3 == 0 {
                writer.add_short(|list| {
                    list.items.extend_from_slice(&payload(element));
                    list.elements.push(element);
                });
            } else {
                writer.add(
                    element,
                    element % 5 == 0,
                    Body::from_bytes(payload(element)),
                );
            }
        }
        finish(&writer);
    }
}

/// Checks that a result is that of its element.
fn check(index: &Index, element: u32) {
    let number = index.record_of(element as usize).unwrap();
    let (head, elements, bytes) = index.read(number).unwrap();
    assert!(elements.contains(&element));
    if elements.len() == 1 && element % 3 != 0 {
        assert_eq!(bytes, payload(element));
        assert_eq!(head.failed, element % 5 == 0);
    } else {
        let items: Vec<u8> = elements.iter().flat_map(|&one| payload(one)).collect();
        assert!(bytes.ends_with(&items));
    }
}

#[test]
fn results_are_found_again() {
    let dir = Dir::new();
    write(&dir.0, &[(1..=50).collect(), (51..=60).collect()]);
    let index = dir.index(61);
    for element in 1..=60 {
        check(&index, element);
    }
    assert_eq!(index.state(61), State::Missing);
    assert_eq!(index.state(5), State::Failed);
    assert_eq!(index.state(6), State::Done);
}

#[test]
fn a_result_replaces_an_error_and_not_the_reverse() {
    let dir = Dir::new();
    let write = |failed, bytes: &[u8]| {
        let writer = Writer::start(&dir.0, settings()).unwrap();
        writer.add(1, failed, Body::from_bytes(bytes.to_vec()));
        finish(&writer);
    };
    write(true, b"error");
    assert_eq!(dir.index(1).state(1), State::Failed);
    write(false, b"value");
    write(true, b"later error");
    let index = dir.index(1);
    assert_eq!(index.state(1), State::Done);
    assert_eq!(index.read(index.record_of(1).unwrap()).unwrap().2, b"value");
    assert!(dir.file(3).exists());
}

#[test]
fn a_reader_sees_what_is_added() {
    let dir = Dir::new();
    let mut index = dir.index(10);
    let writer = Writer::start(&dir.0, settings()).unwrap();
    for element in (1..=10).filter(|element| element % 3 != 0) {
        let failed = element % 5 == 0;
        writer.add(element, failed, Body::from_bytes(payload(element)));
        finish(&writer);
        assert_eq!(writer.take_durable(), [element]);
        index.refresh(false).unwrap();
        check(&index, element);
    }
    drop(writer);
}

#[test]
fn files_of_other_runs_do_not_count() {
    let dir = Dir::new();
    write(&dir.0, &[vec![1]]);
    let other = Index::open(&dir.0, *b"another run here", 1).unwrap();
    assert_eq!(other.state(1), State::Missing);
    fs::write(
        dir.file(2),
        b"no file of records, but long enough to have a head",
    )
    .unwrap();
    fs::write(dir.file(3), b"short").unwrap();
    assert_eq!(dir.index(1).state(1), State::Done);
}

#[test]
fn an_error_of_writing_is_reported_and_what_was_written_stays() {
    let dir = Dir::new();
    let writer = Writer::start(&dir.0, settings()).unwrap();
    writer.add(1, false, Body::from_bytes(payload(1)));
    finish(&writer);
    fs::rename(dir.0.join(RESULTS), dir.0.join("moved")).unwrap();
    // The open file still takes results; the next file cannot be made.
    writer.add(2, false, Body::from_bytes(payload(2)));
    finish(&writer);
    drop(writer);
    fs::write(dir.0.join(RESULTS), b"a file").unwrap();
    assert!(Writer::start(&dir.0, settings()).is_err());
    fs::remove_file(dir.0.join(RESULTS)).unwrap();
    fs::rename(dir.0.join("moved"), dir.0.join(RESULTS)).unwrap();
    check(&dir.index(2), 2);
}

#[test]
fn damage_of_durable_results_is_noticed_when_they_are_read() {
    let dir = Dir::new();
    write(&dir.0, &[vec![1], vec![2], vec![4]]);
    let mut bytes = fs::read(dir.file(1)).unwrap();
    bytes[FILE_HEAD + RECORD_HEAD + 4] ^= 1;
    fs::write(dir.file(1), bytes).unwrap();
    let mut index = dir.index(4);
    let number = index.record_of(1).unwrap();
    assert!(index.read(number).is_err());
    index.drop_record(number);
    assert_eq!(index.state(1), State::Missing);
    check(&index, 2);
    check(&index, 4);
}

/// The records of a file: for each, its elements, its end, and the bytes that were durable before it was written.
fn records(bytes: &[u8]) -> Vec<(Vec<u32>, usize, usize)> {
    let mut found = Vec::new();
    let mut at = FILE_HEAD;
    while at < bytes.len() {
        let double = |from: usize| f64::from_ne_bytes(bytes[from..from + 8].try_into().unwrap());
        let int = |from: usize| u32::from_ne_bytes(bytes[from..from + 4].try_into().unwrap());
        let count = int(at + 8) as usize;
        let elements = (0..count).map(|i| int(at + RECORD_HEAD + 4 * i));
        let end = at + RECORD_HEAD + 4 * count + double(at + 16) as usize;
        found.push((elements.collect(), end, double(at + 24) as usize));
        at = end;
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a crash leaves behind the durable bytes, durable results are there, and no result is wrong.
    #[test]
    fn no_cut_loses_or_changes_a_durable_result(
        sizes in prop::collection::vec(1..6_u32, 1..5),
        keep in 0.0..1.0_f64,
        junk in prop::collection::vec((0.0..1.0_f64, any::<u8>()), 0..20),
        zeros in any::<bool>(),
    ) {
        let dir = Dir::new();
        let mut next = 1;
        let groups: Vec<Vec<u32>> = sizes.iter().map(|&size| {
            let group = (next..next + size).collect();
            next += size;
            group
        }).collect();
        write(&dir.0, &groups);
        let mut bytes = fs::read(dir.file(1)).unwrap();
        let records = records(&bytes);
        // The system dies while the last records are being written.
        let durable = records.last().unwrap().2;
        let cut = durable + ((bytes.len() - durable) as f64 * keep) as usize;
        if zeros {
            bytes[cut..].fill(0);
        } else {
            bytes.truncate(cut);
        }
        for (at, byte) in junk {
            let at = durable + ((bytes.len() - durable) as f64 * at) as usize;
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        fs::write(dir.file(1), &bytes).unwrap();
        let index = dir.index(next as usize - 1);
        for (elements, end, _) in records {
            for element in elements {
                if end <= durable || index.state(element as usize) != State::Missing {
                    check(&index, element);
                }
            }
        }
    }

    #[test]
    fn bytes_of_any_kind_are_no_results(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let dir = Dir::new();
        fs::create_dir_all(dir.0.join(RESULTS)).unwrap();
        let mut file = file_head(RUN).to_vec();
        file.extend_from_slice(&bytes);
        fs::write(dir.file(1), file).unwrap();
        prop_assert_eq!(dir.index(5).records(), 0);
    }
}

mod saving {
    use super::super::save::{SaveRequest, Saved, Saver};
    use super::super::{Item, elements_of_file};
    use super::*;

    fn request(dir: &Dir, nonce: &str) -> SaveRequest {
        SaveRequest {
            run: RUN,
            folder: "folder".into(),
            host_dir: dir.0.join("host").to_string_lossy().into_owned(),
            run_dir: dir.0.to_string_lossy().into_owned(),
            probe: "probe".into(),
            nonce: nonce.into(),
            r_version: 4 << 16,
            durable: true,
            values: false,
            least: 0,
            remove: vec!["a.rcr".into(), "b.rcr".into()],
        }
    }

    fn item(element: u32) -> Item {
        Item::Value {
            element,
            failed: element % 5 == 0,
            body: Body::from_bytes(payload(element)),
        }
    }

    #[test]
    fn a_request_crosses_a_message() {
        let dir = Dir::new();
        let mut request = request(&dir, "nonce");
        assert_eq!(
            SaveRequest::decode(&request.encode()).as_ref(),
            Some(&request)
        );
        request.remove.clear();
        assert_eq!(SaveRequest::decode(&request.encode()), Some(request));
        for bytes in [&b""[..], b"\xff", b"short\0f\0a\0b\0p\0c\0x\0y"] {
            assert_eq!(SaveRequest::decode(bytes), None);
        }
        for saved in [
            Saved::Nowhere("full".into()),
            Saved::InRun,
            Saved::OnHost("a.rcr".into()),
        ] {
            let (kind, text) = saved.encode();
            assert_eq!(Saved::decode(kind, text.into()), Some(saved.clone()));
        }
    }

    #[test]
    fn a_worker_saves_for_the_head_only_where_the_head_would_write() {
        let dir = Dir::new();
        fs::create_dir_all(dir.0.join(RESULTS)).unwrap();
        fs::write(dir.0.join("probe"), "nonce").unwrap();
        let request = |nonce| SaveRequest {
            least: 1,
            ..request(&dir, nonce)
        };
        assert_eq!(Saver::new(&request("nonce")).save(&[item(1)]), Saved::InRun);
        let nowhere = Saved::Nowhere(String::new());
        assert_eq!(Saver::new(&request("other")).save(&[item(2)]), nowhere);
        assert!(!dir.0.join("host").exists());
        fs::remove_dir_all(dir.0.join(RESULTS)).unwrap();
        assert_eq!(Saver::new(&request("nonce")).save(&[item(3)]), nowhere);
    }

    #[test]
    fn a_worker_that_sees_the_run_appends_to_it() {
        let dir = Dir::new();
        fs::create_dir_all(dir.0.join(RESULTS)).unwrap();
        fs::write(dir.0.join("probe"), "nonce").unwrap();
        let mut saver = Saver::new(&request(&dir, "nonce"));
        assert!(saver.serves(&request(&dir, "nonce")) && !saver.serves(&request(&dir, "other")));
        for element in [1, 2, 5] {
            assert_eq!(saver.save(&[item(element)]), Saved::InRun);
        }
        let index = dir.index(5);
        [1, 2, 5].iter().for_each(|&element| check(&index, element));
        assert_eq!(fs::read_dir(dir.0.join(RESULTS)).unwrap().count(), 1);
    }

    #[test]
    fn any_other_worker_writes_files_that_the_head_removes() {
        let dir = Dir::new();
        // Another directory with the same path has another probe.
        fs::write(dir.0.join("probe"), "other").unwrap();
        let mut request = request(&dir, "nonce");
        let mut saver = Saver::new(&request);
        let folder = dir.0.join("host").join("folder");
        let names: Vec<String> = [1, 2]
            .map(|element| match saver.save(&[item(element)]) {
                Saved::OnHost(name) => name,
                other => panic!("{other:?}"),
            })
            .into();
        assert_eq!(elements_of_file(&folder.join(&names[1]), RUN).unwrap(), [2]);
        fs::write(dir.0.join("host").join("kept.rcr"), "kept").unwrap();
        request.remove = vec![names[0].clone(), "../kept.rcr".into(), "absent.rcr".into()];
        Saver::remove(&request);
        assert!(!folder.join(&names[0]).exists() && folder.join(&names[1]).exists());
        assert!(dir.0.join("host").join("kept.rcr").exists());
        fs::remove_dir_all(dir.0.join("host")).unwrap();
        fs::write(dir.0.join("host"), "a file").unwrap();
        assert!(matches!(saver.save(&[item(1)]), Saved::Nowhere(_)));
    }
}

#[test]
fn a_lock_is_held_until_it_is_dropped() {
    use super::lock::{Lock, Owner};
    let dir = Dir::new();
    let path = dir.0.join("lock");
    assert_eq!(Lock::owner(&path).unwrap(), None);
    let lock = Lock::take(&path, "4711 pi\n").unwrap().unwrap();
    let owner = Owner {
        pid: Some(4711),
        host: Some("pi".into()),
    };
    // Code of this process may read the file.
    drop(fs::read(&path).unwrap());
    assert_eq!(Lock::owner(&path).unwrap().as_ref(), Some(&owner));
    assert_eq!(Lock::take(&path, "1 other").unwrap().unwrap_err(), owner);
    drop(lock);
    assert_eq!(Lock::owner(&path).unwrap(), None);
    assert!(Lock::take(&path, "1 other").unwrap().is_ok());
}
