//! The functions of the head, for R.

mod adaptive;
mod background;
mod broadcast;
mod call;
mod dashboard;
mod detached;
mod dump;
mod elements;
mod events;
mod guard_process;
pub mod handle;
mod job;
mod losses;
mod nodes;
mod readiness;
mod retry;
mod send;
mod serialization_cache;
mod start;
mod status;
mod store;
mod values;

use extendr_api::prelude::*;

extendr_module! {
    mod head;
    use start;
    use nodes;
    use readiness;
    use events;
    use call;
    use dashboard;
    use retry;
    use job;
    use status;
    use store;
    use dump;
    use adaptive;
    use background;
    use detached;
    use guard_process;
}
