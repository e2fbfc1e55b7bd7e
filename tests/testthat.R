library(testthat)
library(parallel)
library(rustcluster)

test_check("rustcluster")
