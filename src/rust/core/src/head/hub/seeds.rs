//! The random number states of workers, in a file beside the record of a cluster that lingers. A worker whose host is
//! lost when the next head takes the cluster over goes on from there when the host comes back. The state of a worker
//! whose job has not begun is that which it is to begin with.

use super::client::Hub;
use super::core::Core;
use crate::protocol::ids::Rank;
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tracing::warn;
use xxhash_rust::xxh3::xxh3_64;

/// Each worker has a slot in the file: the length of its state, the state, and a digest of both. The head may be killed
/// while it writes.
const SLOT: usize = 64;
const DIGEST: usize = SLOT - 8;

fn slot(state: &[u8]) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    // A state of another length is none of L'Ecuyer's generator. It is not known then.
    if let Some(room) = slot[1..DIGEST].get_mut(..state.len()) {
        room.copy_from_slice(state);
        slot[0] = state.len() as u8;
    }
    let digest = xxh3_64(&slot[..DIGEST]);
    slot[DIGEST..].copy_from_slice(&digest.to_le_bytes());
    slot
}

fn state_of(slot: &[u8; SLOT]) -> Option<Bytes> {
    let is_whole = xxh3_64(&slot[..DIGEST]).to_le_bytes() == slot[DIGEST..];
    let state = slot[1..DIGEST].get(..slot[0].into())?;
    (is_whole && !state.is_empty()).then(|| Bytes::copy_from_slice(state))
}

fn write(file: &File, rank: Rank, state: &[u8]) -> io::Result<()> {
    file.write_all_at(&slot(state), u64::from(rank) * SLOT as u64)
}

impl Hub {
    /// Records the random number states in this file from now on. It may have those of the head before.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn record_seeds(&self, path: &Path) -> io::Result<()> {
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(path);
        self.core().seeds = Some(file?);
        Ok(())
    }

    /// The worker, which has not joined yet, is to begin with this random number state.
    pub fn record_first_seed(&self, rank: Rank, state: &[u8]) {
        let mut core = self.core();
        if core.is_awaited(rank) {
            core.record_seed(rank, state);
        }
    }

    /// Takes the random number states of workers whose hosts are lost from this file. After [`Hub::go`].
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn take_seeds(&self, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        let mut core = self.core();
        for rank in 0..core.inbox.workers.len() as Rank {
            let agent = core.inbox.workers[rank as usize].agent;
            let mut slot = [0; SLOT];
            let read = file.read_exact_at(&mut slot, u64::from(rank) * SLOT as u64);
            if read.is_ok() && !core.is_attached(agent) {
                if let Some(state) = state_of(&slot) {
                    core.scheduler.set_seed(rank, state);
                }
            }
        }
        core.pump();
        Ok(())
    }
}

impl Core {
    /// Records the states that have changed.
    pub fn record_changed_seeds(&mut self) {
        for rank in self.scheduler.take_changed_seeds() {
            if let Some(state) = self.scheduler.seed(rank) {
                self.record_seed(rank, &state);
            }
        }
    }

    fn record_seed(&mut self, rank: Rank, state: &[u8]) {
        let Some(file) = &self.seeds else {
            return;
        };
        if let Err(error) = write(file, rank, state) {
            // A worker that went on from an earlier state would repeat numbers.
            warn!(%error, "random number states are not recorded any more");
            let _ = file.set_len(0);
            self.seeds = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_unless_its_slot_is_damaged() {
        let state: Vec<u8> = (1..29).collect();
        let mut whole = slot(&state);
        assert_eq!(state_of(&whole).as_deref(), Some(&state[..]));
        whole[9] ^= 1;
        assert_eq!(state_of(&whole), None);
        assert_eq!(state_of(&[0; SLOT]), None);
        assert_eq!(state_of(&slot(&[])), None);
        assert_eq!(state_of(&slot(&[7; 2504])), None);
    }
}
