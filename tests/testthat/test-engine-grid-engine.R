# Clusters over a real Grid Engine with a parallel environment: RUSTCLUSTER_TEST_PE, default "smp".

watch_processes()

test_engine("gridEngine", "^r|running", pe = Sys.getenv("RUSTCLUSTER_TEST_PE", "smp"))

test_that("nothing is left", {
  expect_no_leftovers()
})
