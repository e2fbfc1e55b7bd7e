//! The head's functions for R.

mod broadcast;
mod call;
mod dump;
mod elements;
mod events;
pub mod handle;
mod job;
mod nodes;
mod repeat;
mod start;
mod status;

use extendr_api::prelude::*;

extendr_module! {
    mod head;
    use start;
    use nodes;
    use events;
    use call;
    use job;
    use status;
    use dump;
}
