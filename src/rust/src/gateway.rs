//! The gateway's process, for R.

use crate::r::failure::Failure;
use extendr_api::prelude::*;
use rustcluster_core::gateway::{self, Settings};
use rustcluster_core::platform::{fd, log};
use std::io;
use std::time::Duration;

/// Serves as a gateway until the head has closed stdin or is silent. Returns why it has ended. `cancel`: the path
/// of a script, or "". `address`: an IP address. `ports`: the first and the last port of a range.
/// @noRd
#[extendr]
fn gateway_run(
    socket: &str,
    address: &str,
    ports: Robj,
    heartbeat_timeout: f64,
    max_connections: i32,
    cancel: &str,
    directory: &str,
) -> Robj {
    log::start_or_say(log::Role::Agent);
    let run = || {
        let port = |at: usize| {
            let ports = ports.as_integer_slice().unwrap_or_default();
            u16::try_from(ports.get(at).copied().unwrap_or(-1)).map_err(io::Error::other)
        };
        let settings = Settings {
            socket: socket.into(),
            address: address.parse().map_err(io::Error::other)?,
            ports: (port(0)?, port(1)?),
            heartbeat_timeout: Duration::try_from_secs_f64(heartbeat_timeout)
                .map_err(io::Error::other)?,
            max_connections: usize::try_from(max_connections).unwrap_or(0),
            cancel: (!cancel.is_empty()).then(|| cancel.into()),
            directory: directory.into(),
        };
        let (input, output) = fd::take_stdio()?;
        gateway::run(&settings, input, output)
    };
    match run() {
        Ok(gateway::End::Closed) => "closed".into(),
        Ok(gateway::End::Silent) => "silent".into(),
        Err(error) => Failure::new("agent_failed")
            .with("reason", error.to_string())
            .into(),
    }
}

extendr_module! {
    mod gateway;
    fn gateway_run;
}
