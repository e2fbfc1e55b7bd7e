//! Functions of workers, for R.

mod batch;
pub mod serve;

use extendr_api::prelude::*;

extendr_module! {
    mod worker;
    use serve;
}
