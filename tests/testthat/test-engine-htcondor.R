# Clusters over a real HTCondor, which accepts no jobs of root. As another user, with a copy of this directory that the
# user can read: setpriv --reuid=USER --regid=USER --init-groups env HOME=... Rscript -e '...'

watch_processes()

test_engine("htcondor", "running|^2|RUNNING|Running")

test_that("nothing is left", {
  expect_no_leftovers()
})
