# Python scripts, for programs that can only be driven from Python.

python <- "/usr/bin/python3"

skip_unless_python <- function(library) {
  skip_unless_long()
  skip_if_not(file.exists(python), "there is no Python")
  has <- system2(python, c("-c", shQuote(paste("import", library))), stdout = FALSE, stderr = FALSE)
  skip_if_not(has == 0L, paste("Python has no", library))
}

# Returns the output and the status of the script. All processes of its process group end with it, at the latest
# after five minutes.
run_python <- function(lines, env = character()) {
  script <- tempfile(fileext = ".py")
  writeLines(lines, script)
  env <- c(
    paste0("R_LIBS=", shQuote(paste(.libPaths(), collapse = ":"))), paste0("R_HOME=", R.home()), "R_TESTS=", env
  )
  output <- suppressWarnings(system2(
    "timeout", c("-k", "5", "300", python, script), stdout = TRUE, stderr = TRUE, env = env
  ))
  list(output = output, status = c(attr(output, "status"), 0L)[[1L]])
}
