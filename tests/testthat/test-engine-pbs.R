# Clusters over a real PBS: RUSTCLUSTER_TEST_DIALECT, default "openpbs".

watch_processes()

test_engine("pbs", "^R|running", dialect = Sys.getenv("RUSTCLUSTER_TEST_DIALECT", "openpbs"))

test_that("nothing is left", expect_no_leftovers())
