# Finds the Rust toolchain: sourced by msrv.R and config.R.

# Returns the versions that DESCRIPTION requires.
required_rust <- function() {
  # R CMD build may break the line anywhere.
  needs <- read.dcf("DESCRIPTION", fields = "SystemRequirements")[[1]]
  version <- regmatches(needs, regexec("rustc[[:space:]]*\\(?>=[[:space:]]*([0-9.]+)", needs))[[1]][2]
  if (is.na(version)) stop("DESCRIPTION names no version of rustc")
  version
}

# Returns the directories that may have cargo and rustc, besides PATH: that of rustup, and those of Debian's
# packages cargo-web and rustc-web, which are newer than the distribution's own.
rust_dirs <- function() {
  home <- Sys.getenv("CARGO_HOME", file.path(Sys.getenv("HOME"), ".cargo"))
  versioned <- rev(Sys.glob("/usr/lib/rust-*/bin"))
  c("", file.path(home, "bin"), versioned)
}

version_of <- function(program) {
  out <- tryCatch(
    suppressWarnings(system2(program, "--version", stdout = TRUE, stderr = FALSE)),
    error = function(e) character()
  )
  found <- regmatches(out, regexpr("[0-9]+\\.[0-9]+\\.[0-9]+", out))
  if (length(found)) found[[1]] else NA_character_
}

# Returns the first directory with both programs in new enough versions, or NULL. Attribute "seen" has the
# programs that were found on the way.
find_rust <- function(needs = required_rust()) {
  seen <- character()
  for (dir in rust_dirs()) {
    path <- function(program) if (nzchar(dir)) file.path(dir, program) else program
    cargo <- version_of(path("cargo"))
    rustc <- version_of(path("rustc"))
    if (is.na(cargo) && is.na(rustc)) next
    where <- if (nzchar(dir)) dir else "the PATH"
    seen <- c(seen, sprintf("on %s: cargo %s, rustc %s", where,
                            if (is.na(cargo)) "missing" else cargo,
                            if (is.na(rustc)) "missing" else rustc))
    if (!is.na(cargo) && !is.na(rustc) && numeric_version(rustc) >= needs) {
      return(list(dir = dir, cargo = path("cargo"), rustc = rustc))
    }
  }
  structure(list(), seen = seen)
}
