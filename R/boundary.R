# Results of Rust functions. A Rust function never jumps and never raises an error: failures are values of other types.
#   a failure: a list of class "rustcluster_rust_failure", which is raised as a condition. Its fields have the types of
#              the condition's fields.
#   pairlist:  R code that Rust had called has jumped (an error, an interrupt). The jump continues here, where it skips
#              no frame of Rust.

# is.object() is the cheapest test in R, and FALSE for all results but failures and objects of users. The code that
# receives an answer for each task calls it before this function.
isFailure <- function(result) is.object(result) && inherits(result, "rustcluster_rust_failure")

# Returns a failure like those of Rust, for a problem that R has found.
rustFailure <- function(kind, ...) structure(list(kind = kind, ...), class = "rustcluster_rust_failure")

unwound <- function(result) {
  .Call("rustcluster_continue_unwind", result, PACKAGE = "rustcluster")
}

# For functions whose result is neither a failure nor a pairlist.
checked <- function(result, handle = NULL) {
  if (isFailure(result)) raiseFailure(result, handle)
  if (typeof(result) == "pairlist") unwound(result) else result
}
