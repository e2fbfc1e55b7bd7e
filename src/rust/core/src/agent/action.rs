//! The router's decisions, which the agent's loop executes.

use super::setup_log::ReplayedCall;
use crate::protocol::control::ToHead;
use crate::protocol::frame::Frame;
use crate::protocol::ids::BlobId;
use bytes::Bytes;

/// An action of the agent.
#[derive(Debug)]
pub enum Act {
    /// Sends a frame to the head.
    ToHead(Frame),
    /// Sends a frame to the head, with the shared memory that came from the worker in its header.
    Along(Frame),
    /// Keeps a part of the answer to a task of a head that has disconnected.
    Keep(Frame),
    /// Drops the shared memory that came from this worker.
    LetGo(u32),
    /// Sends a control message to the head.
    Report(ToHead),
    /// Sends a frame to the worker in its header.
    ToWorker(Frame),
    /// Appends bytes to a blob in shared memory, which nobody can change after the `last` ones.
    Store {
        /// The blob that the bytes belong to.
        blob: BlobId,
        /// The bytes to append.
        bytes: Bytes,
        /// Whether the blob is complete with these bytes.
        last: bool,
    },
    /// Sends a frame to the worker in its header, with the memory of the blob.
    Hand {
        /// The frame that begins the task's message.
        frame: Frame,
    },
    /// Frees the memory of a blob.
    Discard(BlobId),
    /// The head may send tasks to this worker.
    Up {
        /// The worker's index on its host.
        worker: u32,
        /// Whether the worker is a replacement.
        replaces: bool,
    },
    /// Interrupts a worker if it still runs this task.
    Interrupt {
        /// The worker's index on its host.
        worker: u32,
        /// The task that is cancelled.
        task: u64,
    },
    /// Reads this worker's stream again, which had to wait.
    ReadAgain(u32),
    /// Closes the channel to this worker.
    Close(u32),
    /// Records the worker's temporary directory.
    TempDir(u32, String),
    /// Starts a memory survey, which the head has asked for.
    Usage {
        /// The number of the head's question.
        question: u64,
    },
    /// Sends the message of a set-up call to the head.
    SendCall {
        /// The number of the head's request.
        request: u64,
        /// The call; `None` if the worker's log does not contain it any more.
        call: Option<ReplayedCall>,
    },
    /// Lists the kept answers for the head.
    ListKept,
    /// Sends a kept answer to the head.
    SendKept {
        /// The number of the answer.
        number: u64,
        /// The number of the head's request.
        request: u64,
    },
    /// Drops a kept answer.
    DropKept(u64),
    /// The head wants to know the state of the agent.
    Dump {
        /// The number of the head's question.
        question: u64,
    },
    /// Ends the agent, as the head requested.
    End,
}
