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

.onAttach <- function(libname, pkgname) {
  attached <- as.environment(paste0("package:", pkgname))
  # R does not list masked functions for a package that contains this object. See `?library`, `warn.conflicts`.
  if (!masksOthers(attached)) assign(".conflicts.OK", TRUE, attached)
  packageStartupMessage(
    pkgname, " ", packageVersionText(), " adds makeRustCluster() to parallel: see ?rustcluster, demo(\"rustcluster\")"
  )
}

# Returns whether an attached package or environment, except parallel, has a function with the name of one that
# `attached` contains. parallel's functions are masked on purpose, by functions that do what they do: see `?verbs`.
masksOthers <- function(attached) {
  isFunction <- function(names, where) vapply(names, exists, NA, where, mode = "function", inherits = FALSE)
  own <- names(attached)
  own <- own[isFunction(own, attached)]
  others <- setdiff(search(), c(environmentName(attached), "package:parallel", "Autoloads", "CheckExEnv"))
  any(vapply(others, function(other) {
    where <- as.environment(other)
    any(isFunction(intersect(own, names(where)), where))
  }, NA))
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
