//! Replays the inputs of the fuzz targets that are kept in `core/fuzz/corpus`, and a good many that
//! are made at random.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a panic fails the test"
)]

mod fuzz_targets;

use fuzz_targets::TARGETS;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::fs;
use std::path::Path;

#[test]
fn what_the_fuzzers_found_does_no_harm() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in TARGETS {
        let mut count = 0;
        for file in fs::read_dir(corpora.join(name)).expect("a corpus for each target") {
            let path = file.expect("a file").path();
            // Shown if it fails.
            println!("{}", path.display());
            target(&fs::read(path).expect("to be read"));
            count += 1;
        }
        assert!(count > 0, "{name}");
    }
}

#[test]
fn random_bytes_do_no_harm() {
    for seed in 0..2_000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = vec![0; rng.random_range(0..600)];
        rng.fill_bytes(&mut bytes);
        for (name, target) in TARGETS {
            println!("{name} {seed}");
            target(&bytes);
        }
    }
}
