.onLoad <- function(libname, pkgname) {
  findParallels()
  findVerbs()
  registerType()
  # Another build may take its place in the library.
  loaded$build <- readBuild(file.path(libname, pkgname))
  # The generics differ between versions of these packages.
  onceLoaded("future", registerFutureMethods)
  onceLoaded("parallelly", registerParallellyMethods)
  onceLoaded("BiocParallel", registerBiocParallelMethods)
}

onceLoaded <- function(package, register) {
  setHook(packageEvent(package, "onLoad"), register)
  if (isNamespaceLoaded(package)) register()
}

# Registers the cluster type "RUST" for makeCluster(), in R 4.5 and newer.
registerType <- function() {
  register <- get0("registerClusterType", asNamespace("parallel"), inherits = FALSE)
  # R warns when the package is loaded again and replaces the type.
  if (is.function(register)) suppressWarnings(register("RUST", makeRustCluster))
}
