# Vignettes whose code runs on clusters are made beforehand, with what that code gives: nobody who builds or
# checks the package starts a cluster for them. vignettes/NAME.Rmd.orig is the source, vignettes/NAME.Rmd is made
# from it, and both are committed.
#
#   Rscript tools/vignettes.R [NAME ...]   makes them, with the installed package, after a change of a source
#   Rscript tools/vignettes.R check        fails if one has not been made from its source as that is now, or was edited
#
# Needs the packages that the vignettes show (ecosystem: pbapply, foreach, future, future.apply, promises, later).
arguments <- commandArgs(trailingOnly = TRUE)
sources <- list.files("vignettes", "[.]Rmd[.]orig$", full.names = TRUE)

digest <- function(lines) {
  file <- tempfile()
  on.exit(unlink(file))
  writeLines(enc2utf8(lines), file, useBytes = TRUE)
  unname(tools::md5sum(file))
}
read <- function(path) readLines(path, encoding = "UTF-8")
target <- function(source) sub("[.]orig$", "", source)
# The line that says where a vignette comes from, which is not part of what it is made of.
mark <- function(source, lines) {
  sprintf("<!-- Made from %s by tools/vignettes.R: edit that. Source %s, this %s. -->",
          basename(source), digest(read(source)), digest(lines))
}
isMark <- function(lines) startsWith(lines, "<!-- Made from ")

if (identical(arguments, "check")) {
  stale <- Filter(function(source) {
    if (!file.exists(target(source))) return(TRUE)
    lines <- read(target(source))
    !identical(lines[isMark(lines)], mark(source, lines[!isMark(lines)]))
  }, sources)
  for (source in stale) message(target(source), " is not what ", source, " gives: run Rscript tools/vignettes.R")
  quit(status = as.integer(length(stale) > 0L))
}

make <- function(source) {
  name <- sub("[.]Rmd$", "", basename(target(source)))
  made <- tempfile(fileext = ".Rmd")
  # A session of its own, as knitr gives each vignette.
  knit <- sprintf(
    paste0(
      "setwd('vignettes'); options(width = 90); Sys.unsetenv(c('RUSTCLUSTER_LOG', 'NOT_CRAN'))\n",
      "knitr::opts_chunk$set(comment = '#>', fig.path = '%s-', fig.width = 7, fig.height = 3.5)\n",
      "knitr::knit('%s', '%s', quiet = TRUE)"
    ), name, basename(source), made
  )
  status <- system2(file.path(R.home("bin"), "Rscript"), c("--vanilla", "-e", shQuote(knit)))
  if (status != 0L) stop(source, " cannot be made")
  lines <- read(made)
  unlink(made)
  lines <- sub("[ \t]+$", "", lines)
  header <- which(lines == "---")[[2L]]
  writeLines(enc2utf8(append(lines, mark(source, lines), header)), target(source), useBytes = TRUE)
}

wanted <- if (length(arguments)) file.path("vignettes", paste0(arguments, ".Rmd.orig")) else sources
for (source in wanted) make(source)
