//! The connection by which R code waits for a node with `socketSelect()`: see `R/readiness.R`.

use super::handle::{rank_of, with_cluster};
use extendr_api::prelude::*;

/// Begins to listen for a connection that shows when an answer has arrived. The port to connect to on the loopback
/// address, and the bytes that are to be written there first. `NULL`: the system has no port left.
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

/// Takes the connection that has been opened and has written the token. Whether there is one.
/// @noRd
#[extendr]
fn hub_readiness_accept(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        Ok(cluster.hub.borrow_mut().accept_readiness().is_ok().into())
    })
}

/// From now on the connection can be read while the next answer of this worker is there. Whether there is a
/// connection.
/// @noRd
#[extendr]
fn hub_readiness_point(handle: Robj, rank: i32) -> Robj {
    with_cluster(&handle, |cluster| {
        let rank = rank_of(&cluster.hub.borrow(), rank)?;
        Ok(cluster.hub.borrow_mut().point_readiness_at(rank).into())
    })
}

extendr_module! {
    mod readiness;
    fn hub_readiness_listen;
    fn hub_readiness_accept;
    fn hub_readiness_point;
}
