# Installs the package on a host, from the current folder, for installOnHosts(), which sends the source and
# reads the report. Argument: the library; without it, the personal library of the user.
source("tools/rust.R")

report <- function(library = "", problem = "", log = character()) {
  cat("\n<rustcluster installed 1>\n")
  write.dcf(list(
    library = library, version = read.dcf("DESCRIPTION", "Version")[[1]],
    r_version = as.character(getRversion()), problem = problem,
    log = paste0("|", tail(log, 20), collapse = "\n")
  ), width = 10000, keep.white = "log")
  quit(status = 0)
}

given <- commandArgs(trailingOnly = TRUE)
user <- strsplit(Sys.getenv("R_LIBS_USER"), .Platform$path.sep, fixed = TRUE)[[1]]
library <- path.expand(c(given, user, .libPaths())[[1]])
dir.create(library, recursive = TRUE, showWarnings = FALSE)
if (file.access(library, 2) != 0) {
  report(library, paste0("the library ", library, " cannot be written to: give another one as `rlibs`"))
}
library <- normalizePath(library)
.libPaths(c(library, .libPaths()))

if (!length(find_rust())) {
  report(library, paste0(
    "cargo and rustc, version ", required_rust(), " or newer, are missing there: install them with ",
    "`sudo apt-get install rustc-web cargo-web` (Debian, Ubuntu), `sudo dnf install rust cargo` ",
    "(Fedora), or rustup, from https://rustup.rs"
  ))
}
imports <- strsplit(read.dcf("DESCRIPTION", "Imports")[[1]], "[[:space:]]*,[[:space:]]*")[[1]]
imports <- trimws(sub("[(].*", "", imports))
missing <- function() imports[!vapply(imports, requireNamespace, NA, quietly = TRUE)]
if (length(missing())) {
  repos <- getOption("repos")
  repos[repos == "@CRAN@"] <- "https://cloud.r-project.org"
  try(suppressWarnings(utils::install.packages(missing(), library, repos = repos, quiet = TRUE)))
}
if (length(missing())) {
  names <- paste0("\"", missing(), "\"", collapse = ", ")
  report(library, paste0(
    "package ", names, " is missing there and could not be installed: try `install.packages(", names,
    ")` on that host, or its system's package (Debian: r-cran-", tolower(missing()[[1]]), ")"
  ))
}
log <- tempfile()
status <- system2(
  file.path(R.home("bin"), "R"), c("CMD", "INSTALL", "-l", shQuote(library), "."),
  stdout = log, stderr = log
)
if (status == 0) report(library)
report(library, paste("R CMD INSTALL ended with status", status), readLines(log, warn = FALSE))
