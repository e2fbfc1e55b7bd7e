# Results of Rust functions. A Rust function never jumps and never raises an error: failures are values of other types.
#   a failure: a list of class "rustcluster_rust_failure", which is raised as a condition. Its fields have the types of
#              the condition's fields.
#   pairlist:  R code that Rust had called has jumped (an error, an interrupt). The jump continues here, where it skips
#              no frame of Rust.

# is.object() is the cheapest test that R has, and FALSE for all other results but objects that users have sent. Where
# an answer is received, once a task, it is asked before this function is called.
isFailure <- function(result) is.object(result) && inherits(result, "rustcluster_rust_failure")

# A failure as Rust makes them, for what R finds out by itself.
rustFailure <- function(kind, ...) structure(list(kind = kind, ...), class = "rustcluster_rust_failure")

unwound <- function(result) {
  .Call("rustcluster_continue_unwind", result, PACKAGE = "rustcluster")
}

# For functions whose result is neither a failure nor a pairlist.
checked <- function(result, handle = NULL) {
  if (isFailure(result)) raiseFailure(result, handle)
  if (typeof(result) == "pairlist") unwound(result) else result
}
