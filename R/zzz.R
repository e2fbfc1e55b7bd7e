.onLoad <- function(libname, pkgname) {
  findParallels()
  findVerbs()
  # Its generics are others from version to version.
  setHook(packageEvent("future", "onLoad"), registerFutureMethods)
  if (isNamespaceLoaded("future")) registerFutureMethods()
  # New in R 4.5: makeCluster(type = "RUST").
  register <- get0("registerClusterType", asNamespace("parallel"), inherits = FALSE)
  if (is.function(register)) register("RUST", makeRustCluster)
}

