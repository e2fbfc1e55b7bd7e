# Results of Rust functions. A Rust function never jumps and never raises an error: failures are values of other types.
#   character: a failure, which is raised as a condition.
#   pairlist:  R code that Rust had called has jumped (an error, an interrupt). The jump continues here, where it skips
#              no frame of Rust.

unwound <- function(result) {
  .Call("rustcluster_continue_unwind", result, PACKAGE = "rustcluster")
}

# For functions whose result is neither a character vector nor a pairlist.
checked <- function(result, handle = NULL) {
  switch(typeof(result),
    character = raiseFailure(result, handle),
    pairlist = unwound(result),
    result
  )
}
