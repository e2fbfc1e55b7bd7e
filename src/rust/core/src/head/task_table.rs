//! The table of the tasks that R has given to workers and whose ends R has not taken. For each task, the table records
//! its owner, the worker that it is assigned to, and how it ended. No other table of the head records these; only the
//! scheduler knows how much of a task's message has been sent.
//!
//! R gives a task to a worker, its owner, and asks for the end of the task by its owner. The task is assigned to its
//! owner, unless the owner was lost: then the task is reassigned to another worker of the same job.

use super::scheduler::events::{Outcome, Termination};
use crate::protocol::ids::{JobId, Rank, TaskId};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// How a task ended for R.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The outcome that the scheduler reported.
    Outcome(Outcome),
    /// The task was lost too often and is not retried.
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
    /// For each owner, the tasks whose messages are complete, with their jobs, in the order in which R gave them.
    queues: Vec<VecDeque<(TaskId, JobId)>>,
    /// Number of tasks in the queues.
    outstanding: usize,
    /// Number of tasks that are not assigned to their owners.
    reassigned: usize,
    /// Tasks that have ended, in the order of their ends. May contain tasks that have been removed.
    ready: VecDeque<TaskId>,
    /// Lost tasks that await a retry decision.
    lost: Vec<(JobId, TaskId)>,
}

impl TaskTable {
    /// Sets the number of workers of the cluster.
    pub fn set_workers(&mut self, count: usize) {
        self.queues = vec![VecDeque::new(); count];
    }

    /// Adds workers to the cluster.
    pub fn add_workers(&mut self, count: usize) {
        self.queues
            .resize(self.queues.len() + count, VecDeque::new());
    }

    /// Adds a task whose message is being sent to the worker `assigned`, or reassigns a known task.
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

    /// Records that the message of a started task is complete: the task is outstanding.
    pub fn finish(&mut self, task: TaskId, job: JobId) {
        let Some(entry) = self.tasks.get(&task) else {
            return;
        };
        if let Some(queue) = self.queues.get_mut(entry.owner as usize) {
            queue.push_back((task, job));
            self.outstanding += 1;
        }
    }

    /// Whether a task is in the table.
    pub fn contains(&self, task: TaskId) -> bool {
        self.tasks.contains_key(&task)
    }

    /// The worker that R gave a task to.
    pub fn owner(&self, task: TaskId) -> Option<Rank> {
        Some(self.tasks.get(&task)?.owner)
    }

    /// The worker that a task is assigned to.
    pub fn assigned(&self, task: TaskId) -> Option<Rank> {
        Some(self.tasks.get(&task)?.assigned)
    }

    /// The job of an outstanding task.
    pub fn job(&self, task: TaskId) -> Option<JobId> {
        let queue = self.queues.get(self.owner(task)? as usize)?;
        let found = queue.iter().find(|&&(other, _)| other == task)?;
        Some(found.1)
    }

    /// Number of outstanding tasks of all workers.
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

