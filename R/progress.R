# What is shown of a job while it runs.

wantsProgress <- function() {
  wanted <- getOption("rustcluster.progress", FALSE)
  if (!isTRUE(wanted) && !isFALSE(wanted)) {
    badArgument("rustcluster.progress", "is an option that must be TRUE or FALSE")
  }
  wanted
}

# Returns a function that brings the bar up to date. It ends with the frame that has called.
# `progress`: gives the numbers of tasks done, and of workers that are busy.
showProgress <- function(progress, n, what, envir = parent.frame()) {
  whats <- paste0(what, "s")
  bar <- cli::cli_progress_bar(
    # It is brought up to date once more after its end, when a loss has been settled.
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
