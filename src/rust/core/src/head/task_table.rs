//! The tasks that R has given to workers and whose ends it has not taken: whose each is, which worker has it, how it
//! ended. The one table of the head's that knows these; what of a task's message has been sent is the scheduler's.
//!
//! R gives a task to a worker, its owner, and asks for its end by that. The owner has the task, unless it was lost:
//! then the task is reassigned to another worker of the same job.

use super::scheduler::events::{Outcome, Termination};
use crate::protocol::ids::{JobId, Rank, TaskId};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// How a task ended, as far as R is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// As the scheduler reported it.
    Outcome(Outcome),
    /// It was lost too often, and is not tried again.
    GivenUp,
}

#[derive(Debug)]
struct TaskEntry {
    owner: Rank,
    assigned: Rank,
    end: Option<End>,
}

impl TaskEntry {
    fn failure(&self) -> Option<&Arc<Termination>> {
        match &self.end {
            Some(End::Outcome(Outcome::Lost(termination))) => Some(termination),
            _ => None,
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct TaskTable {
    tasks: HashMap<TaskId, TaskEntry>,
    /// Of each owner, the tasks whose messages are complete, in the order in which R gave them, with their jobs.
    queues: Vec<VecDeque<(TaskId, JobId)>>,
    /// Tasks in these.
    outstanding: usize,
    /// Tasks that their owners do not have.
    reassigned: usize,
    /// Tasks that have ended, in the order of their ends. May hold tasks that have been removed.
    ready: VecDeque<TaskId>,
    /// Tasks that were lost and of which it is not decided whether they are retried.
    lost: Vec<(JobId, TaskId)>,
}

impl TaskTable {
    /// For a cluster of so many workers.
    pub fn set_workers(&mut self, count: usize) {
        self.queues = vec![VecDeque::new(); count];
    }

    /// The message of a task is being sent to the worker at `assigned`, perhaps once more.
    pub fn begin(&mut self, task: TaskId, owner: Rank, assigned: Rank) {
        let end = None;
        let before = self.tasks.insert(
            task,
            TaskEntry {
                owner,
                assigned,
                end,
            },
        );
        let was = before.is_some_and(|entry| entry.assigned != entry.owner);
        self.reassigned -= usize::from(was);
        self.reassigned += usize::from(assigned != owner);
    }

    /// The message of a task that has begun is complete: the task is outstanding.
    pub fn finish(&mut self, task: TaskId, job: JobId) {
        let Some(entry) = self.tasks.get(&task) else {
            return;
        };
        if let Some(queue) = self.queues.get_mut(entry.owner as usize) {
            queue.push_back((task, job));
            self.outstanding += 1;
        }
    }

    /// Whether the end of a task is to be asked for.
    pub fn contains(&self, task: TaskId) -> bool {
        self.tasks.contains_key(&task)
    }

    /// The worker that R gave a task to.
    pub fn owner(&self, task: TaskId) -> Option<Rank> {
        Some(self.tasks.get(&task)?.owner)
    }

    /// The worker that has a task.
    pub fn assigned(&self, task: TaskId) -> Option<Rank> {
        Some(self.tasks.get(&task)?.assigned)
    }

    /// The job of an outstanding task.
    pub fn job(&self, task: TaskId) -> Option<JobId> {
        let queue = self.queues.get(self.owner(task)? as usize)?;
        let found = queue.iter().find(|&&(other, _)| other == task)?;
        Some(found.1)
    }

    /// Outstanding tasks of all workers.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The outstanding tasks of a worker with their jobs, the oldest first.
    pub fn of_owner(&self, owner: Rank) -> impl Iterator<Item = (TaskId, JobId)> + '_ {
        let queue = self.queues.get(owner as usize);
        queue.into_iter().flatten().copied()
    }

    /// Whether any of these owners has an outstanding task.
    pub fn any_of(&self, includes: impl Fn(Rank) -> bool) -> bool {
        let mut queues = self.queues.iter().enumerate();
        queues.any(|(owner, queue)| !queue.is_empty() && includes(owner as Rank))
    }

    /// Where the tasks of a job are that were reassigned from this worker.
    pub fn reassigned(&self, owner: Rank, job: JobId) -> impl Iterator<Item = Rank> + '_ {
        let any = self.reassigned > 0;
        let tasks = self.of_owner(owner).take_while(move |_| any);
        let of_job = tasks.filter(move |&(_, other)| other == job);
        of_job
            .filter_map(|(task, _)| self.assigned(task))
            .filter(move |&assigned| assigned != owner)
    }

    /// Of each worker, how many tasks R gave it and how many were reassigned to it.
    pub fn loads(&self) -> Vec<usize> {
        let mut loads: Vec<usize> = self.queues.iter().map(VecDeque::len).collect();
        if self.reassigned > 0 {
            for entry in self
                .tasks
                .values()
                .filter(|entry| entry.assigned != entry.owner)
            {
                loads[entry.assigned as usize] += 1;
            }
        }
        loads
    }

    /// A task has ended. Returns whether anybody expects that, or else the outcome.
    pub fn ended(&mut self, task: TaskId, job: JobId, outcome: Outcome) -> Result<(), Outcome> {
        let Some(entry) = self.tasks.get_mut(&task) else {
            return Err(outcome);
        };
        if matches!(outcome, Outcome::Lost(_)) {
            self.lost.push((job, task));
        }
        self.ready.push_back(task);
        entry.end = Some(End::Outcome(outcome));
        Ok(())
    }

    fn take_end(&mut self, task: TaskId) -> Option<(Rank, TaskId, End)> {
        let entry = self.tasks.get_mut(&task)?;
        let end = match &entry.end {
            // Stays until it is decided what becomes of the task: R may be interrupted before.
            Some(End::Outcome(Outcome::Lost(termination))) => {
                End::Outcome(Outcome::Lost(termination.clone()))
            }
            _ => entry.end.take()?,
        };
        Some((entry.owner, task, end))
    }

    /// Whether the end of the first task outstanding of this owner can be taken permanently: losses are first decided on.
    pub fn is_next_there(&self, owner: Rank) -> bool {
        let next = self.of_owner(owner).next();
        let entry = next.and_then(|(task, _)| self.tasks.get(&task));
        entry.is_some_and(|entry| entry.end.is_some() && entry.failure().is_none())
    }

    /// Why the worker that had the task is gone, if the task was lost and it is not decided whether it is retried.
    pub fn failure(&self, task: TaskId) -> Option<Arc<Termination>> {
        self.tasks.get(&task)?.failure().cloned()
    }

    /// The end of this task, or else the loss of another of the same job, unless that is 0.
    pub fn take(&mut self, task: TaskId, job: JobId) -> Option<(Rank, TaskId, End)> {
        let end = self.take_end(task);
        if end.is_some() || job == 0 || self.lost.is_empty() {
            return end;
        }
        let at = self.lost.iter().position(|lost| lost.0 == job)?;
        self.take_end(self.lost[at].1)
    }

    /// The first task to have ended of the owners that `includes`.
    pub fn take_any(&mut self, includes: impl Fn(Rank) -> bool) -> Option<(Rank, TaskId, End)> {
        let mut at = 0;
        while let Some(&task) = self.ready.get(at) {
            let Some(owner) = self.owner(task) else {
                // Received by rank, or cancelled.
                self.ready.remove(at);
                continue;
            };
            if includes(owner) {
                let end = self.take_end(task);
                if !matches!(end, Some((_, _, End::Outcome(Outcome::Lost(_))))) {
                    self.ready.remove(at);
                }
                if end.is_some() {
                    return end;
                }
                continue;
            }
            at += 1;
        }
        None
    }

    /// It is decided what becomes of a task that was lost.
    pub fn retry_decided(&mut self, task: TaskId) {
        self.ready.retain(|&ready| ready != task);
        self.lost.retain(|lost| lost.1 != task);
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.end = None;
        }
    }

