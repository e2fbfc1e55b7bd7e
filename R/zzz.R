.onLoad <- function(libname, pkgname) {
  findParallels()
  findVerbs()
  registerType()
  # Its generics are others from version to version.
  setHook(packageEvent("future", "onLoad"), registerFutureMethods)
  if (isNamespaceLoaded("future")) registerFutureMethods()
}

# New in R 4.5: makeCluster(type = "RUST").
registerType <- function() {
  register <- get0("registerClusterType", asNamespace("parallel"), inherits = FALSE)
  # Whoever is loaded again replaces what it registered before, which would be warned of.
  if (is.function(register)) suppressWarnings(register("RUST", makeRustCluster))
}

