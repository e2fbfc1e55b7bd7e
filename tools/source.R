# Adds to the package that is being installed what installOnHosts() needs to install it on other hosts: its source, a
# hash of its code (`build`), and the scripts that run on a host.
package <- Sys.getenv("R_PACKAGE_DIR")
if (nzchar(package)) {
  files <- list.files(".", recursive = TRUE, all.files = TRUE)
  made <- c(
    "^src/rust/(target|vendor|[.]cargo|core/fuzz)/", "^src/Makevars$", "^src/.*[.]rds$", "[.](o|so|dll|a)$",
    "[.]tar[.]gz$",
    "^[.](git|ci)(/|$)", "[.]Rcheck/"
  )
  files <- sort(files[!grepl(paste(made, collapse = "|"), files)], method = "radix")
  to <- file.path(package, "source")
  dir.create(to, showWarnings = FALSE)
  utils::tar(file.path(to, "rustcluster.tar.gz"), files, compression = "gzip", tar = "internal")
  # Head and agent must have the same code. R CMD build writes its time into DESCRIPTION, and leaves other files out.
  code <- grep("^(R|src)/|^NAMESPACE$", files, value = TRUE)
  code <- setdiff(code, paste0("src/rust/", c("clippy.toml", "deny.toml", "vendor.tar.xz", "vendor-config.toml")))
  sums <- tempfile()
  writeLines(paste(tools::md5sum(code), code), sums, useBytes = TRUE)
  writeLines(unname(tools::md5sum(sums)), file.path(to, "build"))
  file.copy(c("tools/on-host.R", "tools/rust.R"), to, overwrite = TRUE)
}
