# The progress bar of a job.

wantsProgress <- function() {
  wanted <- getOption("rustcluster.progress", FALSE)
  if (!isTRUE(wanted) && !isFALSE(wanted)) {
    badArgument("rustcluster.progress", "must be TRUE or FALSE; it is set by options()")
  }
  wanted
}

# Returns a function that updates the bar. The bar ends with the frame of the caller. `progress`: returns the numbers of
# finished tasks and of busy workers.
showProgress <- function(progress, n, what, envir = parent.frame()) {
  whats <- paste0(what, "s")
  bar <- cli::cli_progress_bar(
    # The bar is updated once more after the last task has ended.
    total = n, clear = FALSE, auto_terminate = FALSE, .envir = envir,
    format = paste0(
      "{cli::pb_bar} {cli::pb_current}/{cli::pb_total} ", whats, " | {cli::pb_rate} | ",
      "{cli::pb_extra$busy} busy | ETA {cli::pb_eta}"
    ),
    format_done = paste("{cli::pb_total}", whats, "in {cli::pb_elapsed} ({cli::pb_rate})"),
    extra = list(busy = 0)
  )
  function() {
    at <- progress()
    cli::cli_progress_update(set = at[[1L]], id = bar, extra = list(busy = at[[2L]]), .envir = envir)
  }
}
