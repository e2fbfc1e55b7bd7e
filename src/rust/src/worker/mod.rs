//! Functions of workers, for R.

mod batch;
mod memory_limit;
pub mod serve;

use extendr_api::prelude::*;

extendr_module! {
    mod worker;
    use serve;
    use memory_limit;
}
