# What comes back from Rust. A function there never jumps and never throws: what it has to say
# besides its result is a value of another kind.
#   a failure: a list of class "rustcluster_rust_failure", to be raised as a condition. Its fields have the types that
#              the condition's have.
#   pairlist:  R jumped (an error, an interrupt) while Rust had called it; the jump goes on here,
#              where no frame of Rust's is left to be skipped.

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