    /// The workers to which tasks of this owner and this job were reassigned.
    pub fn reassigned(&self, owner: Rank, job: JobId) -> impl Iterator<Item = Rank> + '_ {
        let any = self.reassigned > 0;
        let tasks = self.of_owner(owner).take_while(move |_| any);
        let of_job = tasks.filter(move |&(_, other)| other == job);
        of_job
            .filter_map(|(task, _)| self.assigned(task))
            .filter(move |&assigned| assigned != owner)
    }

    /// For each worker, the number of tasks that it owns plus those that were reassigned to it.
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

    /// Records the outcome of a task.
    ///
    /// # Errors
    /// When the task is not in the table. Returns the outcome.
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
            // A loss stays until the retry decision, because R may be interrupted before.
            Some(End::Outcome(Outcome::Lost(termination))) => {
                End::Outcome(Outcome::Lost(termination.clone()))
            }
            _ => entry.end.take()?,
        };
        Some((entry.owner, task, end))
    }

    /// Whether the first outstanding task of this owner has ended. A loss does not count until the retry decision.
    pub fn is_next_there(&self, owner: Rank) -> bool {
        let next = self.of_owner(owner).next();
        let entry = next.and_then(|(task, _)| self.tasks.get(&task));
        entry.is_some_and(|entry| entry.end.is_some() && entry.failure().is_none())
    }

    /// The termination reason of the task's worker, if the task was lost and awaits its retry decision.
    pub fn failure(&self, task: TaskId) -> Option<Arc<Termination>> {
        self.tasks.get(&task)?.failure().cloned()
    }

    /// Takes the end of this task. If the task has not ended, returns the loss of another task of the same job, unless
    /// `job` is 0.
    pub fn take(&mut self, task: TaskId, job: JobId) -> Option<(Rank, TaskId, End)> {
        let end = self.take_end(task);
        if end.is_some() || job == 0 || self.lost.is_empty() {
            return end;
        }
        let at = self.lost.iter().position(|lost| lost.0 == job)?;
        self.take_end(self.lost[at].1)
    }

    /// Takes the end of the task that ended first, among the owners for which `includes` is true.
    pub fn take_any(&mut self, includes: impl Fn(Rank) -> bool) -> Option<(Rank, TaskId, End)> {
        let mut at = 0;
        while let Some(&task) = self.ready.get(at) {
            let Some(owner) = self.owner(task) else {
                // The task was received by rank or cancelled.
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

    /// Records that the retry decision for a lost task has been made.
    pub fn retry_decided(&mut self, task: TaskId) {
        self.ready.retain(|&ready| ready != task);
        self.lost.retain(|lost| lost.1 != task);
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.end = None;
        }
    }

    /// Gives up a lost task: it is not retried, and R gets [`End::GivenUp`] as its end.
    pub fn give_up(&mut self, task: TaskId) {
        self.retry_decided(task);
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.end = Some(End::GivenUp);
            self.ready.push_back(task);
        }
    }

    /// Removes a task whose end R knows or does not want. Returns the worker that the task was assigned to, and the
    /// number of buffered bytes of its answer.
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

    /// Ends all unfinished tasks as lost, because none of them will be answered any more.
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
    fn a_loss_is_returned_until_the_retry_decision_and_an_answer_once() {
        let mut table = table(2);
        send(&mut table, 1, 0, 7);
        send(&mut table, 2, 1, 7);
        assert_eq!(table.ended(2, 7, lost()), Ok(()));
        for _ in 0..2 {
            // The loss is also returned to a caller that waits for another task of the same job.
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
    fn the_end_of_a_task_that_was_given_up_is_returned_once() {
        let mut table = table(1);
        send(&mut table, 1, 0, 7);
        assert_eq!(table.ended(1, 7, lost()), Ok(()));
        table.give_up(1);
        assert_eq!(table.take(1, 7), Some((0, 1, End::GivenUp)));
        assert_eq!(table.take(1, 7), None);
    }

    #[test]
    fn reassigned_tasks_count_for_the_worker_that_they_are_assigned_to() {
        let mut table = table(3);
        send(&mut table, 1, 0, 7);
        send(&mut table, 2, 0, 7);
        send(&mut table, 3, 0, 8);
        table.begin(2, 0, 2);
        table.begin(3, 0, 1);
        assert_eq!(table.reassigned(0, 7).collect::<Vec<_>>(), [2]);
        assert_eq!(table.reassigned(0, 8).collect::<Vec<_>>(), [1]);
        assert_eq!(table.loads(), [3, 1, 1]);
        // The task returns to its owner.
        table.begin(2, 0, 0);
        assert_eq!(table.reassigned(0, 7).count(), 0);
        assert_eq!(table.loads(), [3, 1, 0]);
        assert_eq!(table.remove(3), Some((1, 0)));
        assert_eq!(table.loads(), [2, 0, 0]);
    }

    proptest! {
        /// Compares the table with a plain list of the tasks in the order in which they were sent.
        #[test]
        fn each_task_is_assigned_to_one_worker_until_it_is_removed(
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
