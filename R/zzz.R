.onLoad <- function(libname, pkgname) {
  findParallels()
  findVerbs()
  registerType()
  # Their generics are others from version to version.
  onceLoaded("future", registerFutureMethods)
  onceLoaded("parallelly", registerParallellyMethods)
}

onceLoaded <- function(package, register) {
  setHook(packageEvent(package, "onLoad"), register)
  if (isNamespaceLoaded(package)) register()
}

# New in R 4.5: makeCluster(type = "RUST").
registerType <- function() {
  register <- get0("registerClusterType", asNamespace("parallel"), inherits = FALSE)
  # Whoever is loaded again replaces what it registered before, which would be warned of.
  if (is.function(register)) suppressWarnings(register("RUST", makeRustCluster))
}
