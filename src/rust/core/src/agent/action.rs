//! What the router decides, for the agent's loop to do.

use crate::protocol::control::ToHead;
use crate::protocol::frame::Frame;
use crate::protocol::ids::PayloadId;
use bytes::Bytes;

/// What an agent is to do.
#[derive(Debug)]
pub enum Act {
    /// Sends a frame to the head.
    ToHead(Frame),
    /// The same, with the memory that has come from the worker in its header.
    Along(Frame),
    /// The memory that has come from this worker is not wanted.
    LetGo(u32),
    /// Sends a control message to the head.
    Tell(ToHead),
    /// To the worker in its header.
    ToWorker(Frame),
    /// More bytes of a payload, for memory that can be shared; after the `last` nobody may change it.
    Store {
        /// The payload that the bytes belong to.
        payload: PayloadId,
        /// The bytes to append.
        bytes: Bytes,
        /// Whether the payload is complete with these bytes.
        last: bool,
    },
    /// To the worker in its header, with the memory in which the payload is.
    Hand {
        /// The frame that begins the task's message.
        frame: Frame,
    },
    /// The payload is not needed any more.
    Discard(PayloadId),
    /// The head may send tasks to this worker.
    Up {
        /// The worker's index on its host.
        worker: u32,
        /// Whether the worker replaces another in the same place.
        replaces: bool,
    },
    /// Interrupts a worker if it is still at this task.
    Interrupt {
        /// The worker's index on its host.
        worker: u32,
        /// The task that is cancelled.
        task: u64,
    },
    /// What a worker had to wait with may be dealt with now.
    ReadAgain(u32),
    /// No more goes to this worker.
    Close(u32),
    /// This is where the worker has its temporary files.
    TempDir(u32, String),
    /// The head wants to know what memory the workers take.
    Usage {
        /// The number of the head's question.
        question: u64,
    },
    /// The head wants to know the state of the agent.
    Dump {
        /// The number of the head's question.
        question: u64,
    },
    /// The head wants the end of it all.
    End,
}
