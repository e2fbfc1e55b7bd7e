.onLoad <- function(libname, pkgname) {
  findParallels()
  findVerbs()
  # New in R 4.5: makeCluster(type = "RUST").
  register <- get0("registerClusterType", asNamespace("parallel"), inherits = FALSE)
  if (is.function(register)) register("RUST", makeRustCluster)
}

