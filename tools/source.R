# Adds the source of the package to the package that is being installed, for installOnHosts().
package <- Sys.getenv("R_PACKAGE_DIR")
if (nzchar(package)) {
  files <- list.files(".", recursive = TRUE, all.files = TRUE)
  made <- c(
    "^src/rust/(target|vendor|[.]cargo|core/fuzz)/", "^src/Makevars$", "[.](o|so|dll|a)$",
    "[.]tar[.]gz$",
    "^[.](git|ci)(/|$)", "[.]Rcheck/"
  )
  files <- files[!grepl(paste(made, collapse = "|"), files)]
  dir.create(file.path(package, "source"), showWarnings = FALSE)
  utils::tar(
    file.path(package, "source", "rustcluster.tar.gz"), files, compression = "gzip", tar = "internal"
  )
}
