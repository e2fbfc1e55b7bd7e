# Clusters over a real PBS. RUSTCLUSTER_TEST_DIALECT: default "openpbs". RUSTCLUSTER_TEST_ARRAY=FALSE: for commands of PBS
# that have no ids for the elements of an array, as Slurm's.

watch_processes()

test_engine(
  "pbs", "^R|running", dialect = Sys.getenv("RUSTCLUSTER_TEST_DIALECT", "openpbs"),
  array = as.logical(Sys.getenv("RUSTCLUSTER_TEST_ARRAY", "TRUE"))
)

test_that("nothing is left", {
  expect_no_leftovers()
})
