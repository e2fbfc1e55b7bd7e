# Vignettes that start clusters are written as vignettes/NAME.Rmd.orig. This script runs their code with the installed
# package and writes vignettes/NAME.Rmd, which contains the real output and no code to run: R CMD build and pkgdown
# start no cluster.
#
#   Rscript tools/vignettes.R [NAME ...]   runs these vignettes, or all, and writes them
#   Rscript tools/vignettes.R check        fails if a vignette was not made from its source as it is now; runs nothing
#   Rscript tools/vignettes.R run          runs all, fails if the code of one does, and prints where the output differs
#
# Process ids differ in each run: in the output, 4711 replaces the first one of a vignette, 4712 the next one,
# and so on. Blanks at the ends of lines and repeated empty lines are removed. The rest of the output is
# unchanged.

source_of <- function(name) file.path("vignettes", paste0(name, ".Rmd.orig"))
vignette_of <- function(name) file.path("vignettes", paste0(name, ".Rmd"))

# The digest covers the source and the vignette, except the line that contains it.
digest <- function(name, lines) {
  file <- tempfile()
  on.exit(unlink(file))
  writeLines(c(readLines(source_of(name), encoding = "UTF-8"), lines), file, useBytes = TRUE)
  unname(tools::md5sum(file))
}

# Returns a comment for the header, which no format shows.
stamp <- function(name, lines) {
  sprintf("# Written by tools/vignettes.R: change %s.Rmd.orig instead. Digest: %s", name, digest(name, lines))
}

is_current <- function(name) {
  if (!file.exists(vignette_of(name))) return(FALSE)
  lines <- readLines(vignette_of(name), encoding = "UTF-8")
  identical(lines[2L], stamp(name, lines[-2L]))
}

replace_pids <- function(lines) {
  pattern <- "(?<=pid |pid     : int |process |kill )[0-9]+"
  is_output <- startsWith(lines, "#>")
  found <- gregexpr(pattern, lines[is_output], perl = TRUE)
  pids <- regmatches(lines[is_output], found)
  known <- unique(unlist(pids))
  regmatches(lines[is_output], found) <- lapply(pids, function(pid) as.character(4710L + match(pid, known)))
  lines
}

tidy <- function(lines) {
  lines <- sub(" +$", "", lines)
  empty <- !nzchar(lines)
  lines[!(empty & c(FALSE, empty[-length(empty)]))]
}

# Returns the lines of a vignette. Its code runs in a session of its own. Plots are written into folder
# `figures`.
run <- function(name, figures) {
  output <- tempfile(fileext = ".Rmd")
  on.exit(unlink(output))
  code <- bquote({
    knitr::opts_knit$set(base.dir = .(normalizePath(figures)))
    knitr::opts_chunk$set(collapse = TRUE, comment = "#>", error = FALSE, fig.path = .(paste0(name, "-")))
    invisible(knitr::knit(.(source_of(name)), .(output), quiet = TRUE))
  })
  script <- tempfile(fileext = ".R")
  on.exit(unlink(script), add = TRUE)
  writeLines(deparse(code), script)
  env <- c("LC_ALL=C.UTF-8", "LANGUAGE=en", "TZ=UTC", "NO_COLOR=1")
  status <- system2(file.path(R.home("bin"), "Rscript"), c("--vanilla", shQuote(script)), env = env)
  if (status != 0L) stop("the code of ", source_of(name), " failed", call. = FALSE)
  tidy(replace_pids(readLines(output, encoding = "UTF-8")))
}

write_vignette <- function(name) {
  lines <- run(name, "vignettes")
  writeLines(append(lines, stamp(name, lines), 1L), vignette_of(name), useBytes = TRUE)
}

print_difference <- function(name) {
  file <- tempfile()
  on.exit(unlink(file))
  writeLines(run(name, tempdir()), file, useBytes = TRUE)
  committed <- tempfile()
  on.exit(unlink(committed), add = TRUE)
  writeLines(readLines(vignette_of(name), encoding = "UTF-8")[-2L], committed, useBytes = TRUE)
  labels <- c("--label", vignette_of(name), "--label", shQuote("as it runs now"))
  system2("diff", c("-u", labels, committed, file))
}

names <- sub("\\.Rmd\\.orig$", "", basename(Sys.glob(source_of("*"))))
arguments <- commandArgs(trailingOnly = TRUE)
if (identical(arguments, "check")) {
  stale <- names[!vapply(names, is_current, NA)]
  for (name in stale) {
    message(sprintf(
      "%s was not made from %s as it is now: change only the latter, run `Rscript tools/vignettes.R %s`, commit both",
      vignette_of(name), source_of(name), name
    ))
  }
  quit(status = as.integer(length(stale) > 0L))
}
if (identical(arguments, "run")) {
  for (name in names) print_difference(name)
} else {
  unknown <- setdiff(arguments, names)
  if (length(unknown)) stop("there is no ", source_of(unknown[1L]))
  for (name in if (length(arguments)) arguments else names) write_vignette(name)
}
