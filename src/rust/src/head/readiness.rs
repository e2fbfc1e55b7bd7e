//! The connection by which R code waits for a node with `socketSelect()`: see `R/readiness.R`.

use super::handle::{rank_of, with_cluster};
use super::nodes::is_unread;
use super::retry;
use extendr_api::prelude::*;

/// Starts to listen for a connection that shows when an answer has arrived. Returns the port on the loopback
/// address to connect to, and the token, which the connection has to send first. Returns `NULL` if the system
/// has no free port.
/// @noRd
#[extendr]
fn hub_readiness_listen(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        Ok(match cluster.hub.borrow_mut().listen_for_readiness() {
            Ok((port, token)) => {
                let bytes = token.into_iter().map(i32::from);
                let all: Vec<i32> = [i32::from(port)].into_iter().chain(bytes).collect();
                all.into()
            }
            Err(_) => ().into(),
        })
    })
}

/// Accepts the connection that has been opened and has sent the token. Returns whether there is one.
/// @noRd
#[extendr]
fn hub_readiness_accept(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        Ok(cluster.hub.borrow_mut().accept_readiness().is_ok().into())
    })
}

/// Makes the connection readable from now on while the next answer of this worker has arrived. If the task had
/// a worker failure, the retry policy is applied first. Returns `NULL` if there is no connection.
/// @noRd
#[extendr]
fn hub_readiness_point(handle: Robj, rank: i32) -> Robj {
    with_cluster(&handle, |cluster| {
        let rank = rank_of(&cluster.hub.borrow(), rank)?;
        let failure = cluster.hub.borrow().next_loss(rank);
        let mut at_once = is_unread(cluster, |owner| (owner == rank).then_some(0));
        if let Some((task, assigned, termination)) = failure {
            match retry::task_lost(cluster, (rank, assigned), 0, task, &termination) {
                Ok(value) if value.is_null() => {}
                // R jumped while the task was being retried.
                Ok(token) => return Ok(token),
                Err(_) => at_once = true,
            }
        }
        let there = cluster.hub.borrow_mut().point_readiness_at(rank, at_once);
        Ok(if there { true.into() } else { ().into() })
    })
}

extendr_module! {
    mod readiness;
    fn hub_readiness_listen;
    fn hub_readiness_accept;
    fn hub_readiness_point;
}