    /// A task is not retried; R is told so when it asks for the answer.
    pub fn give_up(&mut self, task: TaskId) {
        self.retry_decided(task);
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.end = Some(End::GivenUp);
            self.ready.push_back(task);
        }
    }

    /// R knows how this task ended, or does not want to. Returns where the task was, and the bytes that there are of
    /// an answer.
    pub fn remove(&mut self, task: TaskId) -> Option<(Rank, usize)> {
        let TaskEntry {
            owner,
            assigned,
            end,
        } = self.tasks.remove(&task)?;
        self.reassigned -= usize::from(assigned != owner);
        let queue = self.queues.get_mut(owner as usize);
        let at = queue
            .as_ref()
            .and_then(|queue| queue.iter().position(|sent| sent.0 == task));
        if let (Some(queue), Some(at)) = (queue, at) {
            queue.remove(at);
            self.outstanding -= 1;
        }
        if self.ready.front() == Some(&task) {
            self.ready.pop_front();
        }
        if !self.lost.is_empty() {
            self.lost.retain(|lost| lost.1 != task);
        }
        if self.tasks.is_empty() {
            self.ready.clear();
        }
        let bytes = match end {
            Some(End::Outcome(Outcome::Answer(body))) => body.len,
            _ => 0,
        };
        Some((assigned, bytes))
    }

    /// No task that has not ended is answered any more.
    pub fn close(&mut self, termination: &Arc<Termination>) {
        for entry in self.tasks.values_mut() {
            let lost = || End::Outcome(Outcome::Lost(termination.clone()));
            entry.end.get_or_insert_with(lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::body::Body;
    use proptest::prelude::*;

    fn table(workers: usize) -> TaskTable {
        let mut table = TaskTable::default();
        table.set_workers(workers);
        table
    }

    fn send(table: &mut TaskTable, task: TaskId, owner: Rank, job: JobId) {
        table.begin(task, owner, owner);
        table.finish(task, job);
    }

    fn lost() -> Outcome {
        Outcome::Lost(Arc::new(Termination::Host("cut".into())))
    }

    fn answer() -> Outcome {
        Outcome::Answer(Body::default())
    }

    #[test]
    fn a_loss_is_told_until_it_is_decided_and_an_answer_once() {
        let mut table = table(2);
        send(&mut table, 1, 0, 7);
        send(&mut table, 2, 1, 7);
        assert_eq!(table.ended(2, 7, lost()), Ok(()));
        for _ in 0..2 {
            // Also to whoever waits for another task of that job, and to nobody else.
            assert!(matches!(
                table.take(1, 7),
                Some((1, 2, End::Outcome(Outcome::Lost(_))))
            ));
            assert!(matches!(table.take_any(|_| true), Some((1, 2, _))));
            assert_eq!(table.take(1, 0), None);
        }
        table.retry_decided(2);
        table.begin(2, 1, 0);
        assert_eq!(table.take_any(|_| true), None);
        assert_eq!(
            (table.owner(2), table.assigned(2), table.job(2)),
            (Some(1), Some(0), Some(7))
        );
        assert_eq!(table.ended(2, 7, answer()), Ok(()));
        assert!(matches!(table.take_any(|_| true), Some((1, 2, _))));
        assert_eq!(table.take_any(|_| true), None);
        assert_eq!(table.remove(2), Some((0, 0)));
        assert_eq!(table.ended(2, 7, answer()), Err(answer()));
        assert_eq!(table.outstanding(), 1);
    }

    #[test]
    fn who_is_asked_for_a_task_that_was_given_up_is_told_so_once() {
        let mut table = table(1);
        send(&mut table, 1, 0, 7);
        assert_eq!(table.ended(1, 7, lost()), Ok(()));
        table.give_up(1);
        assert_eq!(table.take(1, 7), Some((0, 1, End::GivenUp)));
        assert_eq!(table.take(1, 7), None);
    }

    #[test]
    fn reassigned_tasks_load_the_worker_that_has_them() {
        let mut table = table(3);
        send(&mut table, 1, 0, 7);
        send(&mut table, 2, 0, 7);
        send(&mut table, 3, 0, 8);
        table.begin(2, 0, 2);
        table.begin(3, 0, 1);
        assert_eq!(table.reassigned(0, 7).collect::<Vec<_>>(), [2]);
        assert_eq!(table.reassigned(0, 8).collect::<Vec<_>>(), [1]);
        assert_eq!(table.loads(), [3, 1, 1]);
        // Back at its owner.
        table.begin(2, 0, 0);
        assert_eq!(table.reassigned(0, 7).count(), 0);
        assert_eq!(table.loads(), [3, 1, 0]);
        assert_eq!(table.remove(3), Some((1, 0)));
        assert_eq!(table.loads(), [2, 0, 0]);
    }

    proptest! {
        /// Against a plain list of the tasks, in the order in which they were sent.
        #[test]
        fn each_task_is_at_one_place_until_it_is_removed(
            steps in proptest::collection::vec((0_u8..6, 0_u64..8, 0_u32..3), 1..80),
        ) {
            let mut table = table(3);
            let mut model: Vec<(TaskId, Rank, Rank)> = Vec::new();
            let mut next = 1;
            for (step, pick, rank) in steps {
                let at = (!model.is_empty()).then(|| pick as usize % model.len().max(1));
                match (step, at) {
                    (0 | 1, _) => {
                        send(&mut table, next, rank, 1 + pick % 2);
                        model.push((next, rank, rank));
                        next += 1;
                    }
                    (2, Some(at)) => {
                        let (task, owner, _) = model[at];
                        table.retry_decided(task);
                        table.begin(task, owner, rank);
                        model[at].2 = rank;
                    }
                    (3, Some(at)) => {
                        let (task, _, assigned) = model.remove(at);
                        prop_assert_eq!(table.remove(task).map(|removed| removed.0), Some(assigned));
                    }
                    (4, Some(at)) => prop_assert_eq!(table.ended(model[at].0, 1, lost()), Ok(())),
                    (_, Some(at)) => prop_assert_eq!(table.ended(model[at].0, 1, answer()), Ok(())),
                    (_, None) => prop_assert!(table.take_any(|_| true).is_none()),
                }
                prop_assert_eq!(table.outstanding(), model.len());
                let reassigned = model.iter().filter(|known| known.1 != known.2);
                prop_assert_eq!(table.reassigned, reassigned.count());
                let mut loads = vec![0; 3];
                for &(task, owner, assigned) in &model {
                    prop_assert_eq!((table.owner(task), table.assigned(task)), (Some(owner), Some(assigned)));
                    loads[owner as usize] += 1;
                    loads[assigned as usize] += usize::from(assigned != owner);
                }
                prop_assert_eq!(table.loads(), loads);
                for rank in 0..3 {
                    let own: Vec<TaskId> = table.of_owner(rank).map(|(task, _)| task).collect();
                    let expected = model.iter().filter(|known| known.1 == rank);
                    prop_assert_eq!(own, expected.map(|known| known.0).collect::<Vec<_>>());
                }
            }
        }
    }
}
